"""One attempt at a request, by one upstream: its response's bytes to outputs, or why there is none.

A client's mistake is the client's to read: such a status is passed on with its body, as an error,
so that no other attempt's good answer is lost for it. Whatever else goes wrong is the upstream's,
and another one may be asked; so is every mistake that is found once the answer has begun. Knows
nothing of connections but that they can be held back and dropped.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import msgspec

from shoal.core.request import ErrorInfo
from shoal.router.upstream.answers import BadAnswerError, num_tokens_of
from shoal.router.upstream.chunks import NOT_THE_CLIENTS, BadStreamError
from shoal.router.upstream.connection import Connection
from shoal.router.upstream.event_cutter import EventCutter
from shoal.router.upstream.records import UNKNOWN_TOKEN, ProxiedOutput, ProxiedRequest
from shoal.router.upstream.stream_events import Narration, renamed, renamings

MAX_BODY_BYTES = 64 * 1024 * 1024
MAX_ERROR_BYTES = 1024 * 1024
_MAX_RETRY_AFTER_S = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class UpstreamLimits:
    """How long an upstream may be quiet.

    Attributes:
        answer_s: before the first byte of a response, which may come after all of the work.
        quiet_s: in the middle of one.
        end_s: after the last event, before HTTP's own end.
    """

    answer_s: float = 600.0
    quiet_s: float = 120.0
    end_s: float = 5.0


class Told(Protocol):
    """Who is told of an attempt; `settled` last, once."""

    def said(self, output: ProxiedOutput) -> None: ...

    def again(self, attempt: Attempt) -> None:
        """An idle connection had been closed; ask once more, over a new one."""
        ...

    def failed(self, attempt: Attempt, error: ErrorInfo) -> None: ...

    def held(self, attempt: Attempt, *, is_held: bool) -> None:
        """The client is slow, so that no more is read for now; or again."""
        ...

    def settled(self, attempt: Attempt) -> None: ...


class Attempt:
    """
    Args:
        name: of the upstream.
        model: as it calls it.
        continuation: whose streams it can go on with; None: nobody's.

    Attributes:
        model: the same.
        tells_ids: it is asked to say its tokens.
    """

    def __init__(
        self,
        request: ProxiedRequest,
        told: Told,
        limits: UpstreamLimits,
        *,
        name: str,
        model: str,
        continuation: str | None,
    ) -> None:
        self.request, self._call = request, request.call
        self._told, self._limits, self._name, self.model = told, limits, name, model
        self._continuation = continuation
        self.tells_ids = continuation is not None and self._call.may_continue
        self._loop = asyncio.get_running_loop()
        self._connection: Connection | None = None
        self._status = 0
        self._retry_after_s: float | None = None
        self._type = b""
        self._cutter: EventCutter | None = None
        self._narration: Narration | None = None
        self._events: list[bytes] = []
        self._parts: list[bytes] = []
        self._num_bytes = 0
        self._is_settled = self._has_said = False
        self._heard_s = self._loop.time()
        # A response may begin soon, and then has less time.
        self._timer = self._loop.call_later(min(limits.answer_s, limits.quiet_s), self._look)

    @property
    def has_heard(self) -> bool:
        """Whether a response has begun."""
        return self._status > 0

    def begin(self, connection: Connection, request: bytes) -> None:
        if self._is_settled:
            connection.abort()
            return
        self._connection = connection
        connection.ask(self, request)

    def drop(self) -> None:
        """Nobody wants it any more."""
        self._settle()
        if self._connection is not None:
            self._connection.abort()

    def fail(self, message: str, **more: object) -> None:
        """Another upstream may be asked."""
        if self._is_settled:
            return
        error = msgspec.convert(
            {"status": 502, "code": "upstream_failed", "message": self._about(message), **more},
            ErrorInfo,
        )
        self.drop()
        self._told.failed(self, error)

    # --- what a connection says ---

    def head(self, status: int, headers: Mapping[bytes, bytes]) -> None:
        self._heard_s, self._status = self._loop.time(), status
        self._type = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        self._retry_after_s = _seconds(headers.get(b"retry-after", b""))
        encoding = headers.get(b"content-encoding", b"identity").lower()
        if encoding != b"identity":
            self.fail(f"answered with the encoding {encoding[:32]!r}, which was not asked for")
        elif 300 <= status < 400:
            self.fail(f"answered {status}: redirects are not followed; name where it leads to")
        elif status < 300 and self._call.is_stream:
            if self._type != b"text/event-stream":
                self.fail(f"answered with {self._type[:64]!r} in place of a stream of events")
            self._cutter = EventCutter()
            self._narration = Narration(
                self._call,
                self.model,
                tells_ids=self.tells_ids,
                goes_on=bool(self.request.output_ids),
            )

    def body(self, data: bytes) -> None:
        if self._is_settled:
            if self._connection is not None:
                self._connection.abort()  # it goes on after its end
            return
        if self._cutter is not None:
            try:
                self._events += self._cutter.feed(data)
            except BadStreamError as error:
                self.flush()
                self.fail(f"broke its stream: {error}")
            return
        self._parts.append(data)
        self._num_bytes += len(data)
        limit = MAX_BODY_BYTES if self._status < 300 else MAX_ERROR_BYTES
        if self._num_bytes > limit:
            self.fail(f"answered with more than {limit} bytes")

    def flush(self) -> None:
        self._heard_s = self._loop.time()
        narration, events = self._narration, self._events
        if narration is None or not events:
            return
        self._events = []
        self._tell(narration, *narration.take(events))

    def over(self) -> None:
        # From now on the connection is somebody else's.
        self._connection = None
        self._timer.cancel()
        narration = self._narration
        if narration is None:
            self._whole()
            return
        if self._cutter is not None:
            self._events += self._cutter.end()
        self.flush()
        if not self._is_settled:
            self._tell(narration, *narration.end())

    def broken(self, reason: str) -> None:
        connection = self._connection
        is_stale = connection is not None and not connection.is_fresh
        if is_stale and not self.has_heard and not self._is_settled:
            self._told.again(self)
            return
        # What came before is news all the same.
        self.flush()
        if not self._is_settled:
            self.fail(reason)

    # ---

    def _tell(self, narration: Narration, data: bytes, token_ids: tuple[int, ...]) -> None:
        if data and not self._has_said:
            # Now the router drops all other attempts, or this one.
            self._has_said = True
            if not self.request.output_ids:
                continuation = self._continuation if self.tells_ids else None
                self._call.begin(continuation, narration.preamble)
        if narration.is_done:
            self._say(
                ProxiedOutput(
                    request_id=self.request.request_id,
                    token_ids=token_ids,
                    data=data,
                    finish=narration.finish,
                )
            )
            # HTTP's own end may still be to come.
            if self._connection is not None:
                self._timer = self._loop.call_later(self._limits.end_s, self._connection.abort)
        elif data:
            self._say(
                ProxiedOutput(request_id=self.request.request_id, token_ids=token_ids, data=data)
            )
        if narration.refusal is not None:
            self._refuse(narration.refusal.status, narration.refusal.body)
        elif narration.failure is not None:
            self.fail(f"broke its stream: {narration.failure}")

    def _say(self, output: ProxiedOutput) -> None:
        backlog = self._call.backlog
        backlog.put(len(output.data))
        if output.finish is not None:
            self._settle()
        self._told.said(output)
        if backlog.is_long and not self._is_settled and self._connection is not None:
            self._connection.pause()
            self._told.held(self, is_held=True)
            backlog.when_short(self._resume)

    def _resume(self) -> None:
        self._heard_s = self._loop.time()
        if self._connection is not None:
            self._told.held(self, is_held=False)
            self._connection.resume()

    def _whole(self) -> None:
        """A response that is no stream has come."""
        if self._is_settled:
            return
        data = b"".join(self._parts)
        if self._status >= 500 or self._status in NOT_THE_CLIENTS:
            self._unable()
            return
        if self._status >= 300:
            self._refuse(self._status, data)
            return
        try:
            num_tokens = num_tokens_of(data)
        except BadAnswerError as error:
            self.fail(f"answered {self._status} with {error}")
            return
        data = renamed(data, renamings(self.model, self._call.model))
        self._say(
            ProxiedOutput(
                request_id=self.request.request_id,
                token_ids=(UNKNOWN_TOKEN,) * num_tokens,
                data=data,
                status=self._status,
                finish="stop",
            )
        )

    def _refuse(self, status: int, data: bytes) -> None:
        """It is the client's mistake, as far as this upstream can tell."""
        if self._is_settled:
            return
        if self.request.output_ids:
            # What has begun was no mistake.
            self.fail(f"answered {status} to what it was to go on with")
            return
        error = ErrorInfo(
            status=status, code=f"upstream_{status}", message=self._about(f"answered {status}")
        )
        self._say(
            ProxiedOutput(
                request_id=self.request.request_id,
                data=data or b"{}",
                status=status,
                finish="error",
                error=error,
            )
        )
        if self._connection is not None:  # which may go on
            self._connection.abort()

    def _unable(self) -> None:
        status = self._status
        message = f"answered {status}"
        if status in (429, 503):
            code = "upstream_busy" if status == 429 else "upstream_unavailable"
            self.fail(message, status=status, code=code, retry_after_s=self._retry_after_s or 1.0)
        elif status in (401, 403):
            self.fail(f"{message}: it wants another key; see --upstream-key", code="upstream_key")
        else:
            self.fail(message)

    def _about(self, message: str) -> str:
        return f"the upstream {self._name} {message}"

    def _settle(self) -> None:
        if not self._is_settled:
            self._is_settled = True
            self._timer.cancel()
            self._told.settled(self)

    def _look(self) -> None:
        now = self._loop.time()
        limit_s = self._limits.quiet_s if self.has_heard else self._limits.answer_s
        # Who is held back has nothing to say.
        since = now if self._call.backlog.is_long else self._heard_s
        if now - since >= limit_s:
            self.fail(f"said nothing for {limit_s:g} s", status=504, code="upstream_timeout")
        else:
            wait_s = min(since + limit_s - now, self._limits.quiet_s)
            self._timer = self._loop.call_later(wait_s, self._look)


def _seconds(value: bytes) -> float | None:
    """Of a Retry-After header that says seconds."""
    if not value.isdigit() or len(value) > 9:
        return None
    return min(float(value), _MAX_RETRY_AFTER_S)
