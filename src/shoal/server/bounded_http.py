"""uvicorn's HTTP with bounds on what a client may take to ask: of bytes in a head, of time; and to
read the rest of what it was sent once its connection is to close. It says when a client hangs up.

Without them heads that never end fill memory, and those that never come hold their sockets, as do
answers that nobody reads: a transport that closes first sends what it has. Knows nothing of what
is asked; answers on their way are others' to bound.
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from shoal.server.hang_up import HANG_UP, HangUp

MAX_HEAD_BYTES = 64 * 1024
"""Beyond which a head is read no further; one that comes at once may be as long as one read."""
HEAD_S, QUIET_S = 30.0, 30.0
"""For a head, since the connection or its first byte came; without a byte, in a body."""
UNREAD_S = 60.0
"""Without a byte that is read of what is left when the connection closes."""
_LOOK_S = 5.0
_TOO_LONG = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\n"
    b"content-length: 0\r\nconnection: close\r\n\r\n"
)


class BoundedHttp(HttpToolsProtocol):
    """One connection of a client."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._asked_s = self._heard_s = self.loop.time()
        self._num_head_bytes = 0
        self._is_in_head = self._is_asking = True
        self._unread, self._read_s = 0, 0.0
        self._hang_up = HangUp(transport.abort)
        self._look_timer = self.loop.call_later(_LOOK_S, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        self._look_timer.cancel()
        super().connection_lost(exc)
        self._hang_up.comes()

    def data_received(self, data: bytes) -> None:
        self._heard_s = self.loop.time()
        super().data_received(data)
        if self._is_in_head:
            self._num_head_bytes += len(data)
            if self._num_head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
                self.transport.write(_TOO_LONG)
                self.transport.close()

    def on_message_begin(self) -> None:
        self._is_in_head = self._is_asking = True
        self._asked_s, self._num_head_bytes = self._heard_s, 0
        super().on_message_begin()
        self.scope["state"][HANG_UP] = self._hang_up

    def on_headers_complete(self) -> None:
        self._is_in_head = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._is_asking = False
        super().on_message_complete()

    def _look(self) -> None:
        now = self.loop.time()
        if not self.transport.is_closing() and self._takes_too_long(now):
            self.transport.close()
        if self.transport.is_closing():
            unread = self.transport.get_write_buffer_size()
            if unread == 0:
                return  # it is closed, or another protocol's, as a websocket's
            if unread != self._unread:
                self._unread, self._read_s = unread, now
            elif now - self._read_s > UNREAD_S:
                self.transport.abort()
                return
        self._look_timer = self.loop.call_later(_LOOK_S, self._look)

    def _takes_too_long(self, now: float) -> bool:
        if not self._is_asking or self.flow.read_paused:
            return False
        if not self._is_in_head:
            return now - self._heard_s > QUIET_S
        # Who has begun to ask again while it is answered may take its time.
        cycle: RequestResponseCycle | None = self.cycle
        is_answered = cycle is not None and not cycle.response_complete
        return not is_answered and now - self._asked_s > HEAD_S
