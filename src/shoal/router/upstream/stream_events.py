"""Server-sent events of an upstream: cut into whole ones, and what each means for its request.

    bytes ──EventCutter──▶ events ──Narration──▶ outputs: whole events, and the tokens in them

Read once the answer has begun only for what must be known: where it ends, that it failed, which
tokens it holds if the upstream says so. Knows nothing of sockets.
"""

from __future__ import annotations

from typing import Any

import msgspec

from shoal.core.request import FinishReason
from shoal.router.upstream.bodies import UNREADABLE
from shoal.router.upstream.records import UNKNOWN_TOKEN, Call

MAX_EVENT_BYTES = 1024 * 1024
MAX_HELD_BYTES = 1024 * 1024
"""Of events before the first that tells something, or from the one that ends an answer on."""

_END = b"\n\n"
_DONE = b"data: [DONE]\n\n"
_DONE_SIGN = b"[DONE]\n\n"
_FAILED = (
    *(b'data: {"error"', b'data:{"error"', b'data: {"object":"error"'),
    *(b"event: error", b"event: response.failed"),
)
_FINISHES = (b'"finish_reason":"', b'"finish_reason": "')
_RESPONSE_BEGINS = tuple(
    b"event: response." + each for each in (b"created", b"queued", b"in_progress")
)
_RESPONSE_ENDS = (b"event: response.completed", b"event: response.incomplete")
_CHOICES = b'"choices":['
_IDS = b',"token_ids":['
_ROLE = b'"role":"assistant",'


class BadStreamError(Exception):
    """An upstream's stream that cannot be what was asked for; the message says why."""


class EventCutter:
    """Whole events, out of bytes that come in any pieces. Lines may end in \\n or \\r\\n."""

    __slots__ = ("_rest",)

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """Events that are whole now, each ending in an empty line; comments are dropped.

        Raises:
            BadStreamError: an event is too long.
        """
        if self._rest:
            data = self._rest + data
        if b"\r" in data:
            # The last \r may be half of a line's end.
            kept = b"\r" if data.endswith(b"\r") else b""
            data = data.removesuffix(b"\r").replace(b"\r\n", b"\n") + kept
        *whole, self._rest = data.split(_END)
        if len(self._rest) > MAX_EVENT_BYTES:
            raise BadStreamError(f"an event is longer than {MAX_EVENT_BYTES} bytes")
        return [each + _END for each in map(_lines, whole) if each]


def _lines(event: bytes) -> bytes:
    """Without comments, which servers send to keep a connection open, and empty lines before."""
    if event.startswith(b"data: "):
        return event
    lines = event.split(b"\n")
    return b"\n".join(line for line in lines if line and not line.startswith(b":"))


