"""One HTTP/1.1 connection to an upstream: a request at a time, its response in pieces as they come.

Everything that is read has a bound, and nothing a response says makes us ask elsewhere: a redirect
is only a status. A connection that a response left in doubt is not used again. httptools parses,
which does so in C; no task is woken for a piece. Knows nothing of what bodies mean.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from collections.abc import Mapping
from typing import Protocol, cast

import httptools

from shoal.router.upstream.address import Address

MAX_HEAD_BYTES = 64 * 1024
CONNECT_TIMEOUT_S = 5.0
_MAX_IDLE = 256
_IDLE_S = 20.0
"""Shorter than servers keep idle connections, for the most part."""


class Exchange(Protocol):
    """Who reads one response. `over` or `broken` is the last that it hears."""

    def head(self, status: int, headers: Mapping[bytes, bytes]) -> None: ...

    def body(self, data: bytes) -> None: ...

    def flush(self) -> None:
        """That was all there is for now; several pieces may have come at once."""
        ...

    def over(self) -> None:
        """The response is whole."""
        ...

    def broken(self, reason: str) -> None:
        """No more of it will come; `reason`: what the upstream did, without its name."""
        ...


class Connection(asyncio.Protocol):
    """
    Attributes:
        is_fresh: nothing was asked over it before.
    """

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._transport: asyncio.Transport | None = None
        self._exchange: Exchange | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._headers: dict[bytes, bytes] = {}
        self._num_head_bytes = 0
        self._status = 0  # 0: no head yet
        self._is_over = self._is_overrun = self._keeps_alive = False
        self.is_fresh = True
        self.idle_since = 0.0

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def ask(self, exchange: Exchange, request: bytes) -> None:
        """Send a request, head and body; the exchange hears what comes back."""
        assert self._transport is not None
        self._exchange = exchange
        self._parser = httptools.HttpResponseParser(self)
        self._headers, self._num_head_bytes, self._status = {}, 0, 0
        self._is_over = self._is_overrun = self._keeps_alive = False
        self._transport.write(request)

    def abort(self) -> None:
        """Nobody wants the response any more; the upstream sees that too."""
        self._exchange = None
        if self._transport is not None:
            self._transport.abort()

    def pause(self) -> None:
        if self.is_open:
            cast(asyncio.Transport, self._transport).pause_reading()

    def resume(self) -> None:
        if self.is_open:
            cast(asyncio.Transport, self._transport).resume_reading()

    # --- asyncio's ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self._exchange is None or self._parser is None:
            self.abort()  # nothing was asked
            return
        if not self._status:
            self._num_head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._break("switched protocols in its response")
        except httptools.HttpParserError as error:
            self._break(f"answered with what is not HTTP: {error.__context__ or error}")
        if not self._status and self._num_head_bytes > MAX_HEAD_BYTES:
            self._break(f"answered with more than {MAX_HEAD_BYTES} bytes of headers")
        if self._is_over:
            self._settle()
        elif self._exchange is not None:
            self._exchange.flush()

    def eof_received(self) -> None:
        # A body without a length ends here.
        is_open_ended = self._status and not (
            b"content-length" in self._headers or b"transfer-encoding" in self._headers
        )
        if self._exchange is not None and is_open_ended:
            exchange, self._exchange = self._exchange, None
            exchange.over()

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._pool.forget(self)
        self._break("closed the connection" if error is None else f"lost its connection: {error}")

    # --- httptools' ---

    def on_message_begin(self) -> None:
        self._is_overrun = self._is_over

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        assert self._parser is not None
        status = self._parser.get_status_code()
        if status < 200:  # only a beginning
            self._headers = {}
        elif self._exchange is not None and not self._is_over:
            self._status = status
            self._keeps_alive = self._parser.should_keep_alive()
            self._exchange.head(status, self._headers)

    def on_body(self, data: bytes) -> None:
        if self._exchange is not None and not self._is_over:
            self._exchange.body(data)

    def on_message_complete(self) -> None:
        self._is_over = self._status > 0

    # ---

    def _settle(self) -> None:
        """After a whole response, when its parser is done with all that came."""
        exchange, self._exchange = self._exchange, None
        self.is_fresh, self._parser = False, None
        if exchange is None:
            return
        if self._keeps_alive and not self._is_overrun and self.is_open:
            self._pool.put(self)
        elif self._transport is not None:
            self._transport.close()
        exchange.over()

    def _break(self, reason: str) -> None:
        exchange, self._exchange = self._exchange, None
        if self._transport is not None:
            self._transport.abort()
        if exchange is not None:
            exchange.broken(reason)


class Pool:
    """Connections to one upstream; those that are idle are used again for a while."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._tls = ssl.create_default_context() if address.is_tls else None
        self._idle: deque[Connection] = deque()
        self._open: set[Connection] = set()

    def idle(self) -> Connection | None:
        """The one that was used last, if it may still be open."""
        now = asyncio.get_running_loop().time()
        while self._idle:
            found = self._idle.pop()
            if found.is_open and now - found.idle_since < _IDLE_S:
                return found
            found.abort()
        return None

    async def connect(self) -> Connection:
        """A new one.

        Raises:
            OSError: nobody answers there; TimeoutError is one too.
        """
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            _, connection = await loop.create_connection(
                lambda: Connection(self), self._address.host, self._address.port, ssl=self._tls
            )
        self._open.add(connection)
        return connection

    def put(self, connection: Connection) -> None:
        """It is idle now."""
        if len(self._idle) >= _MAX_IDLE:
            connection.abort()
            return
        connection.idle_since = asyncio.get_running_loop().time()
        self._idle.append(connection)

    def forget(self, connection: Connection) -> None:
        self._open.discard(connection)

    def close(self) -> None:
        self._idle.clear()
        for each in list(self._open):
            each.abort()
