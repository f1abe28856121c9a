"""One attempt at a request, by one upstream: its response's bytes to outputs, or why there is none.

A client's mistake is the client's to read: such a status is passed on with its body. Whatever
else goes wrong is the upstream's, and another one may be asked. Knows nothing of connections but
that they can be held back and dropped.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import msgspec

from shoal.core.request import ErrorInfo
from shoal.router.upstream.bodies import UNREADABLE
from shoal.router.upstream.connection import Connection
from shoal.router.upstream.records import UNKNOWN_TOKEN, ProxiedOutput, ProxiedRequest
from shoal.router.upstream.stream_events import (
    BadStreamError,
    EventCutter,
    Narration,
    renamed,
    renamings,
)

MAX_BODY_BYTES = 64 * 1024 * 1024
MAX_ERROR_BYTES = 1024 * 1024
_MAX_RETRY_AFTER_S = 600.0
_NOT_THE_CLIENTS = frozenset({401, 402, 403, 407, 408, 421, 425, 429})
"""Among 4xx: about us, or about now."""


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
        tells_ids: it was asked to say its tokens.
    """

    def __init__(
        self,
        request: ProxiedRequest,
        told: Told,
        limits: UpstreamLimits,
        *,
        name: str,
        model: str,
        tells_ids: bool,
    ) -> None:
        self.request, self._call = request, request.call
        self._told, self._limits, self._name, self._model = told, limits, name, model
        self._tells_ids = tells_ids and self._call.may_continue
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
        self._is_settled = False
        self._heard_s = self._loop.time()
        self._timer = self._loop.call_later(limits.answer_s, self._look)

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
                self._model,
                tells_ids=self._tells_ids,
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
        if narration.failure is not None:
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
        data, num_tokens = b"".join(self._parts), 0
        if self._status >= 500 or self._status in _NOT_THE_CLIENTS:
            self._refused()
            return
        if self._status < 300:
            answer = _read(data)
            if answer is None:
                self.fail(f"answered {data[:64]!r}, which is not a JSON object")
                return
            if bytes(answer.error) not in _NO_ERROR:
                said = bytes(answer.error)[:300].decode(errors="replace")
                self.fail(f"answered {self._status} with an error: {said}")
                return
            num_tokens = _num_tokens(answer.usage)
            data = renamed(data, renamings(self._model, self._call.model))
        self._say(
            ProxiedOutput(
                request_id=self.request.request_id,
                token_ids=(UNKNOWN_TOKEN,) * num_tokens,
                data=data,
                status=self._status,
                finish="stop",
            )
        )

    def _refused(self) -> None:
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


class _Usage(msgspec.Struct):
    completion_tokens: int = 0
    output_tokens: int = 0


class _Whole(msgspec.Struct):
    """Any JSON object: decoding it reads all of the text."""

    usage: msgspec.Raw = msgspec.Raw(b"{}")
    error: msgspec.Raw = msgspec.Raw(b"null")


_WHOLE = msgspec.json.Decoder(_Whole)
_USAGE = msgspec.json.Decoder(_Usage)
_NO_ERROR = (b"null", b"{}", b"false", b'""')
_MAX_TOKENS = 65536


def _read(data: bytes) -> _Whole | None:
    """None: it is no JSON object."""
    try:
        return _WHOLE.decode(data)
    except UNREADABLE:
        return None


def _num_tokens(said: msgspec.Raw) -> int:
    """Of an answer that says so."""
    try:
        usage = _USAGE.decode(said)
    except UNREADABLE:
        return 0
    return min(max(usage.completion_tokens, usage.output_tokens, 0), _MAX_TOKENS)


def _seconds(value: bytes) -> float | None:
    """Of a Retry-After header that says seconds."""
    if not value.isdigit() or len(value) > 9:
        return None
    return min(float(value), _MAX_RETRY_AFTER_S)
