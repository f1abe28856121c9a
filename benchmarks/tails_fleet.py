"""A hundred unequal replicas in the simulator, under every trace, policy by policy.

Of a fleet from catalogue names: what it can carry, what its slowest replica does when it is alone
with a request, and what each policy makes of a share of that load; what stalls cost with hedging
and without. Knows nothing of the live lab.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

from shoal.core.workload import Arrival, Workload, read_workload

MODEL = "llama-3.1-8b"
KINDS = {
    "H100-SXM": 12,
    "A100-40-SXM": 16,
    "L40S": 16,
    "RTX-4090": 20,
    "RTX-3090": 20,
    "L4": 16,
}
SLOW = {"replica-13": 0.6, "replica-45": 0.5, "replica-70": 0.7, "replica-90": 0.6}
"""Slower than the cluster file says, which nobody is told of."""
POLICIES = (
    "round-robin", "weighted", "least-outstanding", "power-of-two", "prefix-aware", "predicted",
)  # fmt: skip
COMPARED = ("ttft p50", "ttft p99", "tpot p50", "tpot p99")
Runs = Sequence[Mapping[str, Any]]
"""Numbers of the same policy, of each part of a trace."""
STALL_S = 2.0
_CROWD = 192
_ALONE = 24


@dataclass(frozen=True, slots=True)
class Fleet:
    """
    Attributes:
        cluster, plan: files.
        events: of replicas that are slower than they should be.
    """

    folder: Path
    cluster: Path
    plan: Path
    events: tuple[Mapping[str, Any], ...]


def fleet(folder: Path) -> Fleet:
    """Hosts of one device each; a replica on each."""
    devices = [kind for kind, count in KINDS.items() for _ in range(count)]
    hosts = [f"  - {{name: h{number}, devices: 1x {kind}}}" for number, kind in enumerate(devices)]
    plan = [
        f"  - stages: [{{devices: [{{device: cuda:0, host: h{number}}}]}}]"
        for number in range(len(devices))
    ]
    network = "network: {latency: 20us, bandwidth: 25Gbit/s}"
    return Fleet(
        folder,
        _write(folder / "fleet.yaml", "\n".join(["hosts:", *hosts, network])),
        _write(folder / "plan.yaml", "\n".join([f"model: {MODEL}", "replicas:", *plan])),
        tuple({"at": 0, "replica": name, "slow": speed} for name, speed in SLOW.items()),
    )


def trace(path: Path, longest: tuple[int, int], first: int, count: int) -> Workload:
    """A part of a trace, its lengths clipped; the first arrival is at 0 s."""
    whole = read_workload(path, Random(0))
    part = whole.arrivals[first : first + count]
    began_s = part[0].arrival_s
    moved = tuple(replace(each, arrival_s=each.arrival_s - began_s) for each in part)
    return Workload(whole.name, moved).clipped(
        max_prompt_tokens=longest[0], max_output_tokens=longest[1]
    )


def capacity(fleet: Fleet, load: Workload) -> float:
    """Requests per second of all replicas, each as if it had a crowd of the load's to itself."""
    total = 0.0
    for kind, count in KINDS.items():
        report = _alone(fleet, kind, load, _CROWD, gap_s=0.0)
        total += count * report["throughput"]["requests_per_s"]
    return total


def unloaded(fleet: Fleet, load: Workload) -> dict[str, float]:
    """Median TTFT and TPOT of single requests at the slowest kind."""
    found = [_alone(fleet, kind, load, _ALONE, gap_s=600.0)["latency_s"] for kind in KINDS]
    return {name: max(each[name]["p50"] for each in found) for name in ("ttft", "tpot")}


