"""Experts on disk: what a decode step costs, and what was predicted; in memory, and whole layers.

    python benchmarks/experts_on_disk.py --output FILE        (as root, for the memory limit)

A mixture with random weights, int8, about 430 MB; half of it may be in memory. Each arm is a
process of its own that makes one stream of tokens, arms take turns:

    memory     all weights in memory
    experts    what shoal does by itself
    layers     whole layers on disk, forced

Processes are in a control group whose memory is what the weights and Python need and little more,
so that the file cache does not hide the disk.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

ARMS = ("memory", "experts", "layers")
PROMPT_TOKENS = 16
WARM_TOKENS = 64
GROUPS = Path("/sys/fs/cgroup/memory")
MARGIN_BYTES = 48 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=192)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--active", type=int, default=4)
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to be measured")
    parser.add_argument("--output", type=Path, default=None, help="a file for the JSON")
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--weights-bytes", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.arm is not None:
        sys.stdout.write(json.dumps(_arm(args)) + "\n")
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        report = _measure(Path(folder), args)
    text = json.dumps(report, indent=1)
    if args.output is not None:
        args.output.write_text(text + "\n")
    sys.stdout.write(text + "\n")


def _measure(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    from random_moe import Shape, write_model

    shape = Shape(
        num_layers=args.layers,
        hidden_size=1024,
        num_heads=16,
        num_kv_heads=4,
        num_experts=args.experts,
        num_active=args.active,
        expert_size=512,
    )
    model = write_model(folder / "model", shape)
    first = _run("memory", args, folder, model, 0, None)
    half = first["weight_bytes"] // 2
    base = first["anonymous_bytes"] - first["weight_bytes"]
    limit = base + half + MARGIN_BYTES
    rounds: list[dict[str, Any]] = []
    for number in range(args.rounds):
        row = {"memory": first if not number else _run("memory", args, folder, model, 0, None)}
        for arm in ("experts", "layers"):
            row[arm] = _run(arm, args, folder, model, half, limit)
        rounds.append(row)
        steps = {arm: each["step_ms"] for arm, each in row.items()}
        sys.stderr.write(f"round {number}: {steps}\n")
    return {
        "command": " ".join(["python", *(os.path.relpath(arg) for arg in sys.argv[:1])]),
        "commit": _output("git", "rev-parse", "--short", "HEAD"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "load_average": os.getloadavg(),
        "parameters": shape.num_parameters,
        "weight_bytes": first["weight_bytes"],
        "weights_memory_bytes": half,
        "process_limit_bytes": limit,
        "step_ms": {arm: _median(rounds, arm, "step_ms") for arm in ARMS},
        "predicted_ms": {arm: _median(rounds, arm, "predicted_ms") for arm in ARMS[1:]},
        "predicted_over_measured": {
            arm: round(_median(rounds, arm, "predicted_ms") / _median(rounds, arm, "step_ms"), 2)
            for arm in ARMS[1:]
        },
        "predicted_as_found_over_measured": round(
            _median(rounds, "experts", "predicted_as_found_ms")
            / _median(rounds, "experts", "step_ms"),
            2,
        ),
        "found": {
            "predicted": _median(rounds, "experts", "found_predicted"),
            "measured": _median(rounds, "experts", "found"),
        },
        "log": {arm: rounds[-1][arm]["log"] for arm in ARMS[1:]},
        "rounds": rounds,
    }


def _median(rounds: list[dict[str, Any]], arm: str, key: str) -> float:
    return float(statistics.median(row[arm][key] for row in rounds))


def _run(
    arm: str, args: argparse.Namespace, folder: Path, model: Path, weights: int, limit: int | None
) -> dict[str, Any]:
    _let_go(folder)
    command = [sys.executable, __file__, "--arm", arm, "--model", str(model)]
    command += ["--weights-bytes", str(weights), "--max-tokens", str(args.max_tokens)]
    command += ["--threads", str(args.threads)]
    environment = {**os.environ, "SHOAL_CACHE": str(folder / "cache" / arm)}
    with _group(limit) as group:
        done = subprocess.run(
            [*group, *command], env=environment, stdout=subprocess.PIPE, text=True, check=True
        )
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


@contextlib.contextmanager
def _group(limit: int | None) -> Iterator[list[str]]:
    """A command before another, that puts it into a control group."""
    if limit is None:
        yield []
        return
    own = next(
        line.split(":", 2)[2]
        for line in Path("/proc/self/cgroup").read_text().splitlines()
        if "memory" in line.split(":")[1].split(",")
    )
    parent = GROUPS / own.lstrip("/")
    folder = (parent if parent.is_dir() else GROUPS) / f"shoal-benchmark-{os.getpid()}"
    folder.mkdir()
    try:
        (folder / "memory.limit_in_bytes").write_text(str(limit))
        yield ["sh", "-c", f'echo $$ > {folder}/cgroup.procs && exec "$@"', "sh"]
    finally:
        folder.rmdir()


def _let_go(folder: Path) -> None:
    """Nothing of it is in the file cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            file = os.open(path, os.O_RDONLY)
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)


