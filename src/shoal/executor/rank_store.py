"""Values by which ranks find each other, kept by whoever started them.

Knows nothing of how the ranks are reached: it is told what to call.
"""

from __future__ import annotations

from collections.abc import Callable

from shoal.wire.worker_messages import StoreGet, StoreSet, StoreValue

Send = Callable[[StoreValue], None]


class RankStore:
    """Of one group of ranks."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}
        self._waiting: list[tuple[Send, str]] = []

    def set(self, message: StoreSet) -> None:
        """Whoever waits for it is told."""
        self._values[message.key] = message.value
        waiting, self._waiting = self._waiting, []
        for send, key in waiting:
            self.get(send, StoreGet(key))

    def get(self, send: Send, message: StoreGet) -> None:
        """Answers as soon as the value is there."""
        value = self._values.get(message.key)
        if value is None:
            self._waiting.append((send, message.key))
        else:
            send(StoreValue(message.key, value))
