"""A server's life as its operator sees it: starting, refusing to start, draining, dying."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from server_process import ServerProcess, StartServer

BODY: dict[str, Any] = {
    "model": "smollm2-135m",
    "prompt": "Once upon a time",
    "temperature": 0,
    "ignore_eos": True,
}


def serve(*flags: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "shoal", "serve", *flags],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **env},
        check=False,
    )


def stream_tokens(url: str, body: dict[str, Any], tokens: list[int], done: list[Any]) -> None:
    """Collect a stream's token ids; the last event's finish_reason or error ends in `done`."""
    request = {**body, "stream": True, "return_token_ids": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=request, timeout=240) as response:
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                done.append(event["error"])
                return
            for choice in event["choices"]:
                tokens += choice.get("token_ids") or []
                if choice["finish_reason"]:
                    done.append(choice["finish_reason"])


def num_alive(server: ServerProcess) -> int:
    """Replicas that would take a request."""
    metrics = httpx.get(f"{server.url}/metrics", timeout=60).text
    return metrics.count("\nshoal_router_predicted_ttft_seconds{")


def engines_of(server: ServerProcess) -> list[psutil.Process]:
    return [
        child
        for child in psutil.Process(server.process.pid).children()
        if "engine_process" in " ".join(child.cmdline())
    ]


def wait_until(condition: Any, limit_s: float = 120.0) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, f"not so within {limit_s} s"
        time.sleep(0.02)


def test_it_says_what_it_loaded(server: ServerProcess) -> None:
    text = "\n".join(server.lines)
    for word in ("model", "precision", "weights", "KV cache", "requests of", "ready"):
        assert word in text


def test_a_taken_port_is_said_in_one_line(smollm2_gguf: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = serve(str(smollm2_gguf), "--port", str(port))
    assert result.returncode == 1
    assert f"port {port}" in result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_beyond_loopback_without_a_key_is_refused(smollm2_gguf: Path) -> None:
    result = serve(str(smollm2_gguf), "--host", "0.0.0.0", "--port", "0")
    assert result.returncode == 1
    assert "API key" in result.stderr


def test_a_broken_model_is_said_in_one_line(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + b"\0" * 100)
    result = serve(str(broken), "--port", "0")
    assert result.returncode == 1
    assert "broken.gguf" in result.stderr
    assert "Traceback" not in result.stderr


def test_sigterm_finishes_what_runs_and_admits_nothing(start_server: StartServer) -> None:
    server = start_server()
    tokens: list[int] = []
    done: list[Any] = []
    stream = threading.Thread(
        target=stream_tokens, args=(server.url, {**BODY, "max_tokens": 100}, tokens, done)
    )
    stream.start()
    wait_until(lambda: len(tokens) > 3)
    children = psutil.Process(server.process.pid).children()
    server.process.send_signal(signal.SIGTERM)
    wait_until(lambda: any("stopping" in line for line in server.lines))
    refused = httpx.post(f"{server.url}/v1/completions", json=BODY, timeout=60)
    assert refused.status_code == 503
    assert "retry-after" in refused.headers
    assert httpx.get(f"{server.url}/ready").status_code == 503
    stream.join(60)
    assert done == ["length"]
    assert len(tokens) == 100
    assert server.process.wait(60) == 0
    wait_until(lambda: not any(child.is_running() for child in children))


def test_a_second_signal_leaves_at_once(start_server: StartServer) -> None:
    server = start_server("--drain-timeout", "60")
    tokens: list[int] = []

    def read() -> None:
        with contextlib.suppress(httpx.HTTPError):  # the connection is cut, as it must be
            stream_tokens(server.url, {**BODY, "max_tokens": 2000}, tokens, [])

    stream = threading.Thread(target=read)
    stream.start()
    wait_until(lambda: len(tokens) > 3)
    children = psutil.Process(server.process.pid).children()
    server.process.send_signal(signal.SIGTERM)
    wait_until(lambda: any("stopping" in line for line in server.lines))
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(40) != 0
    stream.join(60)
    wait_until(lambda: not any(child.is_running() for child in children))


def test_a_killed_server_leaves_no_engine_behind(start_server: StartServer) -> None:
    server = start_server()
    engines = engines_of(server)
    assert len(engines) == 1

    def read() -> None:
        with contextlib.suppress(httpx.HTTPError):  # the connection is cut, as it must be
            stream_tokens(server.url, {**BODY, "max_tokens": 2000, "n": 8}, [], [])

    threading.Thread(target=read, daemon=True).start()
    wait_until(lambda: _gauge(server, "shoal_num_requests_running") > 0)
    # News that nobody reads any more must not keep the engine from leaving.
    server.process.send_signal(signal.SIGSTOP)
    time.sleep(1.0)
    server.process.kill()
    server.process.wait(60)
    wait_until(lambda: not any(engine.is_running() for engine in engines))


@pytest.fixture(scope="module")
def pair(start_server: StartServer) -> ServerProcess:
    """Two replicas."""
    return start_server("--data-parallel-size", "2", "--dtype", "float32")


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP])
def test_an_engine_that_dies_or_freezes_loses_no_token(
    pair: ServerProcess, signum: signal.Signals
) -> None:
    """The one that serves a stream; the stream goes on at the other one."""
    body = {**BODY, "max_tokens": 80, "temperature": 0.8, "seed": 7}
    wait_until(lambda: num_alive(pair) == 2)
    want: list[int] = []
    stream_tokens(pair.url, body, want, [])
    tokens: list[int] = []
    done: list[Any] = []
    spent_s = {engine.pid: engine.cpu_times().user for engine in engines_of(pair)}
    stream = threading.Thread(target=stream_tokens, args=(pair.url, body, tokens, done))
    stream.start()
    wait_until(lambda: len(tokens) > 10)
    engines = engines_of(pair)
    busiest = max(engines, key=lambda each: each.cpu_times().user - spent_s[each.pid])
    busiest.send_signal(signum)
    stream.join(240)
    assert done == ["length"]
    assert tokens == want
    assert httpx.post(f"{pair.url}/v1/completions", json=BODY, timeout=60).status_code == 200
    if signum == signal.SIGSTOP:
        metrics = httpx.get(f"{pair.url}/metrics").text
        assert re.search(r"^shoal_hedge_won_total [1-9]", metrics, re.M), metrics
        with contextlib.suppress(psutil.NoSuchProcess):
            busiest.send_signal(signal.SIGCONT)


@pytest.fixture(scope="module")
def exact(start_server: StartServer) -> ServerProcess:
    """One engine, in fp32: going on elsewhere computes the same numbers, whatever the batch."""
    return start_server("--dtype", "float32")


@pytest.mark.parametrize("harm", ["kill", "suspend"])
def test_the_only_engine_is_replaced(exact: ServerProcess, harm: str) -> None:
    """Dead or frozen: it is started again, and the stream goes on as if nothing had been."""
    body = {**BODY, "max_tokens": 40, "temperature": 0.8, "seed": 7}
    want: list[int] = []
    stream_tokens(exact.url, body, want, [])
    tokens: list[int] = []
    done: list[Any] = []
    stream = threading.Thread(target=stream_tokens, args=(exact.url, body, tokens, done))
    stream.start()
    wait_until(lambda: len(tokens) > 5)
    getattr(engines_of(exact)[0], harm)()
    stream.join(240)
    assert done == ["length"]
    assert tokens == want


def test_a_dropped_client_frees_its_place(server: ServerProcess) -> None:
    with httpx.stream(
        "POST",
        f"{server.url}/v1/completions",
        json={**BODY, "max_tokens": 4000, "stream": True},
        timeout=60,
    ) as response:
        next(response.iter_lines())
    wait_until(lambda: _gauge(server, "shoal_num_requests_running") == 0, 30)


def _gauge(server: ServerProcess, name: str) -> float:
    text = httpx.get(f"{server.url}/metrics", timeout=60).text
    values = [float(line.split()[-1]) for line in text.splitlines() if line.startswith(name)]
    assert values, f"{name} is not among the metrics"
    return sum(values)


@pytest.mark.parametrize("path", ["/health", "/ready", "/version", "/metrics", "/v1/models"])
def test_what_operators_ask_is_answered(client: httpx.Client, path: str) -> None:
    assert client.get(path).status_code == 200
