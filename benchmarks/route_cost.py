"""What `shoal route` costs: CPU of its process per request and per streamed token, one event each.

    python benchmarks/route_cost.py --output FILE [--peer nginx=PATH --peer haproxy=PATH]

Upstreams are pretended, in a process of their own: events of about 250 bytes that no model made, at
a fixed pace, as vLLM sends them. Three loads, each after a warm-up:

    requests   streams of one token, 16 at a time: what a request costs
    tokens     64 streams of many tokens: what a token costs beyond its request
    streams    2,000 slow streams (a token a second) that come within 10 s: whether one core carries
               them, and how late tokens come

Cost is CPU time of the router's process alone, so that a busy machine does not matter much. A peer
proxy passes the same streams on, to one of the upstreams: it knows nothing of tokens, retries or
who is how fast, and is the floor of what passing on costs.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httptools
import psutil
import uvloop

_MODEL = "pretended"
_CHAT = "/v1/chat/completions"
_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--tokens", type=int, default=300, help="of each of 64 streams")
    parser.add_argument("--streams", type=int, default=2000, help="slow ones")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PROGRAM")
    parser.add_argument("--output", type=Path, default=None)
    parser.add_argument("--serve-pretend", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve_pretend:
        uvloop.run(_serve_pretend())
        return
    report = {
        "command": " ".join(["python benchmarks/route_cost.py", *_shown(sys.argv[1:])]),
        "commit": _commit(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, python "
        f"{platform.python_version()}",
        "load_when_started": os.getloadavg()[0],
        "sides": _measured(args),
    }
    text = json.dumps(report, indent=1) + "\n"
    if args.output is not None:
        args.output.write_text(text)
    sys.stdout.write(text)


def _measured(args: argparse.Namespace) -> dict[str, Any]:
    """Medians over rounds, of each side."""
    with contextlib.ExitStack() as stack:
        upstreams = [stack.enter_context(_pretended()) for _ in range(2)]
        sides = {"shoal": stack.enter_context(_routing(upstreams))}
        for peer in args.peer:
            name, _, program = peer.partition("=")
            sides[name] = stack.enter_context(_PEERS[name](program, upstreams[0]))
        rounds: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
        for number in range(args.rounds + 1):
            for name, side in sides.items():
                found = _round(side, args, is_warm_up=number == 0)
                if number:
                    rounds[name].append(found)
    return {
        name: {key: statistics.median(each[key] for each in found) for key in found[0]}
        for name, found in rounds.items()
    }


@dataclass(frozen=True)
class _Side:
    port: int
    process: psutil.Process

    def cpu_s(self) -> float:
        family = [self.process, *self.process.children(recursive=True)]
        return sum(sum(each.cpu_times()[:2]) for each in family)


def _round(side: _Side, args: argparse.Namespace, *, is_warm_up: bool) -> dict[str, float]:
    share = 10 if is_warm_up else 1
    num, tokens = args.requests // share, args.tokens // share
    request_s, _ = _run(side, num, 16, tokens=1, gap_ms=0)
    many_s, _ = _run(side, 64, 64, tokens=tokens, gap_ms=10)
    streams = args.streams // share
    slow_s, slow = _run(side, streams, streams, tokens=25, gap_ms=1000, ramp_s=10 / share)
    return {
        "request_cpu_ms": request_s / num * 1e3,
        "token_cpu_us": (many_s - 64 * request_s / num) / (64 * (tokens - 1)) * 1e6,
        "slow_streams_cpu_share": slow_s / slow.elapsed_s,
        "slow_streams_finished": slow.num_whole,
        "slow_streams_at_once": slow.most_at_once,
        "slow_token_late_p99_ms": slow.late_ms(0.99),
        "rss_mib": side.process.memory_info().rss / 2**20,
    }


def _run(
    side: _Side, num: int, at_once: int, *, tokens: int, gap_ms: int, ramp_s: float = 0.0
) -> tuple[float, _Outcome]:
    """CPU seconds of the side meanwhile, and what clients saw."""
    before_s = side.cpu_s()
    outcome = uvloop.run(_load(side.port, num, at_once, tokens, gap_ms, ramp_s))
    if outcome.num_whole != num:
        sys.exit(f"{num - outcome.num_whole} of {num} streams did not come whole")
    return side.cpu_s() - before_s, outcome


# --- clients ---


class _Outcome:
    def __init__(self) -> None:
        self.num_whole, self.elapsed_s = 0, 0.0
        self.at_once = self.most_at_once = 0
        self.late_s: list[float] = []

    def late_ms(self, share: float) -> float:
        return sorted(self.late_s)[int(share * (len(self.late_s) - 1))] * 1e3


async def _load(
    port: int, num: int, at_once: int, tokens: int, gap_ms: int, ramp_s: float = 0.0
) -> _Outcome:
    outcome, began_s = _Outcome(), time.perf_counter()
    left = iter(range(num))

    async def client(client_number: int) -> None:
        stream: _Stream | None = None
        await asyncio.sleep(ramp_s * client_number / at_once)
        for number in left:
            stream = await _ask(port, stream, number, tokens, gap_ms, outcome)
        if stream is not None:
            stream.close()

    await asyncio.gather(*(client(number) for number in range(at_once)))
    outcome.elapsed_s = time.perf_counter() - began_s
    return outcome


async def _ask(
    port: int, stream: _Stream | None, number: int, tokens: int, gap_ms: int, outcome: _Outcome
) -> _Stream:
    loop = asyncio.get_running_loop()
    if stream is None or stream.is_closed:
        _, stream = await loop.create_connection(lambda: _Stream(outcome), "127.0.0.1", port)
    content = f"request {number}: " + "why are tails long when the mean is short? " * 12
    body = json.dumps(
        {
            "model": _MODEL,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": tokens,
            "stream": True,
            "seed": gap_ms,
        }
    ).encode()
    head = f"POST {_CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    times = await stream.ask(head.encode() + body)
    outcome.num_whole += stream.is_whole
    gap_s = gap_ms / 1e3
    for before, after in itertools.pairwise(times):
        outcome.late_s.append(max(after - before - gap_s, 0.0))
    return stream


class _Stream(asyncio.Protocol):
    """One connection; when each event of a response came."""

    def __init__(self, outcome: _Outcome) -> None:
        self._outcome, self.is_closed = outcome, False

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    async def ask(self, request: bytes) -> list[float]:
        self._parser = httptools.HttpResponseParser(self)
        self._done = asyncio.get_running_loop().create_future()
        self._times: list[float] = []
        self._tail = b""
        self.is_whole = False
        self._transport.write(request)
        await self._done
        return self._times

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        if not self._times:
            self._outcome.at_once += 1
            self._outcome.most_at_once = max(self._outcome.most_at_once, self._outcome.at_once)
        self._times.append(time.perf_counter())
        self._tail = (self._tail + body)[-16:]

    def on_message_complete(self) -> None:
        self.is_whole = self._tail.endswith(b"[DONE]\n\n") and self._parser.get_status_code() == 200
        self._outcome.at_once -= 1
        self._done.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        self.is_closed = True
        if hasattr(self, "_done") and not self._done.done():
            self._done.set_result(None)

    def close(self) -> None:
        self._transport.close()


# --- pretended upstreams ---


def _event(delta: dict[str, str], finish: str | None = None) -> bytes:
    chunk = {
        "id": "chatcmpl-0123456789abcdef0123456789abcdef",
        "object": "chat.completion.chunk",
        "created": 1_750_000_000,
        "model": _MODEL,
        "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}],
    }
    data = b"data: %b\n\n" % json.dumps(chunk, separators=(",", ":")).encode()
    return b"%x\r\n%b\r\n" % (len(data), data)


_TOKEN = _event({"content": " token"})
_END = _event({}, "length") + b"e\r\ndata: [DONE]\n\n\r\n" + b"0\r\n\r\n"


class _Upstream(asyncio.Protocol):
    """Answers on one connection; the pace is the seed of a request, in milliseconds."""

    def connection_made(self, transport: Any) -> None:
        self._transport, self._loop = transport, asyncio.get_running_loop()
        self._parser = httptools.HttpRequestParser(self)
        self._parts: list[bytes] = []

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_url(self, url: bytes) -> None:
        self._url = url

    def on_body(self, body: bytes) -> None:
        self._parts.append(body)

    def on_message_complete(self) -> None:
        text, self._parts = b"".join(self._parts), []
        if self._parser.get_method() == b"GET":
            self._whole({"data": [{"id": _MODEL}]})
            return
        body = json.loads(text)
        if not body.get("stream"):
            self._whole({"choices": []})
            return
        self._transport.write(_HEAD)
        self._next(body["max_tokens"], body["seed"] / 1e3)

    def _next(self, left: int, gap_s: float) -> None:
        if self._transport.is_closing():
            return
        self._transport.write(_TOKEN if left > 1 else _TOKEN + _END)
        if left > 1:
            self._loop.call_later(gap_s, self._next, left - 1, gap_s)

    def _whole(self, answer: object) -> None:
        data = json.dumps(answer).encode()
        head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(data)}"
        self._transport.write(head.encode() + b"\r\n\r\n" + data)


async def _serve_pretend() -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(_Upstream, "127.0.0.1", 0, backlog=4096)
    sys.stdout.write(f"ready {server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await server.serve_forever()


# --- processes ---


@contextlib.contextmanager
def _pretended() -> Iterator[int]:
    command = [sys.executable, __file__, "--serve-pretend"]
    with _started(command) as (_, said):
        yield int(_line(said, "ready").split()[1])


@contextlib.contextmanager
def _routing(upstreams: list[int]) -> Iterator[_Side]:
    port = _free_port()
    command = [sys.executable, "-m", "shoal", "route", "--port", str(port)]
    for each in upstreams:
        command += ["--upstream", f"http://127.0.0.1:{each}"]
    with _started(command) as (process, said):
        _line(said, "ready")
        _wait_for_port(port, said)
        yield _Side(port, psutil.Process(process.pid))


@contextlib.contextmanager
def _nginx(program: str, upstream: int) -> Iterator[_Side]:
    port = _free_port()
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "nginx.conf"
        config.write_text(
            f"daemon off; worker_processes 1; pid {folder}/pid; error_log stderr;\n"
            "worker_rlimit_nofile 16384;\n"
            "events { worker_connections 8192; }\n"
            f"http {{ access_log off; client_body_temp_path {folder}; proxy_temp_path {folder};\n"
            f"fastcgi_temp_path {folder}; uwsgi_temp_path {folder}; scgi_temp_path {folder};\n"
            f"upstream u {{ server 127.0.0.1:{upstream}; keepalive 256; }}\n"
            f"server {{ listen 127.0.0.1:{port} backlog=4096; location / {{\n"
            'proxy_pass http://u; proxy_http_version 1.1; proxy_set_header Connection "";\n'
            "proxy_buffering off; } } }\n"
        )
        command = [program, "-p", folder, "-c", str(config)]
        with _started(command) as (process, said):
            _wait_for_port(port, said)
            yield _Side(port, psutil.Process(process.pid))


@contextlib.contextmanager
def _haproxy(program: str, upstream: int) -> Iterator[_Side]:
    port = _free_port()
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "haproxy.cfg"
        config.write_text(
            "global\n nbthread 1\n maxconn 8192\n"
            "defaults\n mode http\n timeout connect 5s\n timeout client 60s\n timeout server 60s\n"
            " option http-no-delay\n http-reuse always\n"
            f"listen l\n bind 127.0.0.1:{port} backlog 4096\n server u 127.0.0.1:{upstream}\n"
        )
        with _started([program, "-db", "-f", str(config)]) as (process, said):
            _wait_for_port(port, said)
            yield _Side(port, psutil.Process(process.pid))


_PEERS = {"nginx": _nginx, "haproxy": _haproxy}


@contextlib.contextmanager
def _started(command: list[str]) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    with tempfile.NamedTemporaryFile() as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
        try:
            yield process, Path(said.name)
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _line(said: Path, beginning: str) -> str:
    until_s = time.monotonic() + 60
    while time.monotonic() < until_s:
        for line in said.read_text(errors="replace").splitlines():
            if line.startswith(beginning):
                return line
        time.sleep(0.05)
    sys.exit(f"a process did not start; it said:\n{said.read_text(errors='replace')}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for_port(port: int, said: Path) -> None:
    until_s = time.monotonic() + 60
    while time.monotonic() < until_s:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    sys.exit(f"nobody listens on port {port}; it said:\n{said.read_text(errors='replace')}")


def _shown(arguments: list[str]) -> list[str]:
    """Without where programs and results are on this machine."""
    return [
        f"{each.partition('=')[0]}=..." if each.startswith(("nginx=", "haproxy=")) else each
        for each in arguments
        if "/results/" not in each and each != "--output"
    ]


def _commit() -> str:
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return found.stdout.strip()


if __name__ == "__main__":
    main()
