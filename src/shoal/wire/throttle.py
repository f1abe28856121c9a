"""A link slower than the one there is, for the lab: messages are handed on when it would have.

    bandwidth   a message leaves when those before it have, and takes bytes / bandwidth
    latency     it arrives so much later
    cut         nothing leaves; what is sent meanwhile waits, as TCP would keep it

Knows nothing of sockets: it is told what to call when a message is due.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from shoal.core.errors import WireError

Message = tuple[bytes, bytes]
"""Header, payload."""

Key = tuple[str, str]
"""Peer, and which of the connections to it."""

_NEVER = float("inf")
_LONGEST_WAIT_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """How a link to a peer behaves; as it is, by default."""

    bandwidth_bytes_per_s: float | None = None
    latency_s: float = 0.0
    cut: bool = False


@dataclass(slots=True)
class _Line:
    """Messages on their way to one peer.

    Attributes:
        waiting: (sent at, message), oldest first.
        free_at: when the last of those handed on had left.
    """

    link: Link
    waiting: deque[tuple[float, Message]] = field(default_factory=deque)
    free_at: float = 0.0

    def left_at(self) -> float:
        """When the oldest has left."""
        sent_at, (header, payload) = self.waiting[0]
        bandwidth = self.link.bandwidth_bytes_per_s
        seconds = (len(header) + len(payload)) / bandwidth if bandwidth else 0.0
        return max(self.free_at, sent_at) + seconds

    def due_at(self) -> float:
        if self.link.cut or not self.waiting:
            return _NEVER
        return self.left_at() + self.link.latency_s


class Throttle:
    """A thread that hands messages on in time, in order for each connection.

    Args:
        hand_on: called with (key, header, payload) from that thread.
        max_waiting: messages on one connection.
    """

    def __init__(self, hand_on: Callable[[Key, bytes, bytes], None], max_waiting: int) -> None:
        self._hand_on = hand_on
        self._max_waiting = max_waiting
        self._lines: dict[Key, _Line] = {}
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="shoal-throttle", daemon=True)
        self._thread.start()

    def set_link(self, key: Key, link: Link) -> None:
        with self._changed:
            line = self._lines.setdefault(key, _Line(link))
            if line.link.cut and not link.cut:
                line.free_at = time.monotonic()  # nothing left while it was cut
            line.link = link
            self._changed.notify()

    def paces(self, key: Key) -> bool:
        """Whether messages on this connection must come here, or they would overtake others."""
        return key in self._lines

    def send(self, key: Key, header: bytes, payload: bytes) -> None:
        """
        Raises:
            WireError: too many are waiting.
        """
        with self._changed:
            line = self._lines[key]
            if len(line.waiting) >= self._max_waiting:
                raise WireError(f"{len(line.waiting)} messages to {key[0]} wait on its lab link")
            line.waiting.append((time.monotonic(), (header, payload)))
            self._changed.notify()

    def forget(self, key: Key) -> None:
        """Drop what waits on a connection; its link stays."""
        with self._changed:
            if key in self._lines:
                self._lines[key].waiting.clear()

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while (due := self._next_due()) is not None:
            self._hand_on(*due)

    def _next_due(self) -> tuple[Key, bytes, bytes] | None:
        """Waits for the next message that is due; None when closed."""
        with self._changed:
            while not self._is_closed:
                dues = ((line.due_at(), key) for key, line in self._lines.items())
                due_at, key = min(dues, default=(_NEVER, ("", "")))
                if due_at <= time.monotonic():
                    line = self._lines[key]
                    line.free_at = line.left_at()
                    return key, *line.waiting.popleft()[1]
                self._changed.wait(min(due_at - time.monotonic(), _LONGEST_WAIT_S))
            return None
