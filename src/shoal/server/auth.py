"""API keys: who may come in, and whose prefix cache is whose.

Knows nothing of endpoints but the few that stand open.
"""

from __future__ import annotations

import hashlib
import hmac

from starlette.types import ASGIApp, Receive, Scope, Send

from shoal.core.request import ErrorInfo
from shoal.server.errors import error_response
from shoal.server.headers import header_of

OPEN_PATHS = frozenset({"/health", "/ready", "/version"})
"""Load balancers ask these, and hold no key."""

_DENIED = ErrorInfo(
    status=401,
    code="invalid_api_key",
    message="No valid API key was sent; send one as the header «Authorization: Bearer KEY».",
)


class BearerAuth:
    """Lets in who holds one of `api_keys`; sets `state.tenant` to a salt of its own.

    With a single key everyone is one tenant and shares one prefix cache.
    """

    def __init__(self, app: ASGIApp, *, api_keys: tuple[str, ...]) -> None:
        self._app = app
        self._keys = tuple(key.encode() for key in api_keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._keys and scope["path"] not in OPEN_PATHS:
            key = self._matching_key(header_of(scope, b"authorization"))
            if key is None:
                headers = {"WWW-Authenticate": "Bearer"}
                await error_response(_DENIED, headers)(scope, receive, send)
                return
            if len(self._keys) > 1:
                tenant = hashlib.sha256(key).hexdigest()[:32]
                scope.setdefault("state", {})["tenant"] = tenant
        await self._app(scope, receive, send)

    def _matching_key(self, header: str) -> bytes | None:
        scheme, _, given = header.partition(" ")
        if scheme.lower() != "bearer":
            return None
        given, found = given.strip(), None
        # Headers have no encoding: some clients send UTF-8, others Latin-1.
        spellings = given.encode("latin-1"), given.encode("utf-8")
        # All keys are compared, whichever matches: the time says nothing.
        for key in self._keys:
            if any(hmac.compare_digest(key, spelling) for spelling in spellings):
                found = key
        return found
