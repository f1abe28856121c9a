"""Plans served over HTTP: the tokens of one device, at 1 and at 16 streams.

All in fp32. Sums over ranks differ in their last bits, so streams are such that no choice hangs
on those: their tokens were the same on every split tried.
"""

from __future__ import annotations

import contextlib
import socket
import time
from pathlib import Path

import psutil
import pytest
from parallel_streams import PLANS, Streams, plan_file, workers_of
from server_process import ServerProcess, StartServer

MAX_TOKENS = 16


@pytest.fixture(scope="module")
def want(start_server: StartServer) -> dict[int, list[list[int]]]:
    server = start_server("--dtype", "float32")
    found = {count: Streams(server.url, count, MAX_TOKENS).results() for count in (1, 16)}
    server.stop()
    return found


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_serves_the_tokens_of_one_device(
    name: str, want: dict[int, list[list[int]]], start_server: StartServer, tmp_path: Path
) -> None:
    server = start_server("--dtype", "float32", "--plan", str(plan_file(tmp_path, PLANS[name])))
    assert len(workers_of(server)) == PLANS[name].count("cpu")
    _check_strangers_hear_nothing(server)
    for count, tokens in want.items():
        assert Streams(server.url, count, MAX_TOKENS).results() == tokens
    _check_it_leaves_nothing(server)


def test_sizes_are_the_plain_way_in(
    want: dict[int, list[list[int]]], start_server: StartServer
) -> None:
    sizes = ("--tensor-parallel-size", "2", "--pipeline-parallel-size", "2")
    server = start_server("--dtype", "float32", *sizes)
    assert len(workers_of(server)) == 4
    assert Streams(server.url, 1, MAX_TOKENS).results() == want[1]
    _check_it_leaves_nothing(server)


def test_gemma_on_two_ranks(gemma3_gguf: Path, start_server: StartServer) -> None:
    """One KV head, which both ranks keep; four norms a layer; a window."""
    flags = ("--dtype", "float32", "--max-model-len", "2048")
    found = []
    for more in ((), ("--tensor-parallel-size", "2")):
        server = start_server(*flags, *more, model=gemma3_gguf)
        found.append(Streams(server.url, 4, MAX_TOKENS).results())
        server.stop()
    assert found[0] == found[1]


def _check_strangers_hear_nothing(server: ServerProcess) -> None:
    """Workers listen on loopback only, and hang up on whoever has no key."""
    workers = workers_of(server)
    listening = [
        each.laddr
        for worker in workers
        for each in worker.net_connections(kind="inet")
        if each.status == psutil.CONN_LISTEN
    ]
    assert {each.ip for each in listening} == {"127.0.0.1"}
    ports = [each.port for each in listening]
    assert len(set(ports)) == len(ports) >= len(workers)
    for port in ports:
        with socket.create_connection(("127.0.0.1", port), timeout=60) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n" + bytes(1000))
            stranger.settimeout(60)
            heard = b""
            with contextlib.suppress(ConnectionResetError):
                while part := stranger.recv(4096):
                    heard += part
        assert len(heard) <= 64, "more than a greeting"  # ZeroMQ's, which names CURVE


def _check_it_leaves_nothing(server: ServerProcess) -> None:
    workers = workers_of(server)
    assert server.stop() == 0
    end = time.monotonic() + 60
    while any(worker.is_running() for worker in workers):
        assert time.monotonic() < end, "workers are left"
        time.sleep(0.02)