def _arm(args: argparse.Namespace) -> dict[str, Any]:
    """One process: load, warm up, and then time the tokens of one stream."""
    from shoal import LLM, SamplingParams
    from shoal.model import disk_room

    said: list[str] = []
    reports = _Reports()
    logging.getLogger("shoal").addHandler(reports)
    logging.getLogger("shoal").setLevel(logging.INFO)
    forced = contextlib.ExitStack()
    if args.arm == "layers":
        forced.enter_context(mock.patch.object(disk_room, "expert_slots", lambda *sizes: ()))
    options: dict[str, Any] = {"weights_memory_bytes": args.weights_bytes or None}
    with (
        forced,
        LLM(
            str(args.model),
            quantize="int8",
            num_threads=args.threads,
            max_model_len=512,
            kv_cache_memory_bytes=32 << 20,
            say=said.append,
            **options,
        ) as llm,
    ):
        prompt = [(7 * n) % 256 + 1 for n in range(PROMPT_TOKENS)]

        def run(count: int) -> float:
            began_s = time.perf_counter()
            sampling = SamplingParams(temperature=0.8, seed=3, max_tokens=count, ignore_eos=True)
            llm.generate([prompt], sampling)
            return time.perf_counter() - began_s

        run(WARM_TOKENS)
        short_s, long_s = run(2), run(args.max_tokens)
        anonymous_bytes = _anonymous_bytes()
    line = next((line for line in said if line.startswith("on disk")), "")
    predicted = re.search(r"a decode step of about ([\d.]+) ms", line)
    expected = re.search(r"of (\d+) that a token wants, (\d+)% are there", line)
    each_ms = re.search(r"are read, ([\d.]+) ms each", line)
    found = reports.found[-1] if reports.found else 1.0
    as_found_ms = 0.0
    if predicted and expected and each_ms:  # as predicted, had one known what memory would have
        more = found - float(expected[2]) / 100
        as_found_ms = float(predicted[1]) - more * float(expected[1]) * float(each_ms[1])
    weights = next(line for line in said if line.startswith("weights"))
    size = re.search(r"([\d.]+) (GB|MB)", weights)
    assert size is not None
    return {
        "step_ms": round(1e3 * (long_s - short_s) / (args.max_tokens - 2), 2),
        "predicted_ms": float(predicted[1]) if predicted else 0.0,
        "predicted_as_found_ms": round(as_found_ms, 1),
        "found": found,
        "found_predicted": float(expected[2]) / 100 if expected else 1.0,
        "weight_bytes": round(float(size[1]) * (1e9 if size[2] == "GB" else 1e6)),
        "anonymous_bytes": anonymous_bytes,
        "log": [line, *reports.lines],
    }


class _Reports(logging.Handler):
    """What shoal logs of how often experts were in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[float] = []
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        line = record.getMessage()
        if match := re.search(r"([\d.]+) % of those wanted were in memory", line):
            self.found.append(float(match[1]) / 100)
            self.lines.append(line)


def _anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return 1024 * int(line.split()[1])
    raise OSError("this kernel does not say RssAnon")


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()
