"""Upstreams that play a script over real sockets, and `shoal route`'s app before them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
import uvicorn

from shoal.core.clock import MonotonicClock
from shoal.observe import ServingMetrics
from shoal.router.driver import Router
from shoal.router.records import RouterConfig
from shoal.router.state import RouterState
from shoal.router.upstream.address import parse_address
from shoal.router.upstream.attempts import UpstreamLimits
from shoal.router.upstream.client import CheckTimes, UpstreamClient
from shoal.router.upstream.door import Door
from shoal.server import EdgeContext, ServerConfig, create_proxy_app
from shoal.server.bounded_http import BoundedHttp

TIMES = CheckTimes(every_s=60.0, timeout_s=5.0, first_retry_s=0.05, max_retry_s=0.1)
STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
)


@dataclass(frozen=True)
class Asked:
    """A request as it came over the socket."""

    method: str
    path: str
    headers: dict[str, str]
    body: dict[str, Any]


Script = Callable[[Asked, asyncio.StreamWriter], Awaitable[None]]


def chunked(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def event(text: str, model: str = "theirs", finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish}
    chunk = {"id": "c-1", "object": "chat.completion.chunk", "model": model, "choices": [choice]}
    return b"data: " + json.dumps(chunk, separators=(",", ":")).encode() + b"\n\n"


def whole(status: int, body: Any, *headers: str) -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"HTTP/1.1 {status} X", f"content-length: {len(data)}"]
    lines += [*headers, "content-type: application/json", "", ""]
    return "\r\n".join(lines).encode() + data


@dataclass
class FakeUpstream:
    """A server whose streams say "t0 t1 ...", one event each; its checks always go well.

    Attributes:
        card: more of what it says its model is.
        check: what it answers to a check.
        script: what it does with clients' requests in place of that.
        num_tokens, delay_s: of its own streams.
        asked: clients' requests.
        num_gone: of which the client hung up.
        works: otherwise checks are answered with 500.
        listens, generates: clear while what asks for its models, or to generate, waits.
    """

    model: str = "theirs"
    card: dict[str, Any] = field(default_factory=dict)
    check: Any = field(default_factory=lambda: {"choices": []})
    script: Script | None = None
    num_tokens: int = 5
    delay_s: float = 0.0
    asked: list[Asked] = field(default_factory=list)
    num_checks: int = 0
    num_gone: int = 0
    port: int = 0
    works: bool = True
    listens: asyncio.Event = field(default_factory=asyncio.Event)
    generates: asyncio.Event = field(default_factory=asyncio.Event)
    readers: list[asyncio.StreamReader] = field(default_factory=list)
    writers: list[asyncio.StreamWriter] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.listens.set()
        self.generates.set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def die(self, server: asyncio.Server) -> None:
        server.close()
        for writer in self.writers:
            writer.transport.abort()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.readers.append(reader)
        self.writers.append(writer)
        gone = ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError
        with contextlib.suppress(*gone):
            while True:
                asked = await _read(reader)
                if asked.method == "GET":
                    await self.listens.wait()
                    writer.write(whole(200, {"data": [{"id": self.model, **self.card}]}))
                elif asked.body.get("max_tokens") == 1 and "stream" not in asked.body:
                    self.num_checks += 1
                    await self.generates.wait()
                    writer.write(whole(200 if self.works else 500, self.check))
                else:
                    self.asked.append(asked)
                    await (self.script or self._plain)(asked, writer)
                await writer.drain()
        writer.close()

    async def _plain(self, asked: Asked, writer: asyncio.StreamWriter) -> None:
        if not asked.body.get("stream"):
            usage = {"prompt_tokens": 3, "completion_tokens": 2}
            writer.write(whole(200, {"model": self.model, "choices": [], "usage": usage}))
            return
        writer.write(STREAM_HEAD)
        try:
            for number in range(self.num_tokens):
                await asyncio.sleep(self.delay_s)
                writer.write(chunked(event(f"t{number} ", self.model)))
                await writer.drain()
        except ConnectionError:
            self.num_gone += 1
            raise
        writer.write(chunked(event("", self.model, "stop")) + chunked(b"data: [DONE]\n\n"))
        writer.write(b"0\r\n\r\n")


async def _read(reader: asyncio.StreamReader) -> Asked:
    head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    method, path, _ = head[0].split(" ")
    headers = {
        name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:])
    }
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    return Asked(method, path, headers, json.loads(body) if body else {})


@contextlib.asynccontextmanager
async def listening(*upstreams: FakeUpstream) -> AsyncIterator[None]:
    async with contextlib.AsyncExitStack() as stack:
        for upstream in upstreams:
            server = await asyncio.start_server(upstream.serve, "127.0.0.1", upstream.port)
            upstream.port = server.sockets[0].getsockname()[1]
            stack.callback(upstream.die, server)
        yield


@dataclass
class Front:
    """What stands before upstreams."""

    http: httpx.AsyncClient
    router: Router
    url: str


@contextlib.asynccontextmanager
async def fronting(
    *urls: str,
    names: tuple[tuple[str, str], ...] = (),
    keys: dict[str, str] | None = None,
    limits: UpstreamLimits | None = None,
    times: CheckTimes = TIMES,
    num_ready: int | None = None,
    hedging: bool = False,
    **config: Any,
) -> AsyncIterator[Front]:
    """The app over uvicorn in this loop; there when so many upstreams are in service."""
    door, clock = Door(names), MonotonicClock()
    addresses = [parse_address(url, (keys or {}).get(url)) for url in urls]
    clients = [UpstreamClient(each, door, limits, times) for each in addresses]
    settings = RouterConfig(
        replicas=tuple(each.name for each in clients),
        homeless_timeout_s=5.0,
        hedging=hedging,
        collapse=False,
    )
    async with Router(RouterState(settings, random.Random(0)), list(clients), clock) as router:
        wanted = len(urls) if num_ready is None else num_ready
        await until(lambda: sum(each.is_alive for each in router.replicas().values()) >= wanted)
        context = EdgeContext(
            config=ServerConfig(served_model_names=door.names or ("none",), **config),
            router=router,
            metrics=ServingMetrics(),
            clock=clock,
            rng=random.Random(0),
            wall_clock=lambda: 0.0,
        )
        async with (
            _served(create_proxy_app(context)) as url,
            httpx.AsyncClient(base_url=url, timeout=30.0) as http,
        ):
            yield Front(http, router, url)


@contextlib.asynccontextmanager
async def _served(app: Any) -> AsyncGenerator[str]:
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        app,
        http=BoundedHttp,
        log_level="warning",
        access_log=False,
        ws="none",
        timeout_graceful_shutdown=2,
    )
    server = _Server(config)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    await until(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        await serving
        listener.close()


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Any:
        yield


async def until(condition: Callable[[], bool], limit_s: float = 30.0) -> None:
    async with asyncio.timeout(limit_s):
        while not condition():
            await asyncio.sleep(0.005)


CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Hello you"}]


def chat(**fields: Any) -> dict[str, Any]:
    return {"messages": MESSAGES, **fields}


def events_of(text: str) -> list[str]:
    return [each.removeprefix("data: ") for each in text.split("\n\n") if each]


def text_of(events: list[str]) -> str:
    """All that a stream says."""
    said = ""
    for each in events:
        if each != "[DONE]":
            for choice in json.loads(each).get("choices", ()):
                said += choice["delta"].get("content", "")
    return said
