"""The head of a response and the first piece of its body, written to the client in one go.

uvicorn writes each as it comes, and a write is a system call that wakes the client. Knows nothing
of what is written.
"""

from __future__ import annotations

from typing import Any

from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from shoal.server.sse import SEND_BODY


class Corked:
    """What is sent of this request's response meanwhile is written at the end; with another server
    than uvicorn, or a version of it that is otherwise, at once."""

    __slots__ = ("_cork", "_cycle")

    def __init__(self, scope: Scope) -> None:
        cycle = getattr(scope.get("state", {}).get(SEND_BODY), "__self__", None)
        is_known = isinstance(cycle, RequestResponseCycle) and hasattr(cycle, "transport")
        self._cycle: Any = cycle if is_known else None

    def __enter__(self) -> None:
        if self._cycle is not None:
            self._cork = self._cycle.transport = _Cork(self._cycle.transport)

    def __exit__(self, *_exc: object) -> None:
        if self._cycle is not None:
            self._cycle.transport = self._cork.transport
            self._cork.flush()


class _Cork:
    """A transport that keeps what is written until anything else is wanted of it."""

    __slots__ = ("_parts", "transport")

    def __init__(self, transport: Any) -> None:
        self.transport = transport
        self._parts: list[bytes] = []

    def write(self, data: bytes) -> None:
        self._parts.append(data)

    def flush(self) -> None:
        parts, self._parts = self._parts, []
        if parts:
            self.transport.write(b"".join(parts))

    def __getattr__(self, name: str) -> Any:
        self.flush()
        return getattr(self.transport, name)
