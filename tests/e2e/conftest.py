"""Real servers: `shoal serve` in its own process, on a port of its own, on the real small model."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import httpx
import pytest
from server_process import ServerProcess, StartServer


@contextlib.contextmanager
def starting(smollm2_gguf: Path) -> Iterator[StartServer]:
    """Starts servers on the small model with further flags; stops them all at the end."""
    servers: list[ServerProcess] = []

    def start(
        *flags: str,
        wait: bool = True,
        model: Path = smollm2_gguf,
        env: Mapping[str, str] | None = None,
    ) -> ServerProcess:
        command = [sys.executable, "-m", "shoal", "serve", str(model), "--port", "0"]
        process = subprocess.Popen(
            [*command, "--served-model-name", "smollm2-135m", *flags],
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
            env={**os.environ, **(env or {})},
        )
        server = ServerProcess(process)
        servers.append(server)
        threading.Thread(target=server.follow, daemon=True).start()
        if wait:
            server.wait_ready()
        return server

    try:
        yield start
    finally:
        for server in servers:
            server.stop()
            assert server.process.stderr is not None
            server.process.stderr.close()


@pytest.fixture(scope="module")
def start_server(smollm2_gguf: Path) -> Iterator[StartServer]:
    """For servers of a module's own."""
    with starting(smollm2_gguf) as start:
        yield start


@pytest.fixture(scope="session")
def server(smollm2_gguf: Path) -> Iterator[ServerProcess]:
    """One server that most tests share."""
    with starting(smollm2_gguf) as start:
        yield start()


@pytest.fixture(scope="session")
def server_url(server: ServerProcess) -> str:
    return server.url


@pytest.fixture
def client(server_url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server_url, timeout=120) as client:
        yield client
