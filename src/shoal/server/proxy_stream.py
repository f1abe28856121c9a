"""An upstream's stream of events on its way to a client, whole events at a time.

    Inbox ─ProxiedOutput─▶ ShortWay.take ─▶ uvicorn's transport      while the client keeps up
                    └────▶ ProxiedStream ─▶ send                     else, and first and last

The short way is that of express.py: no task is woken for a token. While the client is slow, what
comes waits; when much does, its upstream is read no further (`Backlog`).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from shoal.core.errors import RequestError
from shoal.core.request import ErrorInfo, Output
from shoal.observe import CompletionTimer
from shoal.router.upstream.records import Backlog, ProxiedOutput, ProxiedRequest
from shoal.server.config import EdgeContext
from shoal.server.cork import Corked
from shoal.server.errors import error_payload
from shoal.server.express import can_write, socket_of
from shoal.server.hang_up import unless_hung_up
from shoal.server.proxy_output import checked
from shoal.server.sse import EVENT_HEADERS, SEND_BODY, StallWatch


class ProxiedStream:
    """
    Args:
        label: the X-Request-Id, for the log.
    """

    def __init__(self, request: ProxiedRequest, context: EdgeContext, label: str) -> None:
        self._request, self._context, self._label = request, context, label
        self._reason = "cancelled"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        clock, metrics = self._context.clock, self._context.metrics
        timer = metrics.completion(len(self._request.prompt_ids), clock.now())
        try:
            await unless_hung_up(scope, receive, self._stream(scope, receive, send, timer))
        finally:
            timer.finished(self._reason, clock.now())

    async def _stream(
        self, scope: Scope, receive: Receive, send: Send, timer: CompletionTimer
    ) -> None:
        way = ShortWay(timer)
        outputs = self._context.router.generate(self._request, way.take)
        async with aclosing(outputs):
            try:
                first = checked(await anext(outputs))
            except RequestError as error:
                self._reason = error.code
                raise
            way.count(first, self._context.clock.now())
            if first.is_refusal:
                self._reason = f"upstream_{first.status}"
                response = Response(first.data, first.status, media_type="application/json")
                await response(scope, receive, send)
                return
            send_body = scope.get("state", {}).get(SEND_BODY, send)
            with StallWatch(scope, self._context.config.stall_timeout_s, self._label) as watch:
                self._reason = first.finish or self._reason
                watch.begin()
                with Corked(scope):
                    await send(_head())
                    await send_body(_body(first.data, more_body=first.finish is None))
                watch.end()
                await self._send_rest(first, outputs, send_body, way, watch)

    async def _send_rest(
        self,
        first: ProxiedOutput,
        outputs: AsyncGenerator[Output, None],
        send: Send,
        way: ShortWay,
        watch: StallWatch,
    ) -> None:
        backlog = self._request.call.backlog
        output = first
        while True:
            backlog.took(len(output.data))
            if output.finish is not None:
                return
            way.open(send, backlog)
            try:
                output = checked(await anext(outputs))
            except RequestError as error:
                # Nothing that looks like an end follows.
                self._reason = error.code
                payload = b"data: %b\n\n" % error_payload(ErrorInfo.of(error))
                watch.begin()
                await send(_body(payload, more_body=False))
                return
            way.count(output, self._context.clock.now())
            self._reason = output.finish or self._reason
            watch.begin()
            await send(_body(output.data, more_body=output.finish is None))
            watch.end()


class ShortWay:
    """Takes what is plain news and writes it, while the client's socket takes more."""

    __slots__ = ("_backlog", "_cycle", "_timer")

    def __init__(self, timer: CompletionTimer) -> None:
        self._timer = timer
        self._cycle: RequestResponseCycle | None = None

    def open(self, send: Send, backlog: Backlog) -> None:
        """The first event is out, by the server's own `send`."""
        if self._cycle is None:
            self._cycle, self._backlog = socket_of(send), backlog

    def count(self, output: Output, now: float) -> None:
        if output.token_ids:
            self._timer.tokens(len(output.token_ids), now)

    def take(self, output: Output, now: float) -> bool:
        cycle = self._cycle
        if (
            cycle is None
            or output.finish is not None
            or not isinstance(output, ProxiedOutput)
            or not can_write(cycle)
        ):
            return False
        self.count(output, now)
        data = output.data
        cycle.transport.write(b"%x\r\n%b\r\n" % (len(data), data))
        self._backlog.took(len(data))
        return True


def _head() -> Message:
    return {"type": "http.response.start", "status": 200, "headers": EVENT_HEADERS}


def _body(data: bytes, *, more_body: bool) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": more_body}
