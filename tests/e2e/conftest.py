"""Real servers: `shoal serve` in its own process, on a port of its own, on the real small model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from server_process import ServerProcess, StartServer, starting


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
