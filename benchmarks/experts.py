"""Dealing experts by speed, and dealing them anew: what it gives on devices of several speeds.

    python benchmarks/experts.py --output FILE

A mixture of 208 million random parameters on three workers at speeds 1.0, 0.5 and 0.25 (their own
computing, stretched), 16 streams. Attention is split by speed in every arm; arms take turns.

    even        as many experts for each rank             against    by speed
    skewed      3 of 16 experts get most tokens, and the slowest rank has two of them:
                by speed    against    the same, dealt anew while it runs
                            against    the best that moving one expert at a time gives, found by
                                       trying all moves with the model's true loads
"""

from __future__ import annotations

import argparse
import atexit
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
from random_moe import Shape, write_model

from shoal.core.options import EngineOptions
from shoal.core.plan import Plan, ReplicaPlan
from shoal.core.request import SamplingParams
from shoal.core.split import Dealing, ExpertShare, cut
from shoal.core.step import SequenceStart, Step, StepRow
from shoal.model.spec import read_spec
from shoal.plan_file import dump_plan, read_plan
from shoal.plan_file.even import share_threads
from shoal.policy.dealing import best_single_moves, layer_time
from shoal.worker.launch import load_worker

SPEEDS = (1.0, 0.5, 0.25)
NUM_STREAMS = 16
PROMPT_TOKENS = 16
HOT = (13, 14, 15)
PLAN = """\
stages:
  - devices: [{devices}]
    split: {{weights: {speeds}, experts: {experts}}}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--output", type=Path, default=None, help="a file for the JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        even = _even_against_speed(folder, args)
        skewed = _skewed(folder, args)
    report = {
        "command": f"python benchmarks/experts.py --max-tokens {args.max_tokens} "
        f"--rounds {args.rounds} --dtype {args.dtype}",
        "commit": _output("git", "-C", str(Path(__file__).parent), "describe", "--always"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "parameters": Shape().num_parameters,
        "speeds": SPEEDS,
        "streams": NUM_STREAMS,
        "by_speed_against_even": even,
        "skewed_load": skewed,
    }
    text = json.dumps(report, indent=1)
    if args.output is not None:
        args.output.write_text(text + "\n")
    sys.stdout.write(text + "\n")


def _even_against_speed(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    model, num_experts = write_model(folder / "flat", Shape()), Shape().num_experts
    plans = {
        name: _plan(folder, name, [len(each) for each in cut(num_experts, weights)])
        for name, weights in (("even", [1.0] * len(SPEEDS)), ("by speed", SPEEDS))
    }
    servers = {
        name: _Server(model, plan, args.dtype, "--no-expert-redeal") for name, plan in plans.items()
    }
    rates = _take_turns(servers, args.rounds, args.max_tokens)
    medians = {name: statistics.median(each) for name, each in rates.items()}
    return {"tokens_per_s": rates, "ratio": round(medians["by speed"] / medians["even"], 2)}


def _skewed(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    shape = Shape(hot=HOT)
    model = write_model(folder / "skewed", shape)
    sizes = [len(each) for each in cut(shape.num_experts, SPEEDS)]
    first = _plan(folder, "skewed", sizes)
    replica = read_plan(first).resolve(read_spec(model)).replicas[0]
    loads = _loads(model, args.dtype, args.max_tokens)
    slots = [shape.num_experts] * len(SPEEDS)
    (current,) = replica.instances[0].split.experts
    best = [best_single_moves(current, layer, SPEEDS, slots) for layer in loads]
    plan = folder / "best.yaml"
    plan.write_text(_with_experts(replica, best, model))
    servers = {
        "by speed": _Server(model, first, args.dtype, "--no-expert-redeal"),
        "best single moves": _Server(model, plan, args.dtype, "--no-expert-redeal"),
        "dealt anew": _Server(model, first, args.dtype),
    }
    waited = servers["dealt anew"].until_settled(args.max_tokens)
    said = [line for line in servers["dealt anew"].lines if "dealt anew" in line]
    rates = _take_turns(servers, args.rounds, args.max_tokens)
    medians = {name: statistics.median(each) for name, each in rates.items()}
    base = medians["by speed"]
    gain = medians["best single moves"] - base
    return {
        "tokens_per_s": rates,
        "recovered": round((medians["dealt anew"] - base) / gain, 2),
        "predicted_layer_times": {
            "by speed": round(sum(layer_time(current, each, SPEEDS) for each in loads), 2),
            "best single moves": round(
                sum(layer_time(*pair, SPEEDS) for pair in zip(best, loads, strict=True)), 2
            ),
        },
        "batches_until_settled": waited,
        "log": said,
    }


def _plan(folder: Path, name: str, sizes: Sequence[int]) -> Path:
    devices = ", ".join(f"{{device: cpu, threads: 1, speed: {speed}}}" for speed in SPEEDS)
    path = folder / f"{name}.yaml"
    path.write_text(PLAN.format(devices=devices, speeds=list(SPEEDS), experts=list(sizes)))
    return path


def _with_experts(replica: ReplicaPlan, dealings: Sequence[Dealing], model: Path) -> str:
    """The plan with these experts in its layers, as a file."""
    from shoal.executor.dealing import with_experts

    spec = read_spec(model)
    (replica,) = share_threads([replica], 1)
    assert spec.experts is not None
    assert all(isinstance(share, ExpertShare) for rank in dealings[0] for share in rank)
    return dump_plan(Plan(replicas=(with_experts(replica, 0, dealings),)))


def _loads(model: Path, dtype: str, num_steps: int) -> list[list[float]]:
    """Tokens that a decode step of all streams sends to each expert of each layer."""
    options = EngineOptions(model_path=str(model), dtype=dtype, max_model_len=512)  # type: ignore[arg-type]
    loaded = load_worker(
        options, read_spec(model), say=lambda line: None, progress=lambda done, total: None
    )
    counts = loaded.decoder.expert_counts
    assert counts is not None
    tokens = [tuple(_prompt(index)) for index in range(NUM_STREAMS)]
    length = 0
    before = counts.clone()
    for number in range(num_steps):
        rows = tuple(
            StepRow(
                sequence_id=index,
                start=length,
                token_ids=each,
                block_ids=(tuple(range(index * 32, index * 32 + 32)),),
                samples=True,
                start_state=_start(each) if number == 0 else None,
            )
            for index, each in enumerate(tokens)
        )
        length += len(tokens[0])
        result = loaded.worker.launch(Step(step_id=number, rows=rows)).wait()
        tokens = [(row.token_id or 0,) for row in result.rows]
        if number == 0:
            before = counts.clone()
    return [[count / (num_steps - 1) for count in layer] for layer in (counts - before).tolist()]


def _start(token_ids: tuple[int, ...]) -> SequenceStart:
    greedy = SamplingParams(temperature=0.0)
    return SequenceStart(
        token_ids=token_ids, prompt_len=len(token_ids), sampling=greedy, eos_token_ids=()
    )


def _prompt(index: int) -> list[int]:
    return [(index * 37 + at * 101) % 256 + 1 for at in range(PROMPT_TOKENS)]


class _Server:
    """A `shoal serve` with a plan."""

    def __init__(self, model: Path, plan: Path, dtype: str, *flags: str) -> None:
        command = [sys.executable, "-m", "shoal", "serve", str(model), "--plan", str(plan)]
        more = ("--port", "0", "--dtype", dtype, "--max-model-len", "512", *flags)
        self.lines: list[str] = []
        self._process = subprocess.Popen([*command, *more], stderr=subprocess.PIPE, text=True)
        atexit.register(self.close)
        threading.Thread(target=self._follow, daemon=True).start()
        while not (found := [each for each in self.lines if each.startswith("ready")]):
            if self._process.poll() is not None:
                sys.exit("a server ended:\n" + "\n".join(self.lines))
            time.sleep(0.1)
        match = re.search(r"http://\S+/v1", found[0])
        assert match is not None
        self.url, self._name = match[0], model.name

    def batch(self, max_tokens: int) -> float:
        """Tokens per second of all streams together."""
        began_s = time.monotonic()
        with ThreadPoolExecutor(NUM_STREAMS) as pool:
            list(pool.map(self._complete, range(NUM_STREAMS), [max_tokens] * NUM_STREAMS))
        return round(NUM_STREAMS * max_tokens / (time.monotonic() - began_s), 1)

    def until_settled(self, max_tokens: int) -> int:
        """Batches until experts have moved and then stayed for a while."""
        seen, quiet, count = 0, 0, 0
        while (quiet < 5 or not seen) and count < 60:
            self.batch(max_tokens)
            count += 1
            now = sum("is in use" in line for line in self.lines)
            quiet, seen = (quiet + 1 if now == seen else 0), now
        return count

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.terminate()
            self._process.wait()

    def _complete(self, index: int, max_tokens: int) -> None:
        body = {
            "model": self._name,
            "prompt": _prompt(index),
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
        }
        answer = httpx.post(f"{self.url}/completions", json=body, timeout=600)
        if answer.status_code != 200:
            raise RuntimeError(answer.text)

    def _follow(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self.lines.append(line.rstrip())


def _take_turns(
    servers: dict[str, _Server], rounds: int, max_tokens: int
) -> dict[str, list[float]]:
    rates: dict[str, list[float]] = {name: [] for name in servers}
    for number in range(rounds + 1):
        for name, server in servers.items():
            rate = server.batch(max_tokens)
            if number:  # the first one warms up
                rates[name].append(rate)
            sys.stderr.write(f"round {number}, {name}: {rate} tokens/s\n")
    for server in servers.values():
        server.close()
    return rates


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()
