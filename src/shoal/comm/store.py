"""Where ranks leave their addresses for each other: a store of torch's kind over our own messages.

torch's TCPStore would listen, and let in whoever comes. Knows nothing of how the two callables
reach the other ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

__all__ = ["Get", "MessageStore", "PrefixStore", "Put", "Store"]

Put = Callable[[str, bytes], None]
"""(key, value)"""

Get = Callable[[str, float], bytes]
"""(key, timeout in seconds) → value, once somebody has put it; raises TimeoutError."""


class MessageStore(Store):
    """Sets and gets are all that groups are made from.

    torch keeps no reference to this object's Python half: whoever makes a group keeps one.
    """

    def __init__(self, put: Put, get: Get, timeout_s: float) -> None:
        super().__init__()
        self._put, self._get, self._timeout_s = put, get, timeout_s

    def set(self, key: str, value: bytes) -> None:  # type: ignore[override]
        self._put(key, bytes(value))

    def get(self, key: str) -> bytes:
        return self._get(key, self._timeout_s)

    def check(self, keys: list[str]) -> bool:
        try:
            for key in keys:
                self._get(key, 0.0)
        except TimeoutError:
            return False
        return True

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        for key in keys:
            self._get(key, self._timeout_s if timeout is None else timeout.total_seconds())
