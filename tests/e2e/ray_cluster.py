"""Machines for tests of `shoal up`: network namespaces, each with a state folder of its own."""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from shoal.lab.file import LinkSpeed
from shoal.lab.network import Network

HOSTS = ("a", "b", "c", "d")


@dataclass
class Machines:
    """Machines that see each other, and nothing else; `a` is to be the head."""

    network: Network
    prefix: str
    folder: Path
    said_up: str = ""
    said_join: dict[str, str] = field(default_factory=dict)

    def environment(self, host: str) -> dict[str, str]:
        return {**os.environ, "SHOAL_CACHE": str(self.folder / host), "COLUMNS": "200"}

    def shoal(self, host: str, *args: str, check: bool = True) -> str:
        done = subprocess.run(
            [*self.network.command(host), sys.executable, "-m", "shoal", *args],
            capture_output=True,
            text=True,
            timeout=150,
            env=self.environment(host),
        )
        assert done.returncode == 0 or not check, done.stdout + done.stderr
        return done.stdout + done.stderr

    def up(self) -> None:
        self.said_up = self.shoal("a", "up", "--name", "a")

    def join(self, *hosts: str, token: str | None = None) -> list[threading.Thread]:
        """Let machines join, all at once; `said_join` will have what they were told."""
        line = re.search(r"shoal (join .* --token) (.*)", self.said_up)
        assert line is not None
        words = [*line[1].split(), token or line[2]]

        def run(host: str) -> None:
            self.said_join[host] = self.shoal(host, *words, "--name", host, check=False)

        threads = [threading.Thread(target=run, args=(host,)) for host in hosts]
        for thread in threads:
            thread.start()
        return threads

    def record(self, host: str) -> dict[str, Any]:
        path = self.folder / host / "cluster" / "record.json"
        return dict(json.loads(path.read_text()))

    def processes(self, host: str) -> list[psutil.Process]:
        """Whatever runs on a machine."""
        done = subprocess.run(
            ["ip", "netns", "pids", f"{self.prefix}{host}"], capture_output=True, text=True
        )
        found = []
        for pid in {*map(int, done.stdout.split())} - {os.getpid()}:
            with suppress(psutil.NoSuchProcess):
                found.append(psutil.Process(pid))
        return found

    def kill(self, host: str) -> None:
        """All that runs on a machine ends at once, as when its power fails."""
        for process in self.processes(host):
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)

    def cut(self, one: str, other: str) -> None:
        self.network.cut(one, other)

    def heal(self, one: str, other: str) -> None:
        self.network.heal(one, other, LinkSpeed())

    @contextmanager
    def inside(self, host: str) -> Iterator[None]:
        """This thread, and what it starts, is on a machine."""
        with Path("/proc/thread-self/ns/net").open("rb") as before:
            with Path(f"/run/netns/{self.prefix}{host}").open("rb") as there:
                _enter(there.fileno())
            try:
                yield
            finally:
                _enter(before.fileno())


def _enter(descriptor: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, 0) != 0:
        raise OSError(ctypes.get_errno(), "setns")
