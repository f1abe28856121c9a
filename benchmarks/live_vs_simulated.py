"""A lab's live latencies beside those that `shoal simulate` says, under a trace of Azure.

    python benchmarks/live_vs_simulated.py --trace azure2023_conv.csv --model smollm2-135m \\
        --output benchmarks/results/live_vs_simulated_DATE

For each shape of plan:

    probe --lab          the cluster file: all that the simulator knows of the lab's throttles
    one load             another part of the trace; then probe --from, constants of what ran
    five live repeats    of the trace, by `shoal bench`
    simulate             with the probe's constants, and with those of what ran

The second simulation is judged: p50 and p95 of TTFT and TPOT within 10 % of the repeats' median, or
within their spread.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lab_session import Session, Trace, arguments, azure, conditions, keep

LAB = """\
hosts:
  a: {speed: 0.8, threads: 1}
  b: {speed: 0.4, threads: 1}
  c: {speed: 0.2, threads: 1}
links:
  default: {bandwidth: 1Gbit, latency: 200us}
"""
"""1.4 cores together: of two, the rest is for the server and the load."""
_A, _B, _C = ("{device: cpu, host: %s}" % host for host in "abc")  # noqa: UP031
PLANS = {
    "one worker": f"stages:\n  - {{layers: 0-30, devices: [{_B}]}}\n",
    "two stages": f"stages:\n  - {{layers: 0-20, devices: [{_A}]}}\n"
    f"  - {{layers: 20-30, devices: [{_B}]}}\n",
    "three stages": f"stages:\n  - {{layers: 0-17, devices: [{_A}]}}\n"
    f"  - {{layers: 17-26, devices: [{_B}]}}\n  - {{layers: 26-30, devices: [{_C}]}}\n",
    "two ranks": f"stages:\n  - {{layers: 0-30, devices: [{_A}, {_B}], split: [0.67, 0.33]}}\n",
    "two replicas": f"replicas:\n  - stages: [{{layers: 0-30, devices: [{_B}]}}]\n"
    f"  - stages: [{{layers: 0-30, devices: [{_C}]}}]\n",
}
"""Of SmolLM2: 30 layers."""

METRICS = ("ttft", "tpot")
SHARES = ("p50", "p95")
SHRINK, LONGEST = 4, (384, 96)
BUSY = 0.5
"""Of the busiest instance, where the rate would go in proportion: it is less."""
_TOLERANCE = 0.1
_LOW_RATE = 0.05


def main() -> None:
    parser = arguments((__doc__ or "").splitlines()[0])
    parser.add_argument("--plans", default=",".join(PLANS), help="with commas between them")
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--seconds", type=float, default=40.0, help="of a run, about")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        session = Session(folder=Path(folder), model=args.model, precision=args.precision)
        lab, cluster = session.probed(LAB, args.cluster)
        rows = {}
        for name in args.plans.split(","):
            rows[name] = _row(session, args, lab, cluster, name)
            sys.stderr.write(_table({name: rows[name]}))
        text = cluster.read_text()
    report = {**conditions(sys.argv), "cluster": text, "plans": rows}
    keep(report, _markdown(report), args.output)


def _row(
    session: Session, args: argparse.Namespace, lab: Path, cluster: Path, name: str
) -> dict[str, Any]:
    plan, fitted = session.folder / "plan.yaml", session.folder / "fitted.yaml"
    plan.write_text(f"model: {session.model}\n{PLANS[name]}")
    trace = azure(args.trace, 0, args.requests, SHRINK, LONGEST)
    rate = max(_rate(session, plan, cluster, trace), args.requests / args.seconds / 10)
    count = min(args.requests, max(round(rate * args.seconds), 12))
    judged = Trace(trace.requests[:count]).at_rate(rate).write(session.folder / "judged.jsonl")
    other = azure(args.trace, args.requests, count, SHRINK, LONGEST).at_rate(rate)
    other.write(session.folder / "other.jsonl")
    with session.up(lab, plan) as url:
        session.bench(url, session.folder / "other.jsonl", args.vocab_size)
        session.refit(url, cluster, fitted)
        live = [
            _latencies(session.bench(url, judged, args.vocab_size, "--seed", str(seed)))
            # Of other prompts than the first load's, whose KV is kept.
            for seed in range(1, args.repeats + 1)
        ]
    probed = _latencies(session.simulate(plan, cluster, judged))
    simulated = _latencies(session.simulate(plan, fitted, judged))
    return {
        "rate_per_s": rate,
        "num_requests": count,
        "live": live,
        "probed": probed,
        "simulated": simulated,
        "judged": {key: _judged([run[key] for run in live], simulated[key]) for key in simulated},
        "constants": fitted.read_text().partition("constants:")[2],
    }


def _rate(session: Session, plan: Path, cluster: Path, trace: Trace) -> float:
    """Requests per second at which the busiest instance is half busy, by the probe's constants."""
    slow = trace.at_rate(_LOW_RATE).write(session.folder / "slow.jsonl")
    report = session.simulate(plan, cluster, slow)
    busiest = max(max(each["utilisation"]) for each in report["replicas"])
    return BUSY * _LOW_RATE / busiest


def _latencies(report: Mapping[str, Any]) -> dict[str, float]:
    if report["requests"]["succeeded"] != report["requests"]["planned"]:
        sys.exit(f"not all requests succeeded: {report['requests']}")
    found = report["latency_s"]
    return {f"{metric} {share}": found[metric][share] for metric in METRICS for share in SHARES}


def _judged(live: list[float], simulated: float) -> dict[str, Any]:
    middle = statistics.median(live)
    spread = (max(live) - min(live)) / middle
    error = simulated / middle - 1
    return {
        "live": middle,
        "error": error,
        "spread": spread,
        "within": abs(error) <= max(_TOLERANCE, spread),
    }


def _markdown(report: Mapping[str, Any]) -> str:
    intro = f"`{report['command']}` at {report['commit']}, {report['machine']}\n\n"
    return intro + _table(report["plans"])


def _table(rows: Mapping[str, Any]) -> str:
    lines = [
        "| plan | requests/s | | live, ms | simulated | error | spread of repeats | with the "
        "probe's constants |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        for key, each in row["judged"].items():
            lines.append(
                f"| {name} | {row['rate_per_s']:.2f} | {key} | {each['live'] * 1e3:.1f} | "
                f"{row['simulated'][key] * 1e3:.1f} | {each['error']:+.1%}"
                f"{'' if each['within'] else ' (outside)'} | {each['spread']:.1%} | "
                f"{row['probed'][key] / each['live'] - 1:+.1%} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
