"""uvicorn's HTTP with bounds on what a client may take to ask: of bytes in a head, of time; and
which says when a client hangs up.

Without them heads that never end fill memory, and those that never come hold their sockets. Knows
nothing of what is asked; answers are others' to bound.
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from shoal.server.hang_up import HANG_UP, HangUp

MAX_HEAD_BYTES = 64 * 1024
"""Beyond which a head is read no further; one that comes at once may be as long as one read."""
HEAD_S, QUIET_S = 30.0, 30.0
"""For a head, since the connection or its first byte came; without a byte, in a body."""
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
        self._hang_up = HangUp()
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
        if self.transport.is_closing():
            return  # by a protocol that it was handed to, as a websocket
        if self._takes_too_long(self.loop.time()):
            self.transport.close()
        else:
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
