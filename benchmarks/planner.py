"""The planner: how long it takes, how far from its bound it is, and from exhaustive search.

python benchmarks/planner.py --output FILE [--clusters N]

large        64 devices of 8 kinds, and 1,000: seconds, and the gap to the bound
exhaustive   N random clusters of a few devices: the plan against nested loops over all of them
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from random import Random
from typing import Any

from shoal.cluster.catalogue import known_constants
from shoal.cluster.cluster_file import read_cluster
from shoal.core.cluster import Cluster, Device, Host, Link
from shoal.core.latency import Slo
from shoal.core.model_spec import LayerSpec, ModelSpec, RopeSpec
from shoal.model.known_shapes import shape_folder
from shoal.model.spec import read_spec
from shoal.planner.goal import Goal
from shoal.planner.profiles import Problem
from shoal.planner.search import find_plan

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "property"))

from planner_brute_force import BruteForce  # noqa: E402  (the tests' own, not the planner's)

KINDS = (
    *("H100-SXM nvlink", "H200-SXM nvlink", "A100-80-SXM nvlink", "A100-40-SXM nvlink"),
    *("L40S pcie4", "A30 pcie4", "RTX-4090 pcie4", "RTX-3090 pcie4"),
)
MODEL = "llama-3.1-70b"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--clusters", type=int, default=20, help="of the exhaustive search")
    parser.add_argument("--most-devices", type=int, default=3, help="of each of them")
    arguments = parser.parse_args()
    found = {
        "command": f"python benchmarks/planner.py --clusters {arguments.clusters} "
        f"--most-devices {arguments.most_devices}",
        "commit": _commit(),
        "machine": {"cpu": platform.machine(), "cores": os.cpu_count()},
        "large": [large(64), large(1000)],
        "exhaustive": exhaustive(arguments.clusters, arguments.most_devices, Random(0)),
    }
    arguments.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(json.dumps(found, indent=1) + "\n")


def large(num_devices: int) -> dict[str, Any]:
    """Hosts of 8 devices, of each kind in turn; goodput of Llama-3.1-70B under an SLO."""
    cluster = _cluster(num_devices)
    goal = Goal(input_tokens=1024, output_tokens=256, slo=Slo(ttft_s=3.0, tpot_s=0.1))
    started_s, started_cpu_s = time.perf_counter(), time.process_time()
    outcome = find_plan(Problem(read_spec(shape_folder(MODEL)), cluster, goal))
    return {
        "devices": len(cluster.devices),
        "seconds": time.perf_counter() - started_s,
        "cpu_seconds": time.process_time() - started_cpu_s,
        "requests_per_s": outcome.capacity_per_s,
        "bound": outcome.bound,
        "gap": outcome.gap,
        "replicas": len(outcome.choices),
        "left_out": len(outcome.left_out),
        "looked_at": outcome.num_looked_at,
    }


def exhaustive(num_clusters: int, most_devices: int, rng: Random) -> dict[str, Any]:
    """The plan's goodput over the best there is, over random clusters where one request fits."""
    ratios, planner_s, search_s = [], 0.0, 0.0
    while len(ratios) < num_clusters:
        problem = _random_problem(rng, most_devices)
        started_s = time.perf_counter()
        best = BruteForce(problem).most_goodput()
        search_s += time.perf_counter() - started_s
        if not best:
            continue
        started_s = time.perf_counter()
        ratios.append(find_plan(problem).value / best)
        planner_s += time.perf_counter() - started_s
    return {
        "clusters": num_clusters,
        "most_devices": most_devices,
        "worst_ratio": min(ratios),
        "mean_ratio": sum(ratios) / len(ratios),
        "planner_s": planner_s,
        "exhaustive_s": search_s,
    }


def _cluster(num_devices: int) -> Cluster:
    hosts = "\n".join(
        f"  - {{name: h{index}, devices: 8x {KINDS[index % len(KINDS)]}}}"
        for index in range(num_devices // 8)
    )
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"shoal-planner-{os.getpid()}.yaml"
    path.write_text(f"hosts:\n{hosts}\nnetwork: {{latency: 20us, bandwidth: 100Gbit/s}}\n")
    try:
        return read_cluster(path)
    finally:
        path.unlink()


def _random_problem(rng: Random, most_devices: int) -> Problem:
    """Layers up to 12, whole heads, columns in sixteenths; devices from slow to fast."""
    num_layers, num_heads = rng.randint(4, 12), 4
    spec = ModelSpec(
        architecture="LlamaForCausalLM",
        num_layers=num_layers,
        hidden_size=64 * num_heads,
        num_heads=num_heads,
        num_kv_heads=rng.choice([1, 2]),
        head_dim=64,
        ffn_size=512 * rng.randint(1, 6),
        vocab_size=32_000,
        norm_eps=1e-5,
        layers=(LayerSpec(rope=RopeSpec()),) * num_layers,
        max_positions=4096,
        attention_scale=0.125,
        tied_embeddings=False,
    )
    devices = []
    for index in range(rng.randint(2, most_devices)):
        rate = rng.choice([1.0, 0.8, 0.5, 0.25])
        devices.append(
            Device(
                name=f"d{index}",
                kind=f"kind-{rate:g}",
                host="ab"[index % 2],
                device=f"cuda:{index}",
                memory_bytes=rng.choice([80, 110, 150, 400]) << 20,
                bandwidth_bytes_per_s=rate * 100e9,
                flops=(("bfloat16", rate * rng.choice([1e12, 5e12])),),
                precisions=("bfloat16",),
                launch_s=1e-6,
            )
        )
    link = Link(latency_s=rng.choice([2e-6, 20e-6]), bytes_per_s=20e9, kind="pcie4")
    cluster = Cluster(
        hosts=tuple(Host(name=each, link=link) for each in "ab"),
        devices=tuple(devices),
        network=Link(latency_s=rng.choice([20e-6, 300e-6]), bytes_per_s=1e9),
        constants=known_constants(),
    )
    goal = Goal(
        input_tokens=rng.choice([64.0, 400.0]),
        output_tokens=rng.choice([32.0, 128.0]),
        slo=Slo(tpot_s=rng.choice([None, 0.004, 0.02])),
        max_concurrency=8,
    )
    return Problem(spec, cluster, goal)


def _commit() -> str:
    words = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()
