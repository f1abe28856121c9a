"""How near the simulator comes to a measured run, and how fast it is.

    python benchmarks/simulator.py measured reference/measured/rtx4090_llama8b -o FILE
    python benchmarks/simulator.py speed traces/azure2023_conv.csv -o FILE
    python benchmarks/simulator.py million traces/azure2023_conv.csv --share 0.1 -o FILE

`measured`: requests.jsonl and meta.json of casys-kaist/LLMServingSim (MIT): 300 requests on vLLM,
Llama-3.1-8B on an RTX 4090. Three constants of the device are fitted until the simulated first 100
requests come as the measured ones did; the others are judged. `speed`: an hour of a trace over 8
replicas, and a part of it stepwise. `million`: requests of a trace's lengths, one a second for each
of 1,000 devices with a replica each; a share of a million.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from shoal.cluster import catalogue
from shoal.core.cluster import Cluster, Constants, Host
from shoal.core.latency import percentile
from shoal.core.plan import InstancePlan, RankPlan, ReplicaPlan, StagePlan, default_routes
from shoal.core.request import Output
from shoal.core.split import Range, split_by_weights
from shoal.core.stats import Computed
from shoal.core.workload import Arrival, Workload, poisson_workload, read_workload
from shoal.engine.config import EngineConfig
from shoal.engine.events import Submit
from shoal.model.known_shapes import shape_folder
from shoal.model.spec import read_spec
from shoal.policy.cost_model import Numbers, ReplicaCost
from shoal.sim import ModelledCost, ReplicaSetup, Simulation, summarise
from shoal.sim.prompts import Prompts
from shoal.sim.records import Records, RequestRecord
from shoal.sim.replica import SimulatedReplica

NUM_FITTED, NUM_SIMULATED_TO_FIT = 100, 130
NUM_DEVICES = 1000
METRICS = ("ttft", "tpot", "e2e")
SPEC = read_spec(shape_folder("llama-3.1-8b"))


@dataclass(frozen=True, slots=True)
class Measured:
    """A request as it went: seconds since the first came, and its latencies."""

    arrival: Arrival
    ttft_s: float
    tpot_s: float
    e2e_s: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("what", choices=("measured", "speed", "million"))
    parser.add_argument("path", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=None, help="a file for the JSON")
    parser.add_argument("--share", type=float, default=1.0, help="of a million requests")
    args = parser.parse_args()
    if args.what == "million":
        found = million(args.path, args.share)
    else:
        found = against_measured(args.path) if args.what == "measured" else speed(args.path)
    flags = f" --share {args.share:g}" if args.what == "million" else ""
    report = {
        "command": f"python benchmarks/simulator.py {args.what} {args.path.name}{flags}",
        "commit": _commit(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, one used",
        **found,
    }
    text = json.dumps(report, indent=1)
    if args.output is not None:
        args.output.write_text(text + "\n")
    sys.stdout.write(text + "\n")


# --- against measured requests ---


def against_measured(folder: Path) -> dict[str, Any]:
    meta = json.loads((folder / "meta.json").read_text("utf-8"))
    measured = _read(folder / "requests.jsonl")
    setup = _setup_of(meta)
    fitted, errors = _fit(measured, setup)
    records = _simulate(measured, setup(fitted))
    return {
        "what": f"{meta['model']} on {meta['hardware']['device_name']}, vLLM "
        f"{meta['vllm_version']}: {len(measured)} requests, constants fitted on the first "
        f"{NUM_FITTED}",
        "constants": {"eta": fitted[0], "layer_s": fitted[1], "mfu": fitted[2]},
        "errors_fitted": errors,
        "fitted": _compared(measured[:NUM_FITTED], records[:NUM_FITTED]),
        "judged": _compared(measured[NUM_FITTED:], records[NUM_FITTED:]),
        "all": _compared(measured, records),
    }


def _read(path: Path) -> list[Measured]:
    rows = sorted(map(json.loads, path.read_text("utf-8").splitlines()), key=_queued)
    start_s = _queued(rows[0])
    return [
        Measured(
            Arrival(
                arrival_s=row["queued_ts"] - start_s,
                prompt_tokens=row["input_toks"],
                output_tokens=row["output_toks"],
            ),
            row["first_token_ts"] - row["queued_ts"],
            (row["last_token_ts"] - row["first_token_ts"]) / max(row["output_toks"] - 1, 1),
            row["last_token_ts"] - row["queued_ts"],
        )
        for row in rows
    ]


def _queued(row: dict[str, float]) -> float:
    return row["queued_ts"]


Point = tuple[float, float, float]
"""eta, seconds of a layer, mfu."""
START: Point = (0.9, 40e-6, 0.6)
NUM_ROUNDS, NUDGE = 3, 0.05


def _setup_of(meta: dict[str, Any]) -> Callable[[Point], ReplicaSetup]:
    """From constants to a replica as the measured engine was set up."""
    given = meta["engine_kwargs"]
    config = EngineConfig(
        instance_blocks=(meta["kv_cache"]["num_gpu_blocks"],),
        max_model_len=given["max_model_len"],
        vocab_size=SPEC.vocab_size,
        max_num_seqs=given["max_num_seqs"],
        max_num_batched_tokens=given["max_num_batched_tokens"],
        max_waiting=10_000,
        batching="continuous",
        prefix_caching=meta["kv_cache"]["enable_prefix_caching"],
    )
    cluster, replica = _one_gpu("RTX-4090")
    (device,) = cluster.devices

    def setup(point: Point) -> ReplicaSetup:
        eta, layer_s, mfu = point
        constants = Constants(
            kind="RTX-4090",
            engine="vllm",
            precision="bfloat16",
            bandwidth_bytes_per_s=device.bandwidth_bytes_per_s,
            flops_per_s=device.flops_per_s("bfloat16"),
            eta=eta,
            layer_s=layer_s,
            mfu=mfu,
            error=0.0,
        )
        cost = ReplicaCost(SPEC, replica, cluster, Numbers()).under(constants)
        return ReplicaSetup(name="vllm", config=config, cost=ModelledCost(cost, cluster))

    return setup


def _simulate(measured: Sequence[Measured], setup: ReplicaSetup) -> list[RequestRecord]:
    """Without a router, which lets requests wait before engines: nothing stood before vLLM."""
    workload = Workload("measured", tuple(each.arrival for each in measured))
    prompts = Prompts(workload, setup.config.max_model_len)
    arrivals = workload.arrivals
    records = Records([RequestRecord(each.arrival_s, each.prompt_tokens) for each in arrivals])

    def report(outputs: Sequence[Output], times: Sequence[float], _: Computed) -> None:
        for output in outputs:
            records.note(int(output.request_id), output, times)

    def moves_nothing(*_: object) -> None:
        raise AssertionError("there is nobody else")

    replica = SimulatedReplica(
        replace(setup.config, vocab_size=prompts.vocab_size),
        setup.cost,
        report,
        records.note_started,
        moves_nothing,
        runs=True,
        tells_late=False,
    )
    for number, each in enumerate(arrivals):
        replica.catch_up(each.arrival_s)
        replica.tell(Submit(prompts.request(number)), each.arrival_s)
    while (due_s := replica.next_s) is not None:
        replica.advance(due_s)
    return records.requests


def _fit(
    measured: Sequence[Measured], setup: Callable[[Point], ReplicaSetup]
) -> tuple[Point, list[float]]:
    """Constants under which the first requests come as they did (Gauss-Newton, in logarithms)."""
    some, first = measured[:NUM_SIMULATED_TO_FIT], measured[:NUM_FITTED]

    def errors(logs: np.ndarray) -> np.ndarray:
        records = _simulate(some, setup(_point(logs)))[:NUM_FITTED]
        found = _compared(first, records)
        return np.array([found[name][what] for name in METRICS for what in ("mean", "p50", "p95")])

    best = np.log(np.array(START))
    least = errors(best)
    for _ in range(NUM_ROUNDS):
        slopes = [(errors(best + step) - least) / NUDGE for step in NUDGE * np.eye(3)]
        # A little of the identity: what the errors hardly depend on stays where it was.
        matrix = np.concatenate([np.array(slopes).T, 0.1 * np.eye(3)])
        move = np.linalg.lstsq(matrix, np.concatenate([-least, np.zeros(3)]), rcond=None)[0]
        found = errors(best + move)
        if found @ found >= least @ least:
            break
        best, least = best + move, found
    return _point(best), [round(float(each), 4) for each in least]


def _point(logs: np.ndarray) -> Point:
    eta, layer_s, mfu = (float(each) for each in np.exp(logs))
    return min(eta, 1.0), layer_s, min(mfu, 1.0)


def _compared(
    measured: Sequence[Measured], records: Sequence[RequestRecord]
) -> dict[str, dict[str, float]]:
    """Relative errors of the simulated, by metric."""
    errors: dict[str, dict[str, float]] = {}
    for name in METRICS:
        live = sorted(getattr(each, f"{name}_s") for each in measured)
        simulated = sorted(
            value for each in records if (value := getattr(each, f"{name}_s")) is not None
        )
        errors[name] = {
            "mean": sum(simulated) / len(simulated) / (sum(live) / len(live)) - 1,
            "p50": percentile(simulated, 50) / percentile(live, 50) - 1,
            "p95": percentile(simulated, 95) / percentile(live, 95) - 1,
        }
    return errors


# --- speed ---


def speed(path: Path) -> dict[str, Any]:
    workload, setups = read_workload(path, Random(0)), _a100s(8)
    hour = Workload(workload.name, tuple(a for a in workload.arrivals if a.arrival_s < 3600))
    part = hour.first(len(hour.arrivals) // 20)
    return {
        "what": "Llama-3.1-8B on 8 A100s, cost by the cost model",
        "hour": _timed(hour, setups, runs=True),
        "twentieth": _timed(part, setups, runs=True),
        "twentieth_stepwise": _timed(part, setups, runs=False),
    }


def million(path: Path, share: float) -> dict[str, Any]:
    trace, setups = read_workload(path, Random(0)), _a100s(NUM_DEVICES)
    workload = poisson_workload(
        rate_per_s=float(NUM_DEVICES),
        num_requests=round(1_000_000 * share),
        lengths=[(each.prompt_tokens, each.output_tokens) for each in trace.arrivals],
        rng=Random(0),
    )
    return {
        "what": f"Llama-3.1-8B on {NUM_DEVICES} A100s with a replica each, lengths of {trace.name}",
        **_timed(workload, setups, runs=True),
    }


def _a100s(num: int) -> list[ReplicaSetup]:
    cluster, replica = _one_gpu("A100-80-SXM")
    cost = ModelledCost(ReplicaCost(SPEC, replica, cluster, Numbers()), cluster)
    config = EngineConfig(
        instance_blocks=(25_000,),
        max_model_len=32_768,
        vocab_size=SPEC.vocab_size,
        max_num_seqs=256,
        max_num_batched_tokens=2048,
    )
    return [ReplicaSetup(name=f"replica-{index}", config=config, cost=cost) for index in range(num)]


def _timed(workload: Workload, setups: Sequence[ReplicaSetup], *, runs: bool) -> dict[str, Any]:
    simulation = Simulation(workload, setups, Random(0), runs=runs)
    began_s = time.process_time()
    records = simulation.run()
    report = summarise(records, setups, simulation.stats(), {})
    return {
        "requests": len(workload.arrivals),
        "output_tokens": report["tokens"]["output"],
        "steps": sum(each["steps"] for each in report["replicas"]),
        "simulated_s": records.end_s,
        "cpu_s": round(time.process_time() - began_s, 2),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "latency_s": report["latency_s"],
        "sha256": hashlib.sha256(json.dumps(report).encode()).hexdigest(),
    }


def _one_gpu(kind: str) -> tuple[Cluster, ReplicaPlan]:
    device = catalogue.kind(kind).device("a.0", "a", "cuda:0")
    cluster = Cluster(
        hosts=(Host(name="a"),), devices=(device,), constants=catalogue.known_constants()
    )
    instance = InstancePlan(
        layers=Range(0, SPEC.num_layers),
        ranks=(RankPlan(device="cuda:0"),),
        split=split_by_weights(SPEC, [1.0]),
    )
    stages = (StagePlan(instances=(instance,)),)
    return cluster, ReplicaPlan(stages=stages, routes=default_routes(stages))


def _commit() -> str:
    done = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "describe", "--always"],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip()


if __name__ == "__main__":
    main()
