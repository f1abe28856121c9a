"""A `shoal serve` in its own process, followed line by line."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

_READY = re.compile(r"^ready .* at (http://\S+)/v1")
_START_LIMIT_S = 240


@dataclass
class ServerProcess:
    """A `shoal serve` that said it is ready, and all it printed so far."""

    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)
    url: str = ""
    started_s: float = field(default_factory=time.monotonic)

    def follow(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip())

    def wait_ready(self) -> None:
        while not self.url:
            for line in list(self.lines):
                if match := _READY.match(line):
                    self.url = match[1]
            if (
                self.process.poll() is not None
                or time.monotonic() - self.started_s > _START_LIMIT_S
            ):
                raise AssertionError("the server did not become ready:\n" + "\n".join(self.lines))
            time.sleep(0.01)

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(120)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise


StartServer = Callable[..., ServerProcess]


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
