"""The short way of a token: from the router into the socket within one call, no task woken.

    Inbox ─Output─▶ Express.take ─▶ TextStream ─▶ {before}"text"{after} ─▶ uvicorn's transport

The long way is generation.py, respond.py and sse.py, one coroutine inside the other, woken for
every token; it begins and ends each stream. The short way is open while the long one waits for
news, for news that is text and nothing else, as long as the client keeps up. Knows nothing of
JSON's shape.
"""

from __future__ import annotations

import msgspec
from starlette.types import Send
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from shoal.core.request import Output
from shoal.observe import CompletionTimer
from shoal.router.inbox import Take
from shoal.text import TextStream

_ENCODER = msgspec.json.Encoder()
_USED = ("chunked_encoding", "flow", "disconnected", "transport")
"""Of uvicorn's; should a version of it lack one, all goes the long way."""


class Express:
    """One stream's short way; each layer of the long way tells its part, and `open` comes last.

    Attributes:
        num_tokens: of the output, that went this way.
    """

    __slots__ = (
        "_after",
        "_before",
        "_cycle",
        "_frame_bytes",
        "_text",
        "_timer",
        "num_tokens",
    )

    def __init__(self) -> None:
        self.num_tokens = 0
        self._cycle: RequestResponseCycle | None = None

    def begin(self, text: TextStream, timer: CompletionTimer) -> Take:
        """Output goes through these, whichever way it takes."""
        self._text = text
        self._timer = timer
        return self.take

    def chunks_are(self, before: bytes, after: bytes) -> None:
        """What stands around a JSON string of text in an event."""
        self._before = b"\r\ndata: " + before
        self._after = after + b"\n\n\r\n"
        # Of a chunk as HTTP counts it, without the line breaks around it.
        self._frame_bytes = len(self._before) + len(self._after) - 4

    def open(self, send: Send) -> None:
        """The first event is out, by `send`; it takes uvicorn's, and its chunked encoding."""
        self._cycle = socket_of(send)

    def take(self, output: Output, now: float) -> bool:
        """Send what `output` tells; False if that is more than text, or the client is slow."""
        cycle = self._cycle
        if (
            cycle is None
            or output.finish is not None
            or output.num_cached_tokens is not None
            or not can_write(cycle)
        ):
            return False
        num_tokens = len(output.token_ids)
        self.num_tokens += num_tokens
        self._timer.tokens(num_tokens, now)
        text = self._text.push(output.token_ids).text
        if text:
            spelled = _ENCODER.encode(text)
            cycle.transport.write(
                b"%x%b%b%b" % (self._frame_bytes + len(spelled), self._before, spelled, self._after)
            )
        return True


def socket_of(send: Send) -> RequestResponseCycle | None:
    """What uvicorn's own `send` writes a chunked body to; None: it is not to be had."""
    cycle = getattr(send, "__self__", None)
    if not isinstance(cycle, RequestResponseCycle):
        return None
    is_usable = all(hasattr(cycle, name) for name in _USED) and cycle.chunked_encoding
    return cycle if is_usable else None


def can_write(cycle: RequestResponseCycle) -> bool:
    """Whether the client is there and keeps up."""
    return not (cycle.flow.write_paused or cycle.disconnected or cycle.transport.is_closing())
