"""A lab's `shoal serve`: started detached, waited for, ended with all that it started."""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import psutil

from shoal.core.errors import ConfigError
from shoal.lab.folder import STATE_VARIABLE, LabFolder

_READY = re.compile(r"^ready .* at (http://\S+)/v1", re.MULTILINE)
_POLL_S = 0.1
_STOP_S = 10.0
_LAST_LINES = 15


def start(
    folder: LabFolder, model: str, port: int, flags: Sequence[str]
) -> subprocess.Popen[bytes]:
    """Start the server; what it says goes to the folder's log."""
    command = [sys.executable, "-m", "shoal", "serve", model, "--plan", str(folder.plan)]
    with folder.log.open("wb") as log:
        return subprocess.Popen(
            [*command, "--port", str(port), "--drain-timeout", "2", *flags],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            # It stays when this command and its terminal are gone.
            start_new_session=True,
            env={**os.environ, STATE_VARIABLE: str(folder.settings)},
        )


def wait_ready(process: subprocess.Popen[bytes], log: Path, limit_s: float) -> str:
    """The address it serves at.

    Raises:
        ConfigError: it ended, or did not become ready in time; with what it said last.
    """
    until_s = time.monotonic() + limit_s
    while True:
        ended = process.poll() is not None
        said = log.read_text("utf-8", errors="replace")
        if found := _READY.search(said):
            return found[1]
        if ended or time.monotonic() > until_s:
            what = "ended" if ended else f"was not ready within {limit_s:g} s"
            last = "\n".join(said.splitlines()[-_LAST_LINES:])
            raise ConfigError(f"the lab's server {what}; it said:\n{last}")
        time.sleep(_POLL_S)


def started_s(pid: int) -> float:
    """When a process began; 0.0: it is gone."""
    try:
        return float(psutil.Process(pid).create_time())
    except psutil.NoSuchProcess:
        return 0.0


def is_alive(pid: int, began_s: float) -> bool:
    """Whether it is still that process, and not a later one of the same number."""
    try:
        process = psutil.Process(pid)
        is_gone = process.status() == psutil.STATUS_ZOMBIE
        return not is_gone and abs(process.create_time() - began_s) < 1.0
    except psutil.NoSuchProcess:
        return False


def process_state(pid: int | None) -> str:
    """Of a worker: "running", "stopped" or "gone"."""
    try:
        process = psutil.Process(pid) if pid is not None else None
        if process is None or not _is_worker(process):
            return "gone"
        status = process.status()
    except psutil.NoSuchProcess:
        return "gone"
    return {psutil.STATUS_STOPPED: "stopped", psutil.STATUS_ZOMBIE: "gone"}.get(status, "running")


def end(pid: int, began_s: float) -> None:
    """End a server and everything it started."""
    if not is_alive(pid, began_s):
        return
    family = _family(pid)
    os.kill(pid, signal.SIGTERM)
    _, alive = psutil.wait_procs(family, timeout=_STOP_S)
    for process in alive:
        _kill(process)
    psutil.wait_procs(alive, timeout=_STOP_S)


def end_workers(pids: Iterable[int]) -> None:
    """End workers that outlived their server."""
    for pid in pids:
        try:
            process = psutil.Process(pid)
            if _is_worker(process):
                process.kill()
                process.wait(_STOP_S)
        except (psutil.NoSuchProcess, psutil.TimeoutExpired):
            continue


def end_strays(plan: Path) -> int:
    """End servers of this plan that nobody wrote down; how many there were."""
    found = [each for each in psutil.process_iter() if _serves(each, str(plan))]
    for process in found:
        end(process.pid, started_s(process.pid))
    return len(found)


def _serves(process: psutil.Process, plan: str) -> bool:
    try:
        words = process.cmdline()
    except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
        return False
    return "serve" in words and ("--plan", plan) in itertools.pairwise(words)


def _is_worker(process: psutil.Process) -> bool:
    """And not a later process of the same number."""
    return any("shoal.worker" in word for word in process.cmdline())


def _family(pid: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _kill(process: psutil.Process) -> None:
    try:
        process.kill()
    except psutil.NoSuchProcess:
        return
