"""p50 and p99 behind one door: tables for docs/tails.md, with plots.

    python benchmarks/tails.py fleet --traces azure2023_conv.csv,mooncake.jsonl,servegen.csv \\
        --output benchmarks/results/tails_fleet_DATE
    python benchmarks/tails.py policies --trace azure2023_conv.csv \\
        --output benchmarks/results/tails_policies_DATE
    python benchmarks/tails.py stalls|faults|slowed|long_prompt|overload ...

`fleet` simulates a hundred mixed replicas: every policy on every trace at a share of what the
fleet carries, then stalls with hedging and without. The others run a lab of three replicas of a
real model on this machine; each takes minutes, and wants a quiet machine.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from random import Random
from typing import Any

import tails_fleet
import tails_live
from lab_session import Session, arguments, conditions, keep

from shoal.core.workload import Workload
from shoal.sim.page import document
from shoal.sim.plots import Line, plot

LIVE: dict[str, Callable[[Session, argparse.Namespace], dict[str, Any]]] = {
    each.__name__: each
    for each in (
        tails_live.policies,
        tails_live.stalls,
        tails_live.faults,
        tails_live.slowed,
        tails_live.long_prompt,
        tails_live.overload,
    )
}
LONGEST = (8192, 1024)


def main() -> None:
    parser = arguments((__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("fleet", *LIVE))
    parser.add_argument("--traces", default="", help="of `fleet`; with commas between them")
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--share", type=float, default=0.7, help="of capacity")
    parser.add_argument("--rate", type=float, default=1.0, help="requests per second")
    parser.add_argument("--shrink", type=int, default=1, help="lengths are divided by it")
    parser.add_argument("--every", type=float, default=10.0, help="seconds between stalls")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--slo-ttft", type=float, default=4.0)
    parser.add_argument("--slo-tpot", type=float, default=0.25)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.what == "fleet":
            found = _fleet(Path(folder), args)
            table = _fleet_table(found)
        else:
            session = Session(folder=Path(folder), model=args.model, precision=args.precision)
            found = LIVE[args.what](session, args)
            table = _live_table(found)
    report = {**conditions(sys.argv), **found}
    if args.output is not None and ("runs" in found or "traces" in found):
        args.output.with_suffix(".html").write_text(_page(args.what, found))
    intro = f"`{report['command']}` at {report['commit']}, {report['machine']}\n\n"
    keep(report, intro + table, args.output)


def _fleet(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    fleet = tails_fleet.fleet(folder)
    return {"traces": {name: _on_trace(fleet, Path(name), args) for name in args.traces.split(",")}}


def _on_trace(fleet: tails_fleet.Fleet, path: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Parts of a trace, the same for every policy."""
    parts = [
        tails_fleet.trace(path, LONGEST, repeat * args.requests, args.requests)
        for repeat in range(args.repeats)
    ]
    rate = args.share * tails_fleet.capacity(fleet, parts[0])
    alone = tails_fleet.unloaded(fleet, parts[0])
    slo = {"ttft": 3 * alone["ttft"], "tpot": 1.5 * alone["tpot"]}
    bound = f"ttft={slo['ttft'] * 1e3:.0f}ms,tpot={slo['tpot'] * 1e3:.1f}ms"
    loads = [_at_rate(part, rate) for part in parts]
    policies = {
        name: [
            _short(tails_fleet.simulated(
                fleet, load, "--router-policy", name, "--slo", bound, events=fleet.events
            ))
            for load in loads
        ]
        for name in tails_fleet.POLICIES
    }  # fmt: skip
    hedged = {
        name: [_short(_stalled(fleet, load, bound, *flags)) for load in loads]
        for name, flags in (("hedging", ()), ("no hedging", ("--no-hedging",)))
    }
    return {"rate_per_s": rate, "slo_s": slo, "policies": policies, "stalls": hedged}


def _stalled(fleet: tails_fleet.Fleet, load: Workload, bound: str, *flags: str) -> dict[str, Any]:
    """One replica of a hundred stalls every 4 s: one request in a hundred meets that, about."""
    stalls = tails_fleet.stalls(fleet, load.duration_s, 2.0, Random(0))
    return tails_fleet.simulated(fleet, load, "--slo", bound, *flags, events=stalls)


def _at_rate(load: Workload, rate: float) -> Workload:
    """Where a trace has requests at one instant, they stay together."""
    factor = len(load.arrivals) / rate / max(load.duration_s, 1e-9)
    return load.stretched(factor)


def _short(report: Mapping[str, Any]) -> dict[str, Any]:
    latency = report["latency_s"]
    shares = ("p50", "p99", "p99.9")
    found = {f"{m} {share}": latency[m][share] for m in ("ttft", "tpot") for share in shares}
    kept = {name: report[name] for name in ("requests", "hedging", "cdf") if name in report}
    return {**found, "goodput": report["goodput"]["share"], **kept}


def _mean(runs: Sequence[Mapping[str, Any]], name: str) -> float:
    values = [run[name] for run in runs if run.get(name) is not None]
    return sum(values) / len(values) if values else 0.0


def _page(what: str, found: Mapping[str, Any]) -> str:
    """How latencies are distributed in the first run of each kind."""
    tables = {what: found["runs"]} if "runs" in found else {}
    for name, each in found.get("traces", {}).items():
        tables[f"{Path(name).name}: policies"] = each["policies"]
        tables[f"{Path(name).name}: stalls"] = each["stalls"]
    body = [f"<h1>{what}</h1>"]
    for title, runs in tables.items():
        body.append(f'<h2>{escape(title)}</h2><div class="plots">')
        for metric in ("ttft", "tpot"):
            lines = [
                Line(name, each[0]["cdf"][metric], list(range(101)))
                for name, each in runs.items()
                if each[0]["cdf"][metric]
            ]
            body.append(plot(f"{metric.upper()}, s", lines, "% of requests"))
        body.append("</div>")
    return document(what, body)


_COLUMNS = ("ttft p50", "ttft p99", "ttft p99.9", "tpot p50", "tpot p99")


def _rows(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    lines = [f"| | {' | '.join(_COLUMNS)} | within the SLO |", "|---" * (len(_COLUMNS) + 2) + "|"]
    for name, each in runs.items():
        cells = (f"{_mean(each, column) * 1e3:,.1f}" for column in _COLUMNS)
        lines.append(f"| {name} | {' | '.join(cells)} | {_mean(each, 'goodput'):.1%} |")
    return lines


def _fleet_table(found: Mapping[str, Any]) -> str:
    lines = []
    for name, each in found["traces"].items():
        slo = ", ".join(f"{k.upper()} {v * 1e3:.0f} ms" for k, v in each["slo_s"].items())
        lines += [f"{Path(name).name}: {each['rate_per_s']:.1f} requests/s; {slo}; ms", ""]
        lines += [*_rows(each["policies"]), ""]
        lines += ["Replicas stall for 2 s:", "", *_rows(each["stalls"]), ""]
    return "\n".join(lines) + "\n"


def _live_table(found: Mapping[str, Any]) -> str:
    if "runs" in found:
        return "\n".join(_rows(found["runs"])) + "\n"
    return "\n".join(f"- {name}: {value}" for name, value in found.items()) + "\n"


if __name__ == "__main__":
    main()
