"""What surrounds every request: its id, the last catch of unexpected errors, a count.

Pure ASGI, because Starlette's BaseHTTPMiddleware hides a client's hanging up. Knows nothing
of OpenAI's API but the shape of an error.
"""

from __future__ import annotations

import logging
import random
import re

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shoal.observe import ServingMetrics
from shoal.server.errors import INTERNAL_ERROR, error_response
from shoal.server.headers import header_of

CLIENT_CLOSED_REQUEST = 499
"""nginx's status for a client that hung up before the response began."""

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
_log = logging.getLogger(__name__)


class Envelope:
    """Outermost: X-Request-Id in and out, a 500 in shape for what nobody caught, a count."""

    def __init__(self, app: ASGIApp, *, rng: random.Random, metrics: ServingMetrics) -> None:
        self._app = app
        self._rng = rng
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = self._request_id(header_of(scope, b"x-request-id"))
        id_header = (b"x-request-id", request_id.encode("ascii"))
        scope.setdefault("state", {})["request_id"] = request_id
        begun = False

        async def send_with_id(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                self._count(scope, message["status"])
                message = {**message, "headers": [*message.get("headers", ()), id_header]}
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
            if not begun:
                self._count(scope, CLIENT_CLOSED_REQUEST)
        except Exception:
            _log.exception("request %s failed: %s %s", request_id, scope["method"], scope["path"])
            if begun:
                raise  # all that is left is to cut the connection
            await error_response(INTERNAL_ERROR)(scope, receive, send_with_id)

    def _count(self, scope: Scope, status: int) -> None:
        # The route's template, not the path: anyone can make up paths.
        endpoint = getattr(scope.get("route"), "path", "other")
        self._metrics.http_response(endpoint, status)

    def _request_id(self, given: str) -> str:
        return given if _REQUEST_ID.fullmatch(given) else f"{self._rng.getrandbits(128):032x}"