class Narration:
    """What one attempt's stream says, event by event.

    Until something was told of an answer, nothing is passed on, so that another upstream may
    still begin it. What ends an answer is passed on when the stream is whole, so that one that
    breaks just before its end can still be ended rightly.

    Args:
        model: as the upstream calls it; the client reads its own name of it.
        tells_ids: each event names its tokens.
        goes_on: the client has the beginning from another upstream.

    Attributes:
        is_done: all was told; `finish`: why the answer ended.
        failure: the stream is not, or no longer, what was asked for.
    """

    def __init__(self, call: Call, model: str, *, tells_ids: bool, goes_on: bool) -> None:
        self._call, self._tells_ids, self._goes_on = call, tells_ids, goes_on
        self._names = renamings(model, call.model)
        self._has_choices = call.path.endswith("completions")
        self._has_begun = self._is_ending = False
        self._is_first = True
        self._held: list[bytes] = []
        self._num_held = 0
        self._held_ids: list[int] = []
        self.is_done = False
        self.failure: str | None = None
        self.finish: FinishReason = "stop"

    def take(self, events: list[bytes]) -> tuple[bytes, tuple[int, ...]]:
        """What may be passed on now, and the tokens in it; what is wrong then, is in `failure`."""
        said: list[bytes] = []
        ids: list[int] = []
        try:
            self._take(events, said, ids)
        except BadStreamError as error:
            self.failure = str(error)
        return b"".join(said), tuple(ids)

    def end(self) -> tuple[bytes, tuple[int, ...]]:
        """The response is over, and whole as HTTP counts it."""
        if self.is_done:
            return b"", ()
        if not self._is_ending:
            self.failure = "it ended early"
            return b"", ()
        said: list[bytes] = []
        ids: list[int] = []
        self._flush(said, ids)
        if self._has_choices:
            said.append(_DONE)
        self.is_done = True
        return b"".join(said), tuple(ids)

    def _take(self, events: list[bytes], said: list[bytes], ids: list[int]) -> None:
        for event in events:
            if self.is_done:
                raise BadStreamError("events come after the end")
            if event.endswith(_DONE_SIGN):
                self._flush(said, ids)
                said.append(_DONE)
                self.is_done = True
                continue
            if event.startswith(_FAILED):
                raise BadStreamError(f"it says: {_complaint(event)}")
            event, tokens = self._read(event)
            if self._is_ending or not self._has_begun:
                self._hold(event, tokens)
            else:
                if self._held:
                    self._flush(said, ids)
                said.append(event)
                ids += tokens

    def _read(self, event: bytes) -> tuple[bytes, tuple[int, ...]]:
        tokens: tuple[int, ...] = (UNKNOWN_TOKEN,)
        if self._names:
            event = renamed(event, self._names)
        if not self._has_choices:
            self._has_begun = self._has_begun or not event.startswith(_RESPONSE_BEGINS)
            self._is_ending = event.startswith(_RESPONSE_ENDS)
            return event, tokens
        if not self._has_begun:
            self._has_begun = _tells(event)
        # Of several choices none is held: others still run when one ends.
        if self._call.num_choices == 1:
            for sign in _FINISHES:
                if (at := event.find(sign)) >= 0:
                    self._is_ending = True
                    if event.startswith(b"length", at + len(sign)):
                        self.finish = "length"
        if self._tells_ids:
            event, tokens = self._with_ids(event)
        return event, tokens

    def _with_ids(self, event: bytes) -> tuple[bytes, tuple[int, ...]]:
        """An event of shoal's, which has the ids last in its only choice."""
        tokens: tuple[int, ...] = ()
        start = event.rfind(_IDS)
        if start >= 0:
            stop = event.find(b"]", start)
            tokens = _ids(event[start + len(_IDS) - 1 : stop + 1])
            if not self._call.shows_ids:
                event = event[:start] + event[stop + 1 :]
        cut = event.find(_CHOICES)
        if cut < 0:
            raise BadStreamError("an event has no choices")
        if self._goes_on and self._call.preamble is not None:
            event = self._call.preamble + event[cut:].replace(_ROLE, b"", 1)
        elif self._is_first:
            self._call.preamble = event[:cut]
        self._is_first = False
        return event, tokens

    def _hold(self, event: bytes, tokens: tuple[int, ...]) -> None:
        self._held.append(event)
        self._held_ids += tokens if self._tells_ids or self._is_ending else ()
        self._num_held += len(event)
        if self._num_held > MAX_HELD_BYTES:
            raise BadStreamError(f"{self._num_held} bytes came that tell nothing of an answer")

    def _flush(self, said: list[bytes], ids: list[int]) -> None:
        said += self._held
        ids += self._held_ids
        self._held, self._held_ids, self._num_held = [], [], 0


def renamings(theirs: str, ours: str) -> list[tuple[bytes, bytes]]:
    """How a model's name begins in JSON, and how it shall stand; nothing if it is the same."""
    if theirs == ours:
        return []
    begins, stands = msgspec.json.encode(theirs)[:-1], msgspec.json.encode(ours)
    return [(sign + begins, sign + stands) for sign in (b'"model":', b'"model": ')]


def renamed(data: bytes, names: list[tuple[bytes, bytes]]) -> bytes:
    """With the first name replaced, which may have grown: asked for X, some say X@main."""
    for old, new in names:
        start = data.find(old)
        if start >= 0:
            end = data.find(b'"', start + len(old))
            return data[:start] + new + data[end + 1 :] if end >= 0 else data
    return data


class _Choice(msgspec.Struct):
    delta: dict[str, Any] = {}
    text: str = ""
    finish_reason: str | None = None
    token_ids: list[int] = []


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []


_CHUNK = msgspec.json.Decoder(_Chunk)
_TOKEN_IDS = msgspec.json.Decoder(tuple[int, ...])
_QUIET = frozenset({"role"})


def _tells(event: bytes) -> bool:
    """Whether an event holds some of an answer, be it text, a tool's call or a thought."""
    chunk = _parsed(event)
    return any(
        each.text
        or each.token_ids
        or any(value for key, value in each.delta.items() if key not in _QUIET)
        for each in chunk.choices
    )


def _parsed(event: bytes) -> _Chunk:
    if not event.startswith(b"data:"):
        raise BadStreamError(f"it sent {event[:64]!r}, which is no event of a completion")
    try:
        return _CHUNK.decode(event[5:].strip())
    except UNREADABLE as error:
        raise BadStreamError(f"an event is no chunk of a completion: {error}") from error


def _ids(spelled: bytes) -> tuple[int, ...]:
    try:
        return _TOKEN_IDS.decode(spelled)
    except UNREADABLE as error:
        raise BadStreamError(f"token ids are {spelled[:64]!r}") from error


def _complaint(event: bytes) -> str:
    """What an event that is an error says, for people."""
    return event.partition(b"data:")[2].strip()[:300].decode(errors="replace")
