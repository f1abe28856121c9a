"""p50 and p99 behind one door: tables for docs/tails.md, with plots.

    python benchmarks/tails.py fleet --trace azure2023_conv.csv,mooncake.jsonl,servegen.csv \\
        --output benchmarks/results/tails_fleet_DATE
    python benchmarks/tails.py fleet_stalls --trace ... --requests 10000 --longest 2048,256 \\
        --output benchmarks/results/tails_fleet_stalls_DATE
    python benchmarks/tails.py policies --trace azure2023_conv.csv \\
        --output benchmarks/results/tails_policies_DATE
    python benchmarks/tails.py stalls|faults|slowed|long_prompt|overload ...

`fleet` simulates a hundred mixed replicas: every policy on every trace at a share of what the
fleet carries; `fleet_stalls` stalls that one of a hundred requests meets, with hedging and without.
The others run a lab of three replicas of a real model on this machine; each takes minutes, and
wants a quiet machine. `--trace` names several for those of the fleet only.
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

import tails_faults
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
        tails_faults.stalls,
        tails_faults.faults,
        tails_faults.slowed,
        tails_live.long_prompt,
        tails_live.overload,
    )
}

Events = Callable[[Workload], Sequence[Mapping[str, Any]]]
Runs = dict[str, list[dict[str, Any]]]


def main() -> None:
    parser = arguments((__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("fleet", "fleet_stalls", *LIVE))
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--longest", default="8192,1024", help="prompt, output; of a fleet")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--share", type=float, default=0.7, help="of capacity")
    parser.add_argument("--told", action="store_true", help="routers know the SLO; of `policies`")
    parser.add_argument("--rate", type=float, default=1.0, help="requests per second")
    parser.add_argument("--shrink", type=int, default=1, help="lengths are divided by it")
    parser.add_argument("--every", type=float, default=10.0, help="seconds between stalls")
    parser.add_argument("--met", type=float, default=0.01, help="share of requests; of a fleet")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--slo-ttft", type=float, default=4.0)
    parser.add_argument("--slo-tpot", type=float, default=0.25)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.what.startswith("fleet"):
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
    traces = str(args.trace).split(",")
    measure = _policies if args.what == "fleet" else _stalls
    return {
        "traces": {Path(each).name: _on_trace(fleet, Path(each), args, measure) for each in traces}
    }


Run = Callable[..., list[dict[str, Any]]]
"""Of events, a name and flags: numbers of each part of a trace."""


def _on_trace(
    fleet: tails_fleet.Fleet,
    path: Path,
    args: argparse.Namespace,
    measure: Callable[[tails_fleet.Fleet, argparse.Namespace, Run], dict[str, Runs]],
) -> dict[str, Any]:
    """Parts of a trace, the same for whatever is compared."""
    prompt, output = map(int, args.longest.split(","))
    parts = [
        tails_fleet.trace(path, (prompt, output), repeat * args.requests, args.requests)
        for repeat in range(args.repeats)
    ]
    rate = args.share * tails_fleet.capacity(fleet, parts[0])
    alone = tails_fleet.unloaded(fleet, parts[0])
    slo = {"ttft": 3 * alone["ttft"], "tpot": 1.5 * alone["tpot"]}
    bound = f"ttft={slo['ttft'] * 1e3:.0f}ms,tpot={slo['tpot'] * 1e3:.1f}ms"
    loads = [_at_rate(part, rate) for part in parts]

    def runs(events: Events, name: str, *flags: str) -> list[dict[str, Any]]:
        said = ("--slo", bound, *flags)
        found = [
            _short(tails_fleet.simulated(fleet, load, *said, events=events(load))) for load in loads
        ]
        sys.stderr.write(_row(f"{path.name}: {name}", found) + "\n")
        return found

    return {"rate_per_s": rate, "slo_s": slo, **measure(fleet, args, runs)}


def _policies(fleet: tails_fleet.Fleet, args: argparse.Namespace, runs: Run) -> dict[str, Runs]:
    del args
    names = tails_fleet.POLICIES
    found = {name: runs(lambda _: fleet.events, name, "--router-policy", name) for name in names}
    return {"policies": found}


def _stalls(fleet: tails_fleet.Fleet, args: argparse.Namespace, runs: Run) -> dict[str, Runs]:
    del fleet

    def stalls(load: Workload) -> Sequence[Mapping[str, Any]]:
        return tails_fleet.stalls(load, args.met, Random(0))

    found = {
        "hedging": runs(stalls, "stalls, hedging"),
        "no hedging": runs(stalls, "stalls, no hedging", "--no-hedging"),
        "no stalls": runs(lambda _: (), "no stalls"),
    }
    return {"stalls": found}


def _at_rate(load: Workload, rate: float) -> Workload:
    """Where a trace has requests at one instant, they stay together."""
    factor = len(load.arrivals) / rate / max(load.duration_s, 1e-9)
    return load.stretched(factor)


def _short(report: Mapping[str, Any]) -> dict[str, Any]:
    latency = report["latency_s"]
    shares = ("p50", "p99", "p99.9")
    found = {f"{m} {share}": latency[m][share] for m in ("ttft", "tpot") for share in shares}
    kept = {name: report[name] for name in ("requests", "hedges", "cdf") if name in report}
    return {**found, "goodput": report["goodput"]["share"], **kept}


def _page(what: str, found: Mapping[str, Any]) -> str:
    """How latencies are distributed in the first run of each kind."""
    tables = {what: found["runs"]} if "runs" in found else {}
    for name, each in found.get("traces", {}).items():
        tables |= {f"{Path(name).name}: {kind}": each[kind] for kind in _KINDS if kind in each}
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


_KINDS = {"policies": tails_fleet.policies_verdict, "stalls": tails_fleet.stalls_verdict}
_COLUMNS = ("ttft p50", "ttft p99", "ttft p99.9", "tpot p50", "tpot p99")


def _rows(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    lines = [f"| | {' | '.join(_COLUMNS)} | refused | within the SLO |"]
    lines.append("|---" * (len(_COLUMNS) + 3) + "|")
    return [*lines, *(_row(name, each) for name, each in runs.items())]


def _row(name: str, runs: Sequence[Mapping[str, Any]]) -> str:
    cells = (f"{tails_fleet.mean(runs, column) * 1e3:,.1f}" for column in _COLUMNS)
    asked, refused = (sum(run["requests"][key] for run in runs) for key in ("planned", "refused"))
    kept = tails_fleet.mean(runs, "goodput")
    return f"| {name} | {' | '.join(cells)} | {refused / max(asked, 1):.1%} | {kept:.1%} |"


def _fleet_table(found: Mapping[str, Any]) -> str:
    lines = []
    for name, each in found["traces"].items():
        slo = ", ".join(f"{k.upper()} {v * 1e3:.0f} ms" for k, v in each["slo_s"].items())
        lines += [f"{Path(name).name}: {each['rate_per_s']:.1f} requests/s; {slo}; ms", ""]
        for kind, verdict in _KINDS.items():
            if kind in each:
                lines += [*_rows(each[kind]), "", *verdict(each[kind]), ""]
    return "\n".join(lines) + "\n"


def _live_table(found: Mapping[str, Any]) -> str:
    if "runs" in found:
        return "\n".join(_rows(found["runs"])) + "\n"
    return "\n".join(f"- {name}: {value}" for name, value in found.items()) + "\n"


if __name__ == "__main__":
    main()
