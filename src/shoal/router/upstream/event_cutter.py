"""Server-sent events of an upstream, cut into whole ones as their bytes come.

Knows nothing of what they say but whether they say anything.
"""

from __future__ import annotations

from shoal.router.upstream.chunks import BadStreamError, is_whole

MAX_EVENT_BYTES = 1024 * 1024

_END = b"\n\n"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


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

    def end(self) -> list[bytes]:
        """The last event, of servers that leave out the empty line behind it."""
        rest, self._rest = _lines(self._rest.replace(b"\r", b"")), b""
        return [rest + _END] if is_whole(rest) else []


def _lines(event: bytes) -> bytes:
    """Without comments, which servers send to keep a connection open; empty if nothing is left."""
    if event.startswith(b"data: {"):
        return event
    lines = event.removeprefix(_BYTE_ORDER_MARK).split(b"\n")
    lines = [line.rstrip() for line in lines if line and not line.startswith(b":")]
    return b"\n".join(lines) if any(map(_says_something, lines)) else b""


def _says_something(line: bytes) -> bool:
    """A type, an id or a pause alone is not for whoever reads a completion."""
    name, _, value = line.partition(b":")
    return bool(value.strip()) if name == b"data" else name not in (b"id", b"retry", b"event")
