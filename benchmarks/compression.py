"""Prompts over three hosts joined by 20 Mbit/s: int8 activations against bfloat16.

    python benchmarks/compression.py --output FILE         as root, on Linux

Brings two labs up (network namespaces), alike but for --activation-format, and asks them in turn,
so that what else the machine does disturbs both alike. Prompts of 512 tokens go in chunks of
--chunk in both. Reported are

    ttft_ms         of a prompt nobody has seen, medians, and the median ratio of pairs
    top_1           positions of a text at which both labs find the same token likeliest
    on_loopback     what --activation-format auto chooses on this machine without a lab
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

LAB = """\
model: {model}
stages:
  - {{layers: 0-10, devices: [{{device: cpu, host: a, threads: {threads}}}]}}
  - {{layers: 10-21, devices: [{{device: cpu, host: b, threads: {threads}}}]}}
  - {{layers: 21-30, devices: [{{device: cpu, host: c, threads: {threads}}}]}}
links:
  default: {{bandwidth: {bandwidth}}}
"""
ARMS = ("bfloat16", "int8")
NUM_PROMPT_TOKENS = 512
TEXT = Path(__file__).parent / "texts" / "alice.txt"
TEXT_CHARACTERS = 1600


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--quantize", default="none")
    parser.add_argument("--bandwidth", default="20Mbit")
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--windows", type=int, default=6)
    parser.add_argument("--output", type=Path, default=None, help="a file for the JSON")
    args = parser.parse_args()
    flags = ("--quantize", args.quantize, "--max-num-batched-tokens", str(args.chunk))
    flags += ("--max-num-seqs", "16", "--kv-cache-memory-bytes", str(128 << 20))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "lab.yaml"
        file.write_text(LAB.format(**vars(args)))
        try:
            urls = [_up(arm, file, flags) for arm in ARMS]
            pairs = [[_ttft_ms(url, seed) for url in urls] for seed in range(args.rounds + 1)][1:]
            top_1 = _agreement(urls, args.windows)
        finally:
            for arm in ARMS:
                _output(sys.executable, "-m", "shoal", "lab", "down", "--name", arm)
    report = {
        "command": f"python benchmarks/compression.py --quantize {args.quantize} --bandwidth "
        f"{args.bandwidth} --chunk {args.chunk} --threads {args.threads} --rounds {args.rounds} "
        f"--windows {args.windows}",
        "commit": _output("git", "-C", str(Path(__file__).parent), "describe", "--always"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "ttft_ms": {
            arm: round(statistics.median(pair[i] for pair in pairs)) for i, arm in enumerate(ARMS)
        },
        "int8_of_bfloat16": round(statistics.median(int8 / bf16 for bf16, int8 in pairs), 3),
        "pairs_ms": [[round(each) for each in pair] for pair in pairs],
        **top_1,
        "on_loopback": _on_loopback(args.model, flags),
    }
    text = json.dumps(report, indent=1)
    if args.output is not None:
        args.output.write_text(text + "\n")
    sys.stdout.write(text + "\n")


def _up(arm: str, file: Path, flags: tuple[str, ...]) -> str:
    said = _output(
        *(sys.executable, "-m", "shoal", "lab", "up", str(file), "--name", arm, "--port", "0"),
        *("--namespaces", "--activation-format", arm, *flags),
    )
    return next(word for word in said.split() if word.startswith("http"))


def _ttft_ms(url: str, seed: int) -> float:
    """Of a prompt of random tokens."""
    rng = random.Random(seed)
    prompt = [rng.randrange(1000, 40_000) for _ in range(NUM_PROMPT_TOKENS)]
    body = {"model": _model(url), "prompt": prompt, "max_tokens": 1, "stream": True}
    began_s = time.perf_counter()
    with httpx.stream("POST", f"{url}/completions", json=body, timeout=300) as answer:
        answer.raise_for_status()
        next(line for line in answer.iter_lines() if line.startswith("data: {"))
        return (time.perf_counter() - began_s) * 1e3


def _agreement(urls: list[str], num_windows: int) -> dict[str, Any]:
    """Over windows of a text, each token given all before it."""
    text = TEXT.read_text("utf-8")
    same = total = 0
    for index in range(num_windows):
        window = text[index * TEXT_CHARACTERS :][:TEXT_CHARACTERS]
        found = [_likeliest(url, window) for url in urls]
        same += sum(one == other for one, other in zip(*found, strict=True))
        total += len(found[0])
    return {"top_1": round(same / total, 4), "top_1_of_positions": total}


def _likeliest(url: str, text: str) -> list[str]:
    body = {"model": _model(url), "prompt": text, "max_tokens": 1, "prompt_logprobs": 1}
    answer = httpx.post(f"{url}/completions", json=body, timeout=300)
    answer.raise_for_status()
    each_position = answer.json()["choices"][0]["prompt_logprobs"]
    return [
        min(found, key=lambda token_id: int(found[token_id]["rank"]))
        for found in each_position
        if found is not None
    ]


def _on_loopback(model: str, flags: tuple[str, ...]) -> list[str]:
    """What a server of three workers on this host says of its links."""
    command = [sys.executable, "-m", "shoal", "serve", model, "--port", "0"]
    server = subprocess.Popen(
        [*command, "--pipeline-parallel-size", "3", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    said: list[str] = []
    try:
        assert server.stdout is not None
        for line in server.stdout:
            if line.startswith("links"):
                said.append(re.sub(" +", " ", line.strip()))
            if line.startswith("ready"):
                break
    finally:
        server.send_signal(signal.SIGTERM)
        server.communicate()
    return said


def _model(url: str) -> str:
    return str(httpx.get(f"{url}/models").json()["data"][0]["id"])


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: {done.stderr}")
    return done.stdout.strip()


if __name__ == "__main__":
    main()
