"""The planner: how long it takes, how far from its bound it is, and from exhaustive search.

python benchmarks/planner.py --output FILE [--clusters N]

large        64 devices of 8 kinds, and 1,000, on hosts of several sizes, by several objectives:
             seconds, and the gap to the bound
exhaustive   N random clusters of 2 to 6 devices: how far goodput, price and latency of the plan are
             off the best that exhaustive search finds, or off what nothing can be better than
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

from shoal.cluster.cluster_file import read_cluster
from shoal.core.cluster import Cluster
from shoal.core.latency import Slo
from shoal.model.known_shapes import shape_folder
from shoal.model.spec import read_spec
from shoal.planner.goal import Goal, Objective
from shoal.planner.profiles import Problem
from shoal.planner.search import find_plan

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "property"))

from planner_brute_force import BruteForce  # noqa: E402  (the tests' own, not the planner's)
from random_clusters import random_cluster, random_goal, random_spec  # noqa: E402

KINDS = (
    *("H100-SXM nvlink", "H200-SXM nvlink", "A100-80-SXM nvlink", "A100-40-SXM nvlink"),
    *("L40S pcie4", "A30 pcie4", "RTX-4090 pcie4", "RTX-3090 pcie4"),
)
MODEL = "llama-3.1-70b"
FAST = "{latency: 20us, bandwidth: 100Gbit/s}"
SLOW = "{latency: 500us, bandwidth: 1Gbit/s}"
FLEETS: tuple[tuple[int, int, str, Objective, float | None], ...] = (
    # Devices, on a host, network, objective, rate.
    (64, 8, FAST, "goodput", None),
    (64, 4, FAST, "goodput", None),
    (64, 1, FAST, "goodput", None),
    (64, 8, SLOW, "goodput", None),
    (64, 1, SLOW, "goodput", None),
    (64, 8, FAST, "latency", 5.0),
    (64, 8, FAST, "latency", 20.0),
    (64, 1, FAST, "latency", 5.0),
    (64, 8, FAST, "cost", 20.0),
    (1000, 8, FAST, "goodput", None),
    (1000, 1, FAST, "goodput", None),
    (1000, 8, FAST, "latency", 100.0),
    (1000, 8, FAST, "cost", 300.0),
)
OTHERS: tuple[Objective, ...] = ("cost", "latency")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--clusters", type=int, default=20, help="of the exhaustive search")
    parser.add_argument("--most-devices", type=int, default=6, help="of each of them")
    arguments = parser.parse_args()
    found = {
        "command": f"python benchmarks/planner.py --clusters {arguments.clusters} "
        f"--most-devices {arguments.most_devices}",
        "commit": _commit(),
        "machine": {"cpu": platform.machine(), "cores": os.cpu_count()},
        "large": [large(*each) for each in FLEETS],
        "exhaustive": exhaustive(arguments.clusters, arguments.most_devices),
    }
    arguments.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(json.dumps(found, indent=1) + "\n")


def large(
    num_devices: int, on_host: int, network: str, objective: Objective, rate_per_s: float | None
) -> dict[str, Any]:
    """Hosts of each kind in turn; Llama-3.1-70B, under an SLO where that is asked for."""
    cluster = _cluster(num_devices, on_host, network)
    slo = Slo() if objective == "latency" else Slo(ttft_s=3.0, tpot_s=0.1)
    goal = Goal(
        objective=objective, rate_per_s=rate_per_s, input_tokens=1024, output_tokens=256, slo=slo
    )
    started_s, started_cpu_s = time.perf_counter(), time.process_time()
    outcome = find_plan(Problem(read_spec(shape_folder(MODEL)), cluster, goal))
    return {
        "devices": len(cluster.devices),
        "on_a_host": on_host,
        "network": network,
        "objective": objective,
        "rate_per_s": rate_per_s,
        "seconds": time.perf_counter() - started_s,
        "cpu_seconds": time.process_time() - started_cpu_s,
        "value": outcome.value,
        "requests_per_s": outcome.capacity_per_s,
        "bound": outcome.bound,
        "gap": outcome.gap,
        "replicas": len(outcome.choices),
        "left_out": len(outcome.left_out),
        "looked_at": outcome.num_looked_at,
        "unmet": outcome.unmet,
    }


def exhaustive(num_clusters: int, most_devices: int) -> dict[str, Any]:
    """By seed: the plan of each objective against exhaustive search."""
    rows: list[dict[str, Any]] = []
    seed = 0
    while len(rows) < num_clusters:
        row = _compared(seed, 2 + len(rows) % (most_devices - 1))
        rows += [row] if row else []
        seed += 1
    return {
        "clusters": num_clusters,
        "most_devices": most_devices,
        "worst": {name: max(row["off"][name] or 0.0 for row in rows) for name in rows[0]["off"]},
        "rows": rows,
    }


def _compared(seed: int, num_devices: int) -> dict[str, Any] | None:
    """How far off each objective is, as a share; None: no request keeps the SLO."""
    rng = Random(seed)
    spec, cluster, goal = random_spec(rng), random_cluster(rng, num_devices), random_goal(rng)
    problem, share = Problem(spec, cluster, goal), rng.choice([0.2, 0.5, 0.8])
    started_s = time.process_time()
    search = BruteForce(problem)
    best = search.most_goodput()
    search_s = time.process_time() - started_s
    if not best:
        return None
    started_s = time.process_time()
    off: dict[str, float | None] = {"goodput": 1 - find_plan(problem).value / best}
    planner_s = time.process_time() - started_s
    for objective in OTHERS:
        wanted = replace(goal, objective=objective, rate_per_s=share * best)
        other = replace(problem, goal=wanted)
        started_s = time.process_time()
        least = search.towards(other).least()
        search_s += time.process_time() - started_s
        started_s = time.process_time()
        # Not where its shares of the rate are too coarse for any replica.
        off[objective] = find_plan(other).value / least - 1 if least < math.inf else None
        planner_s += time.process_time() - started_s
    return {
        "seed": seed,
        "devices": num_devices,
        "slo": str(goal.slo),
        "off": off,
        "planner_cpu_s": planner_s,
        "exhaustive_cpu_s": search_s,
    }


def _cluster(num_devices: int, on_host: int, network: str) -> Cluster:
    hosts = "\n".join(
        f"  - {{name: h{index}, devices: {on_host}x {KINDS[index % len(KINDS)]}}}"
        for index in range(num_devices // on_host)
    )
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"shoal-planner-{os.getpid()}.yaml"
    path.write_text(f"hosts:\n{hosts}\nnetwork: {network}\n")
    try:
        return read_cluster(path)
    finally:
        path.unlink()


def _commit() -> str:
    words = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()
