"""How far loading is, passed on not too often. Knows nothing of what is loaded."""

from __future__ import annotations

import time
from collections.abc import Callable

from shoal.wire.messages import Loading

_EVERY_S = 0.1


class LoadingReport:
    """
    Args:
        send: to whoever waits.
    """

    def __init__(self, send: Callable[[Loading], None]) -> None:
        self._send = send
        self._last_s = 0.0

    def __call__(self, done_bytes: int, total_bytes: int) -> None:
        now = time.monotonic()
        if now - self._last_s >= _EVERY_S or done_bytes == total_bytes:
            self._last_s = now
            self._send(Loading(done_bytes=done_bytes, total_bytes=total_bytes))
