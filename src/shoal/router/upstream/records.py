"""A request whose text an upstream turns into tokens, and the bytes that come back for it.

To the router they are requests and outputs like any others. What stands for the prompt's tokens
is made of its text, four bytes each: enough to tell how long it is, and which others begin alike.
Knows nothing of sockets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

from msgspec import Raw

from shoal.core.request import GenerateRequest, Output

MAX_BACKLOG_BYTES = 256 * 1024
"""That wait for a client before its upstream is read no further."""

BYTES_PER_TOKEN = 4
"""Of English text and of JSON around it, about."""

UNKNOWN_TOKEN = 0
"""Stands for each event of an upstream that does not say which tokens it holds."""


class Backlog:
    """Bytes that wait for one client; when there are many, reading its upstream is put off."""

    __slots__ = ("_num_bytes", "_resume")

    def __init__(self) -> None:
        self._num_bytes = 0
        self._resume: Callable[[], None] | None = None

    def put(self, num_bytes: int) -> None:
        self._num_bytes += num_bytes

    def took(self, num_bytes: int) -> None:
        self._num_bytes -= num_bytes
        if self._resume is not None and self._num_bytes <= MAX_BACKLOG_BYTES // 2:
            resume, self._resume = self._resume, None
            resume()

    @property
    def is_long(self) -> bool:
        return self._num_bytes > MAX_BACKLOG_BYTES

    def when_short(self, resume: Callable[[], None]) -> None:
        """Call it once the client has caught up."""
        self._resume = resume


@dataclass(slots=True, kw_only=True)
class Call:
    """One HTTP request, which all attempts at it share.

    Attributes:
        path: of the endpoint, such as /v1/chat/completions.
        fields: of the body; their values as they were spelled.
        model: as the client called it.
        is_stream: answered in events.
        num_choices: that one answer holds.
        may_continue: an upstream that says its tokens can be followed by another in mid-stream.
        shows_ids: the client asked for token ids itself.
        preamble: how the events that the client has begin, up to their choices.
        continuation: of the upstream that it has them from: whose likes can go on with them.
    """

    path: str
    fields: Mapping[str, Raw]
    model: str
    is_stream: bool
    num_choices: int = 1
    may_continue: bool = False
    shows_ids: bool = False
    preamble: bytes | None = None
    continuation: str | None = None
    backlog: Backlog = field(default_factory=Backlog)

    def is_of(self, continuation: str | None) -> bool:
        """Whether who says so can go on with what the client has."""
        return continuation is not None and continuation == self.continuation

    def begin(self, continuation: str | None, preamble: bytes | None) -> None:
        """The client gets its first events.

        Args:
            continuation: None: their upstream does not say which tokens they hold.
        """
        self.continuation, self.preamble = continuation, preamble
        self.may_continue = self.may_continue and continuation is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class ProxiedRequest(GenerateRequest):
    """Its prompt_ids only stand for the prompt's; its output_ids are real where an upstream
    told them."""

    call: Call

    @property
    def may_go_on(self) -> bool:
        return self.call.may_continue

    @property
    def tells_progress(self) -> bool:
        return self.call.is_stream


@dataclass(frozen=True, slots=True, kw_only=True)
class ProxiedOutput(Output):
    """
    Attributes:
        data: of the response's body; whole events of a stream.
        status: of the response, in the first one of a request that is answered as a whole. What
            an upstream refuses for the client's mistake is an error, whose data is passed on.
    """

    data: bytes = b""
    status: int = 200

    @property
    def is_refusal(self) -> bool:
        return self.error is not None and bool(self.data)

    @classmethod
    def joined(cls, outputs: Sequence[Self]) -> Self:
        # A zero-argument super() fails in a class that slots made anew.
        whole = super(ProxiedOutput, cls).joined(outputs)
        return replace(whole, data=b"".join(output.data for output in outputs))


def stand_in_ids(text: bytes) -> tuple[int, ...]:
    """For a prompt's tokens; at least one."""
    whole = len(text) - len(text) % BYTES_PER_TOKEN
    return tuple(memoryview(text)[:whole].cast("I")) or (UNKNOWN_TOKEN,)
