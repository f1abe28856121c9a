"""What an upstream's stream of events means for its request.

    bytes ──EventCutter──▶ events ──Narration──▶ outputs: whole events, and the tokens in them

Read once the answer has begun only for what must be known: where it ends, that it failed, which
tokens it holds if the upstream says so. Knows nothing of sockets.
"""

from __future__ import annotations

import msgspec

from shoal.core.request import FinishReason
from shoal.router.upstream.bodies import UNREADABLE
from shoal.router.upstream.chunks import BadStreamError, RefusedError, check, finishes_of, tells
from shoal.router.upstream.records import UNKNOWN_TOKEN, Call

MAX_HELD_BYTES = 1024 * 1024
"""Of events before the first that tells something, or from the one that ends an answer on."""

_DONE = b"data: [DONE]\n\n"
_DONE_SIGN = b"[DONE]\n\n"
_RESPONSE_BEGINS = tuple(
    b"event: response." + each for each in (b"created", b"queued", b"in_progress")
)
_RESPONSE_ENDS = (b"event: response.completed", b"event: response.incomplete")
_CUT_SHORT = (b"length", b"max_tokens")
_BROKEN_OFF = (b"error", b"abort")
"""Reasons to end that are none."""
_CHOICES = b'"choices":['
_IDS = b',"token_ids":['
_ROLE = b'"role":"assistant",'
_TOKEN_IDS = msgspec.json.Decoder(tuple[int, ...])


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
        refusal: what it said then is the client's to read.
        preamble: how its events begin, up to their choices, if it tells ids.
    """

    def __init__(self, call: Call, model: str, *, tells_ids: bool, goes_on: bool) -> None:
        self._call, self._tells_ids, self._goes_on = call, tells_ids, goes_on
        self._names = renamings(model, call.model)
        self._has_choices = call.path.endswith("completions")
        self._has_begun = self._is_ending = False
        self._is_first, self._num_ended = True, 0
        self._held: list[bytes] = []
        self._num_held = 0
        self._held_ids: list[int] = []
        self.preamble: bytes | None = None
        self.is_done = False
        self.failure: str | None = None
        self.refusal: RefusedError | None = None
        self.finish: FinishReason = "stop"

    def take(self, events: list[bytes]) -> tuple[bytes, tuple[int, ...]]:
        """What may be passed on now, and the tokens in it; what is wrong then, is in `failure`."""
        said: list[bytes] = []
        ids: list[int] = []
        try:
            self._take(events, said, ids)
        except BadStreamError as error:
            self.failure = str(error)
            if isinstance(error, RefusedError) and not self._has_begun:
                self.refusal = error
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
                if self._has_choices and not (self._has_begun or self._num_ended):
                    raise BadStreamError("it ended before it began")
                self._flush(said, ids)
                said.append(_DONE)
                self.is_done = True
                continue
            if b'"error"' in event or not event.startswith(b"data"):
                check(event)
            if self._is_ending and self._has_choices and tells(event):
                # What looked like the end was none.
                self._is_ending = False
                self._flush(said, ids)
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
            self._has_begun = tells(event)
        for reason in finishes_of(event, self._call.num_choices):
            if reason in _BROKEN_OFF:
                raise BadStreamError(f"it ended for the reason {reason.decode()!r}")
            self._num_ended += 1
            self._is_ending = self._num_ended >= self._call.num_choices
            self.finish = "length" if reason in _CUT_SHORT else "stop"
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
            self.preamble = event[:cut]
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


def _ids(spelled: bytes) -> tuple[int, ...]:
    try:
        return _TOKEN_IDS.decode(spelled)
    except UNREADABLE as error:
        raise BadStreamError(f"token ids are {spelled[:64]!r}") from error
