"""One turn of one engine: a fresh process, a job, what it said; and the machine's own speed.

A turn is a process from start to end, so that nothing of one engine (threads that spin, memory,
caches) is there while another is measured, and every turn tells start-up and memory anew.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import IO, Any

import psutil

WORKERS = Path(__file__).parent / "peer_workers"
_PROBE = Path(__file__).parent / "bandwidth.cpp"
_PROBE_MEGABYTES = 264
_PROBE_PASSES = 15


def run_turn(python: Path, worker: str, job: dict[str, Any], limit_s: float) -> dict[str, Any]:
    """What the worker measured; {"error": reason} if it failed or took longer than the limit.

    Keys: start_s (process start to first token), tasks (name → runs), peak_rss_bytes, versions.
    """
    with tempfile.TemporaryFile("w+") as log:
        started_s = time.perf_counter()
        process = subprocess.Popen(
            [str(python), str(WORKERS / worker)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=_environment(),
            start_new_session=True,
        )
        out_of_time = threading.Event()

        def stop() -> None:
            out_of_time.set()
            _kill(process)

        timer = threading.Timer(limit_s, stop)
        timer.start()
        try:
            result = _follow(process, job, started_s)
        finally:
            timer.cancel()
            _kill(process)
            for pipe in (process.stdin, process.stdout):
                _close(pipe)
            process.wait()
        if result is None:
            reason = f"over {limit_s:.0f} s" if out_of_time.is_set() else _last_words(log)
            return {"error": reason}
        return result


def import_torch_s() -> float:
    """A bare `import torch` in shoal's interpreter."""
    started_s = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch"], check=True, env=_environment())
    return time.perf_counter() - started_s


def build_probe(folder: Path) -> Path:
    """The bandwidth probe, compiled for this CPU.

    Raises:
        FileNotFoundError: there is no C++ compiler.
        subprocess.CalledProcessError: it does not compile.
    """
    compiler = next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)
    if compiler is None:
        raise FileNotFoundError("no C++ compiler (g++, clang++ or c++)")
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / "bandwidth"
    flags = ["-O3", "-march=native", "-pthread", "-std=c++17"]
    subprocess.run([compiler, *flags, str(_PROBE), "-o", str(probe)], check=True)
    return probe


def bandwidths_gb_s(probe: Path, num_threads: int) -> list[float]:
    """GB/s of each pass over a buffer in huge pages, one sequential stream a thread."""
    command = [str(probe), str(num_threads), str(_PROBE_MEGABYTES), str(_PROBE_PASSES)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    # The first pass wakes the cores.
    return [float(line) for line in done.stdout.split()][1:]


def _follow(
    process: subprocess.Popen[str], job: dict[str, Any], started_s: float
) -> dict[str, Any] | None:
    """None if it ended before it was done."""
    assert process.stdin is not None and process.stdout is not None
    result: dict[str, Any] = {"tasks": {}}
    try:
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
    except BrokenPipeError:
        return None
    for line in process.stdout:
        event = json.loads(line)
        match event["event"]:
            case "first_token":
                result["start_s"] = time.perf_counter() - started_s
            case "task":
                result["tasks"][event["name"]] = event["runs"]
            case "done":
                result["versions"] = event["versions"]
                result["peak_rss_bytes"] = _peak_rss_bytes(process.pid)
                return result
    return None


def _peak_rss_bytes(pid: int) -> int:
    """VmHWM of the process and all below it; what they share counts each time."""
    root = psutil.Process(pid)
    total = 0
    for process in (root, *root.children(recursive=True)):
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            continue
        kib = [int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")]
        total += sum(kib) * 1024
    return total


def _environment() -> dict[str, str]:
    """Ours, without what would make every start compile Python anew."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def _kill(process: subprocess.Popen[str]) -> None:
    """The worker and what it started: they are a session of their own."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _close(pipe: IO[str] | None) -> None:
    """A job that was not read in full is not worth an error now."""
    if pipe is not None:
        with contextlib.suppress(BrokenPipeError):
            pipe.close()


def _last_words(log: IO[str]) -> str:
    log.seek(0)
    lines = [line.strip() for line in log.read().splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line or "error:" in line]
    return (errors or lines or ["it ended without a word"])[-1][-300:]
