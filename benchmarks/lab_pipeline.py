"""A pipeline over three hosts joined by 20 Mbit/s: how near to its slowest part it runs.

    python benchmarks/lab_pipeline.py --output FILE         as root, on Linux

Brings a lab up (network namespaces, workers at 0.3 of their speed, so that three of them fit two
cores), streams 8 completions and looks, while all of them run, at

    stage      CPU time of its compute thread / speed / wall time: 1 is a stage that never waits
    link       bytes that crossed each wire / bandwidth / wall time: 1 is a wire that never rests

The largest of these is the share of its own limit at which the pipeline runs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import psutil

SPEED, BANDWIDTH_BITS = 0.3, 20_000_000
LAB = f"""\
model: {{model}}
stages:
  - {{{{layers: 0-11, devices: [{{{{device: cpu, host: a, threads: 1, speed: {SPEED}}}}}]}}}}
  - {{{{layers: 11-23, devices: [{{{{device: cpu, host: b, threads: 1, speed: {SPEED}}}}}]}}}}
  - {{{{layers: 23-30, devices: [{{{{device: cpu, host: c, threads: 1, speed: {SPEED}}}}}]}}}}
links:
  default: {{{{bandwidth: 20Mbit}}}}
"""
NUM_STREAMS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--quantize", default="auto")
    parser.add_argument("--max-tokens", type=int, default=192)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=None, help="a file for the JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "lab.yaml"
        file.write_text(LAB.format(model=args.model))
        precision = ("--dtype", args.dtype, "--quantize", args.quantize)
        said = _lab("up", str(file), "--port", "0", "--namespaces", *precision)
        try:
            url = next(word for word in said.split() if word.startswith("http"))
            rounds = [_round(url, args.max_tokens) for _ in range(args.rounds)]
        finally:
            _lab("down")
    report = {
        "command": f"python benchmarks/lab_pipeline.py --dtype {args.dtype} "
        f"--quantize {args.quantize} --max-tokens {args.max_tokens} --rounds {args.rounds}",
        "commit": _output("git", "-C", str(Path(__file__).parent), "describe", "--always"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "share_of_limit": sorted(each["share_of_limit"] for each in rounds)[len(rounds) // 2],
        "rounds": rounds,
    }
    text = json.dumps(report, indent=1)
    if args.output is not None:
        args.output.write_text(text + "\n")
    sys.stdout.write(text + "\n")


def _round(url: str, max_tokens: int) -> dict[str, Any]:
    """One crowd of streams, watched while all of them decode."""
    counts = [0] * NUM_STREAMS
    pids = {each["worker"]: each["pid"] for each in json.loads(_lab("status", "--json"))["workers"]}
    threads = [
        threading.Thread(target=_stream, args=(url, index, max_tokens, counts))
        for index in range(NUM_STREAMS)
    ]
    for thread in threads:
        thread.start()
    while min(counts) < max_tokens // 8:
        time.sleep(0.01)
    first, tokens, began_s = _used(pids), sum(counts), time.monotonic()
    while max(counts) < max_tokens * 7 // 8:
        time.sleep(0.01)
    last, tokens, wall_s = _used(pids), sum(counts) - tokens, time.monotonic() - began_s
    for thread in threads:
        thread.join()
    shares = {name: (last[name] - first[name]) / wall_s for name in first}
    return {
        "tokens_per_s": round(tokens / wall_s, 2),
        "shares": {name: round(share, 3) for name, share in shares.items()},
        "share_of_limit": round(max(shares.values()), 3),
    }


def _stream(url: str, index: int, max_tokens: int, counts: list[int]) -> None:
    body = {
        "model": _model(url),
        "prompt": f"The {index}th thing to know about the sea is",
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
    }
    with httpx.stream("POST", f"{url}/completions", json=body, timeout=300) as answer:
        answer.raise_for_status()
        for line in answer.iter_lines():
            counts[index] += line.startswith("data: {")


def _model(url: str) -> str:
    return str(httpx.get(f"{url}/models").json()["data"][0]["id"])


def _used(pids: dict[str, int]) -> dict[str, float]:
    """Seconds each stage computed and each wire sent since they began."""
    used: dict[str, float] = {}
    for worker, pid in pids.items():
        threads = psutil.Process(pid).threads()
        busiest_s = max(thread.user_time + thread.system_time for thread in threads)
        used[f"stage {worker}"] = busiest_s / SPEED
    for name in sorted(path.name for path in Path("/run/netns").iterdir()):
        host = name[-1]
        for device in json.loads(_output("ip", "-n", name, "-s", "-j", "link")):
            if device["ifname"].startswith("eth-"):
                sent_bytes = device["stats64"]["tx"]["bytes"]
                link = f"link {host}-{device['ifname'].removeprefix('eth-')}"
                used[link] = sent_bytes * 8 / BANDWIDTH_BITS
    return used


def _lab(*args: str) -> str:
    return _output(sys.executable, "-m", "shoal", "lab", *args, "--name", "benchmark")


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: {done.stderr}")
    return done.stdout.strip()


if __name__ == "__main__":
    main()
