"""Plans for a lab of three speeds, measured beside the even split and splits by hand.

    python benchmarks/lab_plans.py --trace azure2023_conv.csv --model smollm2-135m \\
        --output benchmarks/results/lab_plans_DATE

    probe --lab     the cluster file: all that the planner knows of the lab's throttles
    plan            one for latency at a rate, one for goodput
    lab up, bench   each plan and each split by hand: mean E2E at the rate, and requests per second
                    of a crowd that comes all at once
    again           the plans, the even split and the best by hand, several times

A split by hand may beat a plan by no more than 5 %, or than the live runs differ.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab_session import Session, Trace, arguments, azure, conditions, keep

LAB = """\
hosts:
  a: {speed: 0.8, threads: 1}
  b: {speed: 0.4, threads: 1}
  c: {speed: 0.2, threads: 1}
links:
  default: {bandwidth: 100Mbit, latency: 500us}
"""
"""1.4 cores together: of two, the rest is for the server and the load."""
NUM_LAYERS = 30
SHRINK, LONGEST = 4, (256, 64)
RUNNING = 32
"""Sequences of a replica at one time."""
_TOLERANCE = 0.05
_PART = 3
"""Of the crowd, as a divisor: what the sweep is measured with."""
EVEN = "even: 10/10/10"
PLANNED = {"latency": "planned for latency", "goodput": "planned for goodput"}


@dataclass(frozen=True, slots=True)
class Loads:
    """One at a rate that is easy to carry, one that comes all at once; and a short part of that."""

    calm: Path
    crowd: Path
    few: Path


def main() -> None:
    parser = arguments((__doc__ or "").splitlines()[0])
    parser.add_argument("--rate", type=float, default=0.5, help="where latency is measured")
    parser.add_argument("--requests", type=int, default=10)
    parser.add_argument("--crowd", type=int, default=144, help="requests, for throughput")
    parser.add_argument("--step", type=int, default=6, help="layers by which pipelines differ")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        session = Session(folder=Path(folder), model=args.model, precision=args.precision)
        lab, cluster = session.probed(LAB, args.cluster)
        loads, lengths = _loads(session, args)
        plans = _planned(session, cluster, args, lengths)
        said = {name: text for name, (_, text) in plans.items()}
        files = {name: plan for name, (plan, _) in plans.items()}
        for name, stages in by_hand(args.step):
            files[name] = session.folder / f"{len(files)}.yaml"
            files[name].write_text(f"model: {session.model}\n{stages}")
        first = {
            name: _measured(session, args, lab, plan, (loads.calm, loads.few), 1)
            for name, plan in files.items()
        }
        again = {
            name: _measured(
                session, args, lab, files[name], (loads.calm, loads.crowd), args.repeats
            )
            for name in _finalists(first)
        }
        texts = {name: files[name].read_text() for name in PLANNED.values()}
        report = {
            **conditions(sys.argv),
            "cluster": cluster.read_text(),
            "plans": texts,
            "said": said,
            "sweep": first,
            "again": again,
        }
    keep(report, _markdown(report), args.output)


def by_hand(step: int) -> Iterator[tuple[str, str]]:
    """Plans without a planner: pipelines, tensor parallelism, replicas, mixtures."""
    yield EVEN, _stages((10, 10, 10))
    parts = range(0, NUM_LAYERS + 1, step)
    for layers in itertools.product(parts, repeat=3):
        if sum(layers) == NUM_LAYERS and layers[0]:
            yield "pipeline: " + "/".join(map(str, layers)), _stages(layers)
    whole = f"layers: 0-{NUM_LAYERS}"
    for weights in ([0.5, 0.5], [0.67, 0.33], [0.8, 0.2]):
        yield (
            f"two ranks: {weights}",
            f"stages: [{{{whole}, devices: [{_device('a')}, {_device('b')}], split: {weights}}}]\n",
        )
    yield (
        "two ranks, then one",
        f"stages:\n  - {{layers: 0-26, devices: [{_device('a')}, {_device('b')}], "
        f"split: [0.67, 0.33]}}\n  - {{layers: 26-30, devices: [{_device('c')}]}}\n",
    )
    alone = [f"  - stages: [{{{whole}, devices: [{_device(host)}]}}]\n" for host in "abc"]
    yield "three replicas", "replicas:\n" + "".join(alone)
    yield "two replicas: a, b", "replicas:\n" + "".join(alone[:2])


def _stages(layers: tuple[int, ...]) -> str:
    ends = list(itertools.accumulate(layers, initial=0))
    rows = [
        f"  - {{layers: {start}-{stop}, devices: [{_device(host)}]}}\n"
        for host, (start, stop) in zip("abc", itertools.pairwise(ends), strict=True)
        if start < stop
    ]
    return "stages:\n" + "".join(rows)


def _device(host: str) -> str:
    return f"{{device: cpu, host: {host}}}"


def _loads(session: Session, args: argparse.Namespace) -> tuple[Loads, tuple[float, float]]:
    """And the mean lengths of prompts and answers."""
    calm = azure(args.trace, 0, args.requests, SHRINK, LONGEST).at_rate(args.rate)
    crowd = azure(args.trace, args.requests, args.crowd, SHRINK, LONGEST)
    at_once = Trace(tuple((0.0, *rest) for _, *rest in crowd.requests))
    everyone = [*calm.requests, *crowd.requests]
    lengths = tuple(statistics.mean(each[n] for each in everyone) for n in (1, 2))
    folder = session.folder
    few = Trace(at_once.requests[: args.crowd // _PART])
    loads = Loads(
        calm.write(folder / "calm.jsonl"),
        at_once.write(folder / "crowd.jsonl"),
        few.write(folder / "few.jsonl"),
    )
    return loads, (lengths[0], lengths[1])


def _planned(
    session: Session, cluster: Path, args: argparse.Namespace, lengths: tuple[float, float]
) -> dict[str, tuple[Path, str]]:
    """The file of each plan, and what the planner says of it."""
    shape = ("--isl", str(lengths[0]), "--osl", str(lengths[1]), "--max-num-seqs", str(RUNNING))
    wanted = {
        PLANNED["latency"]: ("--objective", "latency", "--rate", str(args.rate)),
        PLANNED["goodput"]: ("--objective", "goodput"),
    }
    found = {}
    for number, (name, flags) in enumerate(wanted.items()):
        path = session.folder / f"planned-{number}.yaml"
        found[name] = path, session.plan(cluster, path, *shape, *flags, "--explain")
    return found


def _measured(
    session: Session,
    args: argparse.Namespace,
    lab: Path,
    plan: Path,
    loads: tuple[Path, Path],
    times: int,
) -> dict[str, list[float]]:
    """Mean seconds of a request in the calm load, and requests per second of the crowd."""
    latency, rate = [], []
    # As who plans by a cluster file serves by it: the router knows how fast replicas should be.
    told = ("--max-num-seqs", str(RUNNING), "--cluster", str(session.folder / "cluster.yaml"))
    with session.up(lab, plan, *told) as url:
        for number in range(times):
            # Of other prompts each time: what was computed once is kept.
            seed = ("--seed", str(number))
            calm = session.bench(url, loads[0], args.vocab_size, *seed)
            crowd = session.bench(url, loads[1], args.vocab_size, *seed)
            for report in (calm, crowd):
                if report["requests"]["succeeded"] != report["requests"]["planned"]:
                    sys.exit(f"not all requests succeeded: {report['requests']}")
            latency.append(calm["latency_s"]["e2e"]["mean"])
            rate.append(crowd["throughput"]["requests_per_s"])
    sys.stderr.write(f"{plan.name}: {latency} s, {rate} requests/s\n")
    return {"latency_s": latency, "requests_per_s": rate}


def _finalists(first: Mapping[str, Mapping[str, list[float]]]) -> list[str]:
    """Plans, the even split, and the two best by hand of each kind."""
    hand = [name for name in first if name not in PLANNED.values()]
    quick = sorted(hand, key=lambda name: first[name]["latency_s"][0])[:2]
    busy = sorted(hand, key=lambda name: -first[name]["requests_per_s"][0])[:2]
    return list(dict.fromkeys([*PLANNED.values(), EVEN, *quick, *busy]))


def _markdown(report: Mapping[str, Any]) -> str:
    lines = [
        f"`{report['command']}` at {report['commit']}, {report['machine']}",
        "",
        "| plan | mean E2E, s | spread | requests/s | spread |",
        "|---|---|---|---|---|",
    ]
    for name, found in report["again"].items():
        cells = (
            f"{statistics.median(found[key]):.3f} | {_spread(found[key]):.1%}"
            for key in ("latency_s", "requests_per_s")
        )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", *_verdicts(report["again"]), "", "The sweep, each once:", ""]
    lines += ["| plan | mean E2E, s | requests/s |", "|---|---|---|"]
    lines += [
        f"| {name} | {found['latency_s'][0]:.3f} | {found['requests_per_s'][0]:.3f} |"
        for name, found in report["sweep"].items()
    ]
    return "\n".join(lines) + "\n"


def _verdicts(again: Mapping[str, Mapping[str, list[float]]]) -> Iterator[str]:
    for goal, key, sign in (("latency", "latency_s", 1), ("goodput", "requests_per_s", -1)):
        own = again[PLANNED[goal]][key]
        hand = {name: each[key] for name, each in again.items() if name not in PLANNED.values()}
        best = min(hand, key=lambda name: sign * statistics.median(hand[name]))
        ahead = sign * (statistics.median(own) / statistics.median(hand[best]) - 1)
        even = sign * (statistics.median(own) / statistics.median(hand[EVEN]) - 1)
        allowed = max(_TOLERANCE, _spread(own), _spread(hand[best]))
        yield (
            f"- {goal}: the plan is {-even:+.1%} against the even split"
            f"{'' if even < 0 else ' (not better)'}; the best by hand ({best}) is {ahead:+.1%} "
            f"against the plan, allowed is {allowed:.1%}{'' if ahead <= allowed else ' (beaten)'}"
        )


def _spread(values: list[float]) -> float:
    return (max(values) - min(values)) / statistics.median(values)


if __name__ == "__main__":
    main()
