"""The head of a response and the first piece of its body, written to the client in one go.

uvicorn writes each as it comes, and a write is a system call that wakes the client. Knows nothing
of what is written.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from shoal.server.sse import SEND_BODY


@contextmanager
def corked(scope: Scope) -> Iterator[None]:
    """What is sent of this request's response meanwhile is written at the end; with another server
    than uvicorn, or a version of it that is otherwise, at once."""
    cycle = getattr(scope.get("state", {}).get(SEND_BODY), "__self__", None)
    if not isinstance(cycle, RequestResponseCycle) or not hasattr(cycle, "transport"):
        yield
        return
    transport = cycle.transport
    cork = _Cork(transport)
    cycle.transport = cork  # type: ignore[assignment]
    try:
        yield
    finally:
        cycle.transport = transport
        cork.flush()


class _Cork:
    """A transport that keeps what is written until anything else is wanted of it."""

    __slots__ = ("_parts", "_transport")

    def __init__(self, transport: Any) -> None:
        self._transport = transport
        self._parts: list[bytes] = []

    def write(self, data: bytes) -> None:
        self._parts.append(data)

    def flush(self) -> None:
        parts, self._parts = self._parts, []
        if parts:
            self._transport.write(b"".join(parts))

    def __getattr__(self, name: str) -> Any:
        self.flush()
        return getattr(self._transport, name)
