"""Server-sent events, and clients that stop reading.

Backpressure: an event is sent when the one before it went out; uvicorn makes `send` wait
while the socket is full. Meanwhile tokens wait in the router, a request's worth at most, and
no longer than `stall_timeout_s`; the short way (express.py) is closed then. Knows nothing of
what the events say.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from shoal.core.errors import RequestError
from shoal.core.request import ErrorInfo
from shoal.server.errors import INTERNAL_ERROR, error_payload
from shoal.server.express import Express
from shoal.server.hang_up import HANG_UP, HangUp, unless_hung_up

EVENT_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold events back
]
SEND_BODY = "send_body"
"""Of the request's state: the server's own `send`. Every layer between wraps `send` to see the
head of a response, and would cost its microsecond for each token."""

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

        await unless_hung_up(scope, receive, work())


class EventStream(Response):
    """A stream of `data:` events, closed with `[DONE]`.

    Headers go out with the first event, so whatever is refused before it is a true 4xx. An
    error after it becomes an event of its own, and nothing that looks like an end follows.

    Args:
        express: sends what `events` will not give, from the first event on.
    """

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        *,
        request_id: str,
        stall_timeout_s: float,
        express: Express | None = None,
    ) -> None:
        super().__init__()
        self._events = events
        self._request_id = request_id
        self._stall_timeout_s = stall_timeout_s
        self._express = express

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._events):
            await unless_hung_up(scope, receive, self._stream(scope, send))

    async def _stream(self, scope: Scope, send: Send) -> None:
        send_body = scope.get("state", {}).get(SEND_BODY, send)
        first = await anext(self._events)
        with StallWatch(scope, self._stall_timeout_s, self._request_id) as watch:
            watch.begin()
            await send({"type": "http.response.start", "status": 200, "headers": EVENT_HEADERS})
            await self._send_all(send_body, first, watch)

    async def _send_all(self, send: Send, first: bytes, watch: StallWatch) -> None:
        watch.begin()
        await send(_body(first))
        watch.end()
        if self._express is not None:
            self._express.open(send)
        end = b"[DONE]"
        try:
            async for event in self._events:
                watch.begin()
                await send(_body(event))
                watch.end()
        except RequestError as error:
            end = error_payload(ErrorInfo.of(error)) + b"\n\ndata: " + end
        except Exception:  # noqa: BLE001 -- logged; the stream itself must still be ended
            _log.exception("request %s failed in mid-stream", self._request_id)
            end = error_payload(INTERNAL_ERROR) + b"\n\ndata: " + end
        watch.begin()
        await send(_body(end, more_body=False))


def _body(event: bytes, *, more_body: bool = True) -> Message:
    body = b"data: %b\n\n" % event
    return {"type": "http.response.body", "body": body, "more_body": more_body}


class StallWatch:
    """Drops a client when one send to it takes too long.

    Our own server cuts its connection, so that it is one that has hung up; of any other the task
    that entered is cancelled, and leaves in mid-body.

    One timer a stream, put off when it fires, because a timeout of its own for every token
    would cost as much as the rest of sending it.

    Args:
        label: of the request, for the log.
    """

    def __init__(self, scope: Scope, limit_s: float, label: str) -> None:
        self._limit_s, self._label = limit_s, label
        self._hang_up: HangUp | None = scope.get("state", {}).get(HANG_UP)
        self._has_cancelled = False
        self._loop = asyncio.get_running_loop()
        self._sending_since: float | None = None

    def __enter__(self) -> StallWatch:
        self._task = asyncio.current_task()
        self._timer = self._loop.call_later(self._limit_s, self._look)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        self._timer.cancel()
        if not self._has_cancelled or kind is not asyncio.CancelledError:
            return False
        assert self._task is not None
        return self._task.uncancel() == 0  # nobody else wants it to end

    def begin(self) -> None:
        self._sending_since = self._loop.time()

    def end(self) -> None:
        self._sending_since = None

    def _look(self) -> None:
        now = self._loop.time()
        since = now if self._sending_since is None else self._sending_since
        if now - since >= self._limit_s:
            _log.warning(
                "request %s dropped: the client took nothing for %g s", self._label, self._limit_s
            )
            self._drop()
        else:
            self._timer = self._loop.call_at(since + self._limit_s, self._look)

    def _drop(self) -> None:
        if self._hang_up is not None:
            self._hang_up.cut()
            return
        self._has_cancelled = True
        assert self._task is not None
        self._task.cancel()
