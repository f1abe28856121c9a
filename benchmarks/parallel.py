"""What sharing a model out costs and gives: two ranks against one process, uneven against even.

    python benchmarks/parallel.py --rounds 5

Every arm is an `LLM` with its own workers, all of them up at once; in each round every arm has a
turn with the same greedy prompt, and only one computes at a time. A turn's rate is that of its
decode steps, first token to last. `lab` arms run on workers whose measured compute is stretched
to speeds 1.0 and 0.3. Medians go to `benchmarks/results/`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shoal import LLM, SamplingParams

_PROMPT_TOKENS = 32
_TENSOR = "stages: [{devices: [{device: cpu, threads: 1}, {device: cpu, threads: 1}]}]"
_LAB = (
    "stages: [{{devices: [{{device: cpu, threads: 1}}, {{device: cpu, threads: 1, speed: 0.3}}]"
    "{split}}}]"
)
ARMS: Mapping[str, tuple[str | None, dict[str, Any]]] = {
    "one process, 2 threads, bf16": (None, {"quantize": "none", "num_threads": 2}),
    "2 ranks, bf16": (_TENSOR, {"quantize": "none"}),
    "one process, 2 threads, int4": (None, {"quantize": "int4", "num_threads": 2}),
    "2 ranks, int4": (_TENSOR, {"quantize": "int4"}),
    "lab 1.0 and 0.3, even split": (_LAB.format(split=""), {"quantize": "none"}),
    "lab 1.0 and 0.3, uneven split": (
        _LAB.format(split=", split: {weights: [1.0, 0.3]}"),
        {"quantize": "none"},
    ),
}
RATIOS = {
    "2 ranks over one process, bf16": ("2 ranks, bf16", "one process, 2 threads, bf16"),
    "2 ranks over one process, int4": ("2 ranks, int4", "one process, 2 threads, int4"),
    "uneven over even split": ("lab 1.0 and 0.3, uneven split", "lab 1.0 and 0.3, even split"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=None, help="a file for the JSON")
    args = parser.parse_args()
    rounds = _measure(args.model, args.max_tokens, args.rounds)
    medians = {arm: statistics.median(row[arm] for row in rounds) for arm in ARMS}
    report = {
        "command": " ".join(["python", *(os.path.relpath(arg) for arg in sys.argv[:1])]),
        "commit": _commit(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "decode_tokens_per_s": medians,
        "ratios": {
            name: statistics.median(row[over] / row[under] for row in rounds)
            for name, (over, under) in RATIOS.items()
        },
        "rounds": rounds,
    }
    text = json.dumps(report, indent=1)
    if args.output is not None:
        args.output.write_text(text + "\n")
    sys.stdout.write(text + "\n")


def _measure(model: str, max_tokens: int, num_rounds: int) -> list[dict[str, float]]:
    rng = random.Random(0)
    rounds: list[dict[str, float]] = []
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        llms = {}
        for number, (arm, (plan, options)) in enumerate(ARMS.items()):
            more = dict(options)
            if plan is not None:
                more["plan"] = folder / f"{number}.yaml"
                more["plan"].write_text(plan)
            llms[arm] = stack.enter_context(
                LLM(model, kv_cache_memory_bytes=1 << 26, max_model_len=1024, **more)
            )
        for number in range(-1, num_rounds):  # one round before them warms everything up
            prompt = [rng.randrange(1000, 40_000) for _ in range(_PROMPT_TOKENS)]
            row = {arm: _decode_rate(llm, prompt, max_tokens) for arm, llm in llms.items()}
            if number >= 0:
                rounds.append(row)
    return rounds


def _decode_rate(llm: LLM, prompt: list[int], max_tokens: int) -> float:
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    times = [time.perf_counter() for _ in llm.stream(prompt, params)]
    return (max_tokens - 1) / (times[-1] - times[0])


def _commit() -> str:
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


if __name__ == "__main__":
    main()
