"""A `shoal serve` in its own process, followed line by line."""

from __future__ import annotations

import re
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field

_READY = re.compile(r"^ready .* at (http://\S+)/v1")
_START_LIMIT_S = 120


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
            return self.process.wait(40)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise


StartServer = Callable[..., ServerProcess]
