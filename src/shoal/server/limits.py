"""A bound on request bodies, kept while they arrive: no byte beyond it is held.

Knows nothing of what a body means.
"""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shoal.core.request import ErrorInfo
from shoal.server.errors import error_response
from shoal.server.headers import header_of


class BodyLimit:
    """Refuses a body longer than `max_bytes`: by its Content-Length, or when it gets there."""

    def __init__(self, app: ASGIApp, *, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        stated = header_of(scope, b"content-length") or "0"
        if not stated.isdecimal() or int(stated[:20]) > self._max_bytes:
            info = ErrorInfo(status=413, code="request_too_large", message=self._message())
            await error_response(info)(scope, receive, send)
            return
        num_bytes = 0

        async def bounded_receive() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_bytes:
                # The one exception FastAPI lets through while it reads a body.
                raise HTTPException(413, self._message())
            return message

        await self._app(scope, bounded_receive, send)

    def _message(self) -> str:
        return (
            f"The request body is longer than {self._max_bytes} bytes, the most this server "
            f"takes; send a shorter one."
        )
