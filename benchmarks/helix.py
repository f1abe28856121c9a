"""The 24 machines of Helix (ASPLOS'25) in our simulator: its placement, and our plans.

    python benchmarks/helix.py reference/helix24 traces/azure2023_conv.csv -o benchmarks/results

offline    everything is asked for at once; tokens per second from 60 s on, without first tokens
online     Poisson arrivals, at half of Helix's published offline throughput

The folder has Helix's cluster file, per-layer times and placement (Thesys-lab/Helix-ASPLOS25
@148b733, Apache-2.0). Requests are those that Helix keeps of Azure's conversations: 4 to 2048
tokens in, 4 to 1024 out. Memory that a device has for weights, KV and activations follows from the
KV blocks that Helix's simulator gives it (`vllm_num_blocks_dict`), not from its nominal size.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import Any

from shoal.cluster.cluster_file import read_cluster
from shoal.cluster.helix_placement import read_placement
from shoal.core.cluster import Cluster
from shoal.core.latency import percentile
from shoal.core.model_spec import ModelSpec
from shoal.core.plan import Plan
from shoal.core.workload import Arrival, Workload, read_workload
from shoal.model.known_shapes import shape_folder
from shoal.model.spec import read_spec
from shoal.planner.goal import Goal, Objective
from shoal.planner.placement import placed_replica
from shoal.planner.profiles import Problem
from shoal.planner.search import Outcome, find_plan
from shoal.planner.to_plan import to_plan
from shoal.sim import Simulation
from shoal.sim.from_plan import Limits, replica_setups
from shoal.sim.records import Records

MODELS = {"llama-2-70b": "helix_placement_70b.ini", "llama-30b": None}
USABLE_BYTES = {"A100-40-SXM": 34.8e9, "L4": 19.6e9, "T4": 11.9e9}
"""Helix's blocks of 16 tokens x their bytes + weights of as many layers of Llama-2-70B (A100:
498326 blocks at 1 layer, 17591 at 12; L4: 266146 at 1, 15634 at 7; T4: 17566 at 4, the least); and
0.45 GB that activations take here, which its blocks have left out already."""
PUBLISHED = {
    "llama-2-70b": {
        "Helix": {"offline": 252.1, "online": 141.6, "decode_p50_s": 0.98, "prompt_p50_s": 2.64},
        "Swarm": {"offline": 124.7, "online": 69.8, "decode_p50_s": 1.04},
        "separate": {"offline": 124.3, "online": 84.0, "decode_p50_s": 0.22, "prompt_p50_s": 0.80},
    },
    "llama-30b": {
        "Helix": {"offline": 339.6, "online": 216.7},
        "Swarm": {"offline": 151.6, "online": 104.9},
        "separate": {"offline": 309.0, "online": 189.8},
    },
}
"""Decode tokens per second in Helix's own simulator."""
WARM_UP_S = 60.0
MAX_SEQS = 512
STEP_TOKENS = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("trace", type=Path)
    parser.add_argument("-o", "--output", type=Path, help="a folder for the results")
    parser.add_argument("--seconds", type=float, default=600.0, help="simulated, after warming up")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    args = parser.parse_args()
    kept = _kept(args.trace)
    cluster = _usable(read_cluster(args.folder / "cluster24.ini"))
    started_s = time.process_time()
    models = {}
    for name in args.models:
        placement = MODELS[name]
        path = None if placement is None else args.folder / placement
        models[name] = _model(name, cluster, path, kept, args.seconds)
    report = {
        "what": "24 machines of Helix: 4x A100-40, 8x L4, 12x T4, 1e9 bytes/s and 1 ms between any",
        "command": f"python benchmarks/helix.py reference/helix24 traces/{args.trace.name} "
        f"--seconds {args.seconds:g} --models {' '.join(args.models)}",
        "commit": _commit(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, one used",
        "cpu_s": round(time.process_time() - started_s, 1),
        "requests": {"kept": len(kept), "max_num_seqs": MAX_SEQS, "step_tokens": STEP_TOKENS},
        "usable_bytes": USABLE_BYTES,
        "published": {name: PUBLISHED[name] for name in args.models},
        "simulated": models,
    }
    sys.stdout.write(_table(report))
    if args.output is not None:
        stem = args.output / f"helix24_{datetime.now(tz=UTC):%Y-%m-%d}"
        stem.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
        stem.with_suffix(".md").write_text(_table(report))


def _model(
    name: str, cluster: Cluster, placement: Path | None, kept: Sequence[Arrival], seconds: float
) -> dict[str, Any]:
    spec = read_spec(shape_folder(name))
    published = PUBLISHED[name]["Helix"]["offline"]
    tokens = sum(each.output_tokens for each in kept) / len(kept)
    rate = published / 2 / tokens
    rows: dict[str, Any] = {}
    if placement is not None:
        replica = placed_replica(
            read_placement(placement, cluster), _problem(spec, cluster, kept, "goodput", None)
        )
        found = _simulated(spec, cluster, Plan(replicas=(replica,)), _offline(kept), seconds)
        rows["Helix's placement, offline"] = {**found, "routes": len(replica.routes)}
    most = find_plan(_problem(spec, cluster, kept, "goodput", None))
    found = _simulated(spec, cluster, _plan(most), _offline(kept), seconds)
    rows["shoal plan, offline"] = {**found, **_described(most, tokens)}
    quick = find_plan(_problem(spec, cluster, kept, "latency", rate))
    online = _online(kept, rate, WARM_UP_S + seconds)
    found = _simulated(spec, cluster, _plan(quick), online, seconds)
    rows[f"shoal plan, online at {published / 2:.0f} tok/s"] = {
        **found,
        **_described(quick, tokens),
    }
    return rows


def _problem(
    spec: ModelSpec,
    cluster: Cluster,
    kept: Sequence[Arrival],
    objective: Objective,
    rate_per_s: float | None,
) -> Problem:
    goal = Goal(
        objective=objective,
        rate_per_s=rate_per_s,
        input_tokens=sum(each.prompt_tokens for each in kept) / len(kept),
        output_tokens=sum(each.output_tokens for each in kept) / len(kept),
        max_tokens=max(each.prompt_tokens + each.output_tokens for each in kept),
        precisions=("float16",),
        max_concurrency=MAX_SEQS,
    )
    return Problem(spec, cluster, goal)


def _plan(outcome: Outcome) -> Plan:
    return to_plan(outcome.choices, outcome.problem.cluster, None)


def _described(outcome: Outcome, output_tokens: float) -> dict[str, Any]:
    return {
        "predicted_tok_per_s": round(outcome.capacity_per_s * output_tokens, 1),
        "bound_tok_per_s": round(outcome.bound * output_tokens, 1),
        "devices_left_out": len(outcome.left_out),
        "replicas": [
            [
                f"{segment.num_instances}x {segment.group.kinds}: {layers} layers"
                for segment, layers in zip(
                    choice.chain.segments, choice.operation.layers, strict=True
                )
            ]
            for choice in outcome.choices
        ],
    }


def _simulated(
    spec: ModelSpec, cluster: Cluster, plan: Plan, load: Workload, seconds: float
) -> dict[str, Any]:
    limits = Limits(
        max_num_seqs=MAX_SEQS,
        max_num_batched_tokens=STEP_TOKENS,
        max_waiting=len(load.arrivals),
        prefix_caching=False,
        precision="float16",
    )
    setups = replica_setups(plan, spec, cluster, limits)
    simulation = Simulation(load, setups, Random(0), max_waiting=len(load.arrivals))
    end_s = WARM_UP_S + seconds
    sys.stderr.write(f"{load.name}, {len(plan.replicas)} replicas, {end_s:g} s ...\n")
    records = simulation.run(end_s)
    firsts = [r.first_s for r in records.requests if r.first_s is not None]
    first_tokens = sum(WARM_UP_S <= each <= end_s for each in firsts)
    produced = _tokens_at(records, end_s) - _tokens_at(records, WARM_UP_S) - first_tokens
    ttfts = sorted(r.ttft_s for r in records.requests if r.ttft_s is not None)
    return {
        "decode_tok_per_s": round(produced / seconds, 1),
        "decode_p50_s": round(records.gaps.percentile(50), 3),
        "decode_p95_s": round(records.gaps.percentile(95), 3),
        "prompt_p50_s": round(percentile(ttfts, 50), 2),
        "preemptions": sum(each.preemptions for each in simulation.stats().values()),
    }


def _tokens_at(records: Records, at_s: float) -> float:
    """Output tokens by then, on a straight line between two looks."""
    before = (0.0, 0)
    for sample in records.samples:
        now = sample.at_s, sum(each.output_tokens for each in sample.replicas)
        if now[0] >= at_s:
            share = (at_s - before[0]) / max(now[0] - before[0], 1e-9)
            return before[1] + share * (now[1] - before[1])
        before = now
    return before[1]


def _kept(path: Path) -> list[Arrival]:
    every = read_workload(path, Random(0)).arrivals
    return [
        each
        for each in every
        if 4 <= each.prompt_tokens <= 2048 and 4 <= each.output_tokens <= 1024
    ]


def _offline(kept: Sequence[Arrival]) -> Workload:
    """More than can be done in the time, in random order."""
    chosen = Random(0).sample(list(kept), 4000)
    return Workload("offline", tuple(replace(each, arrival_s=0.0) for each in chosen))


def _online(kept: Sequence[Arrival], rate_per_s: float, seconds: float) -> Workload:
    """A Poisson load of that rate."""
    rng, at_s, arrivals = Random(0), 0.0, []
    while (at_s := at_s + rng.expovariate(rate_per_s)) <= seconds:
        arrivals.append(replace(rng.choice(kept), arrival_s=at_s))
    return Workload("online", tuple(arrivals))


def _usable(cluster: Cluster) -> Cluster:
    devices = [replace(each, memory_bytes=int(USABLE_BYTES[each.kind])) for each in cluster.devices]
    return replace(cluster, devices=tuple(devices))


def _table(report: dict[str, Any]) -> str:
    lines = [
        f"Decode on {report['what']}.",
        f"`{report['command']}`, commit {report['commit']}, {report['machine']}.",
        "",
        "| model | | decode tok/s | p50 of a token, s | p50 of a prompt, s |",
        "|---|---|---|---|---|",
    ]
    for model, methods in report["published"].items():
        for method, each in methods.items():
            for mode in ("offline", "online"):
                times = [each.get("decode_p50_s", "-"), each.get("prompt_p50_s", "-")]
                shown = times if mode == "online" else ["-", "-"]
                lines.append(
                    f"| {model} | {method}, published, {mode} | {each[mode]} | {shown[0]} "
                    f"| {shown[1]} |"
                )
        for what, each in report["simulated"][model].items():
            prompt = "-" if "offline" in what else each["prompt_p50_s"]
            lines.append(
                f"| {model} | {what}, simulated | {each['decode_tok_per_s']} "
                f"| {each['decode_p50_s']} | {prompt} |"
            )
    return "\n".join(lines) + "\n"


def _commit() -> str:
    words = ["git", "-C", str(Path(__file__).parent), "describe", "--always"]
    return subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()


if __name__ == "__main__":
    main()
