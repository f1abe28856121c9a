"""Clients that never end what they ask: their connections close, and others' stay."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator

import pytest
import uvicorn
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from test_upstreams import in_loop
from upstream_fakes import until
from uvicorn.server import ServerState

from shoal.server import bounded_http
from shoal.server.bounded_http import MAX_HEAD_BYTES, BoundedHttp
from shoal.server.hang_up import unless_hung_up
from shoal.server.sse import EventStream

HEAD = b"POST / HTTP/1.1\r\nhost: x\r\n"


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes half a minute otherwise."""
    limits = {"HEAD_S": 0.2, "QUIET_S": 0.2, "UNREAD_S": 0.2, "_LOOK_S": 0.02}
    for name, seconds in limits.items():
        monkeypatch.setattr(bounded_http, name, seconds)


async def _app(scope: Scope, receive: Receive, send: Send) -> None:
    """Says how long a body was; slowly, if the path says so."""
    num_bytes, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        num_bytes, more = num_bytes + len(message["body"]), message["more_body"]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    if scope["path"] == "/slow":
        for _ in range(6):
            await send({"type": "http.response.body", "body": b".", "more_body": True})
            await asyncio.sleep(0.1)
    await send({"type": "http.response.body", "body": b"%d bytes" % num_bytes, "more_body": False})


@contextlib.asynccontextmanager
async def _connected(
    app: ASGIApp = _app, state: ServerState | None = None
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    config = uvicorn.Config(app, access_log=False, log_config=None, ws="none")
    config.load()
    state = state or ServerState()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: BoundedHttp(config, state, {}), "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    try:
        yield reader, writer
    finally:
        writer.close()
        server.close()


async def _all(reader: asyncio.StreamReader) -> bytes:
    """Until the connection closes."""
    async with asyncio.timeout(30):
        return await reader.read()


@pytest.mark.parametrize(
    "said", [b"", HEAD, HEAD + b"content-length: 9\r\n\r\nhalf", b"GET / HTTP/1.1\r\n\r\nGET"]
)
@in_loop
async def test_who_does_not_end_what_he_asks_is_not_waited_for(said: bytes) -> None:
    async with _connected() as (reader, writer):
        writer.write(said)
        answer = await _all(reader)
    assert answer.startswith(b"HTTP/1.1 200" if said.startswith(b"GET") else b"")
    assert answer.count(b"HTTP/1.1") == said.startswith(b"GET")


@in_loop
async def test_a_head_that_trickles_has_no_more_time() -> None:
    async with _connected() as (reader, writer):
        reading = asyncio.create_task(_all(reader))
        writer.write(HEAD)
        while not reading.done():
            with contextlib.suppress(ConnectionError):
                writer.write(b"x: y\r\n")
            await asyncio.sleep(0.02)
        with contextlib.suppress(ConnectionError):
            assert await reading == b""


@pytest.mark.parametrize("endless", [b"x: " + b"y" * 9000, b"x: y\r\n" * 1000])
@in_loop
async def test_a_head_without_end_is_refused(endless: bytes) -> None:
    async with _connected() as (reader, writer):
        writer.write(HEAD)
        num_bytes = 0
        answer = asyncio.create_task(reader.readline())
        while not answer.done():
            assert num_bytes < 64 * MAX_HEAD_BYTES
            with contextlib.suppress(ConnectionError):
                writer.write(endless)
                await writer.drain()
            num_bytes += len(endless)
            await asyncio.sleep(0)
        # What was sent on meanwhile may lose the answer, as TCP has it.
        with contextlib.suppress(ConnectionError):
            assert (await answer).startswith(b"HTTP/1.1 431")


@in_loop
async def test_work_for_a_client_that_hangs_up_is_given_up_and_no_other() -> None:
    given_up, done = asyncio.Event(), asyncio.Event()

    async def work(scope: Scope) -> None:
        try:
            await asyncio.sleep(600 if scope["path"] == "/long" else 0.05)
        except asyncio.CancelledError:
            given_up.set()
            raise
        done.set()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await unless_hung_up(scope, receive, work(scope))
        assert not asyncio.current_task().cancelling()  # type: ignore[union-attr]
        if done.is_set():
            await _app(scope, receive, send)

    async with _connected(app) as (reader, writer):
        writer.write(b"GET / HTTP/1.1\r\n\r\n")
        await reader.readuntil(b"0 bytes\r\n0\r\n\r\n")
        assert done.is_set()
        assert not given_up.is_set()
        done.clear()
        writer.write(b"GET /long HTTP/1.1\r\n\r\n")
        await asyncio.sleep(0.05)
        writer.transport.abort()
        await asyncio.wait_for(given_up.wait(), 30)
        assert not done.is_set()


@in_loop
async def test_slow_answers_and_bodies_that_come_by_and_by_are_none_of_this() -> None:
    async with _connected() as (reader, writer):
        writer.write(b"GET /slow HTTP/1.1\r\n\r\nGET / HTTP/1.1\r\n")  # and half of the next
        assert (await reader.readuntil(b"0 bytes\r\n0\r\n\r\n")).count(b".") >= 6
        writer.write(b"connection: close\r\n\r\n")
        assert b"0 bytes" in await _all(reader)
    async with _connected() as (reader, writer):
        writer.write(HEAD + b"content-length: 10\r\nconnection: close\r\n\r\n")
        for _ in range(10):
            await asyncio.sleep(0.05)
            writer.write(b"x")
        assert b"10 bytes" in await _all(reader)


BIG = b"x" * 2**20


async def _stream(scope: Scope, receive: Receive, send: Send) -> None:
    async def events() -> AsyncGenerator[bytes, None]:
        while True:
            yield BIG

    stream = EventStream(events(), request_id="req", stall_timeout_s=0.2)
    await stream(scope, receive, send)


async def _whole(scope: Scope, receive: Receive, send: Send) -> None:
    await Response(64 * BIG)(scope, receive, send)


@pytest.mark.parametrize("app", [_stream, _whole])
@in_loop
async def test_who_reads_nothing_keeps_no_socket(app: ASGIApp) -> None:
    """Though what he was to read still waits in it."""
    state = ServerState()
    async with _connected(app, state) as (_, writer):
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(b"GET / HTTP/1.1\r\nconnection: close\r\n\r\n")
        await until(lambda: bool(state.connections))
        await until(lambda: not state.connections)
        await until(lambda: not state.tasks)


@in_loop
async def test_who_reads_slowly_gets_all_of_what_is_left() -> None:
    state = ServerState()
    async with _connected(_whole, state) as (reader, writer):
        writer.write(b"GET / HTTP/1.1\r\nconnection: close\r\n\r\n")
        num_bytes = 0
        while piece := await reader.read(2**20):
            num_bytes += len(piece)
            await asyncio.sleep(0.01)
        assert num_bytes > len(64 * BIG)
        await until(lambda: not state.connections)


@in_loop
async def test_with_another_server_a_stalled_stream_ends_and_its_task_is_nobodys_to_end() -> None:
    never = asyncio.Event()

    async def send(message: object) -> None:
        await never.wait()

    async def receive() -> Message:
        await never.wait()
        return {"type": "http.disconnect"}

    async with asyncio.timeout(30):
        await _stream({"type": "http"}, receive, send)
    assert asyncio.current_task().cancelling() == 0  # type: ignore[union-attr]
