"""Connections of a load generator: one for each request under way, kept for those that follow.

httpx's own pool looks at all of its connections for each one that is idle, whenever a request comes
or goes: with a thousand of them, that holds up every stream. Here the connection that was free last
is taken, or a new one. Knows nothing of what is sent.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import httpx

_ONE = httpx.Limits(max_connections=1, max_keepalive_connections=1)


class StreamTransport(httpx.AsyncBaseTransport):
    """For an `httpx.AsyncClient`; goes through no proxy."""

    def __init__(self) -> None:
        self._tls = httpx.create_ssl_context()
        self._all: list[httpx.AsyncHTTPTransport] = []
        self._idle: list[httpx.AsyncHTTPTransport] = []

    @property
    def num_connections(self) -> int:
        """That there are at most."""
        return len(self._all)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        lane = self._idle.pop() if self._idle else self._another()
        try:
            response = await lane.handle_async_request(request)
        except BaseException:
            self._idle.append(lane)
            raise
        assert isinstance(response.stream, httpx.AsyncByteStream)
        response.stream = _Lent(response.stream, lambda: self._idle.append(lane))
        return response

    async def aclose(self) -> None:
        for each in self._all:
            await each.aclose()

    def _another(self) -> httpx.AsyncHTTPTransport:
        lane = httpx.AsyncHTTPTransport(verify=self._tls, limits=_ONE)
        self._all.append(lane)
        return lane


class _Lent(httpx.AsyncByteStream):
    """A body whose connection is free when it is closed."""

    def __init__(self, body: httpx.AsyncByteStream, give_back: Callable[[], None]) -> None:
        self._body, self._give_back = body, give_back
        self._is_open = True

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for part in self._body:
            yield part

    async def aclose(self) -> None:
        if self._is_open:
            self._is_open = False
            try:
                await self._body.aclose()
            finally:
                self._give_back()
