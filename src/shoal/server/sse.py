"""Server-sent events, and clients that hang up or stop reading.

Backpressure: an event is sent when the one before it went out; uvicorn makes `send` wait
while the socket is full. Meanwhile tokens wait in the router, a request's worth at most, and
no longer than `stall_timeout_s`. Knows nothing of what the events say.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from shoal.core.errors import RequestError
from shoal.core.request import ErrorInfo
from shoal.server.errors import INTERNAL_ERROR, error_payload

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold events back
]
_log = logging.getLogger(__name__)


class BodyResponse(Response):
    """A JSON body that takes a while to make: given up when the client hangs up."""

    def __init__(self, make_body: Callable[[], Awaitable[bytes]]) -> None:
        super().__init__()
        self._make_body = make_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def work() -> None:
            body = await self._make_body()
            await Response(body, media_type="application/json")(scope, receive, send)

        await unless_hung_up(receive, work())


class EventStream(Response):
    """A stream of `data:` events, closed with `[DONE]`.

    Headers go out with the first event, so whatever is refused before it is a true 4xx. An
    error after it becomes an event of its own, and nothing that looks like an end follows.
    """

    def __init__(
        self, events: AsyncGenerator[bytes, None], *, request_id: str, stall_timeout_s: float
    ) -> None:
        super().__init__()
        self._events = events
        self._request_id = request_id
        self._stall_timeout_s = stall_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._events):
            await unless_hung_up(receive, self._stream(send))

    async def _stream(self, send: Send) -> None:
        first = await anext(self._events)
        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        try:
            await self._send(send, first)
            await self._send_rest(send)
        except _StalledClientError:
            # Returning in mid-body makes uvicorn cut the connection.
            _log.warning(
                "request %s dropped: the client took nothing for %g s",
                self._request_id,
                self._stall_timeout_s,
            )

    async def _send_rest(self, send: Send) -> None:
        try:
            async for event in self._events:
                await self._send(send, event)
        except RequestError as error:
            await self._send(send, error_payload(ErrorInfo.of(error)))
        except _StalledClientError:
            raise
        except Exception:  # noqa: BLE001 -- logged; the stream itself must still be ended
            _log.exception("request %s failed in mid-stream", self._request_id)
            await self._send(send, error_payload(INTERNAL_ERROR))
        await self._send(send, b"[DONE]", last=True)

    async def _send(self, send: Send, data: bytes, *, last: bool = False) -> None:
        body = b"data: %b\n\n" % data
        try:
            async with asyncio.timeout(self._stall_timeout_s):
                await send({"type": "http.response.body", "body": body, "more_body": not last})
        except TimeoutError as error:
            raise _StalledClientError from error


class _StalledClientError(Exception):
    """The socket has been full for too long."""


async def unless_hung_up(receive: Receive, work: Awaitable[None]) -> None:
    """Runs `work`, cancelling it as soon as the client is gone; the body has been read."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_hang_up(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
    finally:
        working.cancel()
        watching.cancel()
        # A cancelled request must be off the router before we return.
        await asyncio.gather(working, watching, return_exceptions=True)


async def _hang_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
