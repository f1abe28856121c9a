"""How fast a lab's device is, whatever it computes with.

Ranks of a group pay between collectives, where what they computed is measured; a rank alone
after each Step. Knows nothing of how long anything should take.
"""

from __future__ import annotations

import threading
from typing import Protocol, runtime_checkable

from shoal.comm import Group
from shoal.comm.streams import StreamGroup
from shoal.comm.stretch import Stretch


@runtime_checkable
class _SlowGroup(Protocol):
    """Groups that measure what their rank computes."""

    def set_speed(self, speed: float) -> None: ...

    def pay(self) -> None: ...


class Speed:
    """The speed of one worker; set from any thread."""

    def __init__(self, speed: float = 1.0) -> None:
        self._lock = threading.Lock()
        self._speed = speed
        self._stretch = Stretch(speed)
        self._group: _SlowGroup | None = None

    def govern(self, group: Group | None) -> None:
        """From now on it is this group that pays."""
        slow: object = group.measuring if isinstance(group, StreamGroup) else group
        if isinstance(slow, _SlowGroup):
            with self._lock:
                self._group = slow
                slow.set_speed(self._speed)

    def set(self, speed: float) -> None:
        with self._lock:
            self._speed = speed
            if self._group is not None:
                self._group.set_speed(speed)
            else:
                self._stretch.set_speed(speed)

    def begin(self) -> None:
        if self._group is None:
            self._stretch.begin()

    def pay(self) -> None:
        if self._group is not None:
            self._group.pay()
        else:
            self._stretch.pay()
