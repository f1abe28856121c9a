"""Ray's processes on this machine: started in a session of their own, and known by it.

`ray stop` would end everybody's. A session's number is not given anew while one of its processes
lives, and its leader is told from a later one by when it began. Knows nothing of what runs on them.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import psutil

from shoal.cluster.folder import Record
from shoal.core.errors import ConfigError

_START_LIMIT_S = 90.0
_STOP_S = 5.0
_POLL_S = 0.1
_STARTED = "Ray runtime started"
_OBJECT_BYTES = 80_000_000
"""Ray wants some memory for objects; no tensor of ours is one."""

_LAST_LINES = 12


def require_ray() -> str:
    """Its version.

    Raises:
        ConfigError: it is not installed.
    """
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("ray")
    except PackageNotFoundError:
        raise ConfigError(
            "a cluster needs Ray, which is not installed; install it: pip install 'shoal[ray]'"
        ) from None


def start(
    *,
    head: str,
    address: str,
    name: str,
    files: str,
    is_head: bool,
    env: Mapping[str, str],
    log: Path,
) -> Record:
    """Start a head, or a node that joins one; it runs on when this command is gone."""
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block"),
        *(f"--node-ip-address={address}", f"--node-name={name}", f"--temp-dir={files}"),
        *("--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0"),
        *(f"--object-store-memory={_OBJECT_BYTES}", "--include-log-monitor=false"),
        *("--disable-usage-stats", "--log-style=record", "--log-color=false"),
    ]
    if is_head:
        port = head.rpartition(":")[2]
        command += ["--head", f"--port={port}", "--include-dashboard=false", "--no-monitor"]
    else:
        command += [f"--address={head}"]
    with log.open("wb") as said:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **env},
        )
    return Record(
        session=process.pid,
        started_s=psutil.Process(process.pid).create_time(),
        head=head,
        address=address,
        name=name,
        files=files,
        is_head=is_head,
    )


def wait_ready(record: Record, log: Path) -> None:
    """
    Raises:
        ConfigError: it did not start; with what it said last.
    """
    until_s = time.monotonic() + _START_LIMIT_S
    while True:
        alive = is_alive(record)
        said = log.read_text("utf-8", errors="replace")
        if _STARTED in said:
            return
        if not alive or time.monotonic() > until_s:
            last = "\n".join(said.splitlines()[-_LAST_LINES:])
            raise ConfigError(f"Ray did not start; it said:\n{last}")
        time.sleep(_POLL_S)


def is_alive(record: Record) -> bool:
    """Whether the process that leads the others is there."""
    leader = _leader(record)
    return leader is not None and leader.status() != psutil.STATUS_ZOMBIE


def end(record: Record) -> None:
    """End all of them, and remove Ray's files."""
    family = _members(record)
    leader = _leader(record)
    if leader is not None:
        family += leader.children(recursive=True)
        leader.send_signal(signal.SIGTERM)
    _, alive = psutil.wait_procs(family, timeout=_STOP_S)
    for process in {*alive, *_members(record)}:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=_STOP_S)
    shutil.rmtree(record.files, ignore_errors=True)


def _leader(record: Record) -> psutil.Process | None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(record.session)
        if abs(process.create_time() - record.started_s) < 1.0:
            return process
    return None


def _members(record: Record) -> list[psutil.Process]:
    """Processes of the session, whether or not its leader is still there."""
    if _leader(record) is None and psutil.pid_exists(record.session):
        return []  # the number is somebody else's by now
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(OSError, psutil.NoSuchProcess):
            if os.getsid(process.pid) == record.session:
                found.append(process)
    return found