def simulated(
    fleet: Fleet, load: Workload, *flags: str, events: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    """The report of `shoal simulate`."""
    return _simulate(fleet.folder, fleet.plan, fleet.cluster, load, *flags, events=events)


def stalls(load: Workload, share: float, rng: Random) -> list[dict[str, Any]]:
    """So many of the requests meet a replica that does nothing for 2 s from then on."""
    count = len(load.arrivals)
    met = sorted(rng.sample(range(count), round(share * count)))
    return [{"request": number, "stall": STALL_S} for number in met]


# --- what is to be shown ---


def policies_verdict(runs: Mapping[str, Runs]) -> list[str]:
    """`predicted` beside least-outstanding, and beside whoever is best at each number."""
    ours = runs["predicted"]
    ratio = mean(ours, "ttft p99") / mean(runs["least-outstanding"], "ttft p99")
    others = {name: each for name, each in runs.items() if name != "predicted"}
    lines = [f"- p99 TTFT of predicted: {ratio:.2f} of least-outstanding's (0.7 asked)"]
    for column in COMPARED:
        value = mean(ours, column)
        best = min(others, key=lambda name: mean(others[name], column))
        lines.append(f"- {column}: {value / mean(others[best], column) - 1:+.1%} of {best}'s")
    best = max(others, key=lambda name: mean(others[name], "goodput"))
    behind = mean(others[best], "goodput") / max(mean(ours, "goodput"), 1e-9) - 1
    return [*lines, f"- goodput of the best other, {best}: {behind:+.1%} of predicted's (3 asked)"]


def stalls_verdict(runs: Mapping[str, Runs]) -> list[str]:
    """What hedging leaves of the longest TTFTs, and what it computes for that."""
    without = mean(runs["no hedging"], "ttft p99.9")
    ratio, least = (mean(runs[name], "ttft p99.9") / without for name in ("hedging", "no stalls"))
    hedges = [run["hedges"] for run in runs["hedging"]]
    extra = sum(each["extra_tokens"] + each["rescued_tokens"] for each in hedges)
    extra /= max(sum(each["computed_tokens"] for each in hedges), 1)
    return [
        f"- p99.9 TTFT with hedging: {ratio:.2f} of that without (0.3 asked); with no stalls at "
        f"all it is {least:.2f}; {extra:.1%} more tokens (5 asked)"
    ]


def mean(runs: Runs, name: str) -> float:
    values = [run[name] for run in runs if run.get(name) is not None]
    return sum(values) / len(values) if values else 0.0


# --- running it ---


def _alone(fleet: Fleet, kind: str, load: Workload, count: int, gap_s: float) -> dict[str, Any]:
    cluster = _write(fleet.folder / "one.yaml", f"devices: 1x {kind}")
    plan = _write(
        fleet.folder / "one_plan.yaml",
        f"model: {MODEL}\nreplicas: [{{stages: [{{devices: [cuda:0]}}]}}]",
    )
    step = max(len(load.arrivals) // count, 1)
    chosen = load.arrivals[::step][:count]
    spread = [replace(each, arrival_s=number * gap_s) for number, each in enumerate(chosen)]
    path = _write(fleet.folder / "one.jsonl", "\n".join(map(_line, spread)))
    return _shoal(
        "simulate", str(plan), "--cluster", str(cluster), "--workload", str(path),
        "--max-waiting", "4096", "--json",
    )  # fmt: skip


def _simulate(
    folder: Path,
    plan: Path,
    cluster: Path,
    load: Workload,
    *flags: str,
    events: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    path = _write(folder / "load.jsonl", "\n".join(map(_line, load.arrivals)))
    said = ["--workload", str(path), "--json", "--max-waiting", "4096"]
    if events:
        said += ["--events", str(_write(folder / "events.yaml", json.dumps(list(events))))]
    return _shoal("simulate", str(plan), "--cluster", str(cluster), *said, *flags)


def _line(arrival: Arrival) -> str:
    return json.dumps(
        {
            "arrival_s": arrival.arrival_s,
            "prompt_tokens": arrival.prompt_tokens,
            "output_tokens": arrival.output_tokens,
            "hash_ids": arrival.block_hashes,
        }
    )


def _shoal(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "shoal", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"shoal {' '.join(arguments)}: {done.stdout}{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _write(path: Path, text: str) -> Path:
    path.write_text(text + "\n")
    return path
