"""How near the cost model comes to measured times: constants fitted on some rows, judged on others.

    python benchmarks/cost_model.py measured/llama70b_h100_h200_isl1024.csv -o benchmarks/results

The csv has columns backend, system, precision, isl, osl, batch_size (requests at one time), tp_size
and silicon_tpot_ms, of Llama-3.1-70B: ai-dynamo/aiconfigurator's format. All-reduces are judged on
the product's own tables, with sizes left out. `--write` puts the constants into the catalogue.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from functools import cache
from importlib import resources
from pathlib import Path

from shoal.cluster import catalogue
from shoal.core.cluster import Cluster, Constants, Host
from shoal.core.model_spec import LayerSpec, ModelSpec, RopeSpec
from shoal.core.plan import InstancePlan, RankPlan, ReplicaPlan, StagePlan, default_routes
from shoal.core.split import Range, split_by_weights
from shoal.policy.cost_model import Numbers, ReplicaCost, StepTime, closed_loop
from shoal.policy.cost_model.fit import Observation, fit
from shoal.policy.cost_model.tables import time_at

LLAMA_70B = ModelSpec(
    architecture="LlamaForCausalLM",
    num_layers=80,
    hidden_size=8192,
    num_heads=64,
    num_kv_heads=8,
    head_dim=128,
    ffn_size=28672,
    vocab_size=128256,
    norm_eps=1e-5,
    layers=(LayerSpec(rope=RopeSpec()),) * 80,
    max_positions=131072,
    attention_scale=128**-0.5,
    tied_embeddings=False,
)
KINDS = {"h100_sxm": "H100-SXM", "h200_sxm": "H200-SXM"}
_FP8 = Numbers(weights="fp8", tables="bfloat16", compute="fp8")
NUMBERS = {"vllm": _FP8, "trtllm": replace(_FP8, kv="fp8")}
"""Checkpoints in fp8 that NVIDIA makes for TensorRT-LLM say fp8 for KV too; vLLM keeps 16 bits."""
MEMORY_SHARE, RESERVE_BYTES = 0.9, 3.5e9
SOURCE = "ai-dynamo/aiconfigurator 095f58a (Apache-2.0), Llama-3.1-70B, isl 1024"


@dataclass(frozen=True, slots=True)
class Row:
    """A measurement of a steady load."""

    kind: str
    engine: str
    isl: int
    osl: int
    batch: int
    num_ranks: int
    tpot_s: float

    def predict(self, constants: Constants) -> StepTime:
        served = closed_loop(
            replica_of(self).under(constants),
            concurrency=self.batch,
            isl=self.isl,
            osl=self.osl,
            kv_tokens=kv_tokens_of(self),
        )
        return served.time

    def error(self, constants: Constants) -> float:
        return abs(self.predict(constants).total_s / self.tpot_s - 1)


@cache
def replica_of(row: Row) -> ReplicaCost:
    known = catalogue.kind(row.kind)
    link = known.link("nvlink")
    host = Host(name="h", link=link, all_reduce=catalogue.all_reduce_tables(row.kind, link.kind))
    devices = [known.device(f"h.{n}", "h", f"cuda:{n}") for n in range(row.num_ranks)]
    stage = StagePlan(
        instances=(
            InstancePlan(
                layers=Range(0, LLAMA_70B.num_layers),
                ranks=tuple(RankPlan(device=each.device) for each in devices),
                split=split_by_weights(LLAMA_70B, [1.0] * row.num_ranks, granule=32),
            ),
        )
    )
    plan = ReplicaPlan(stages=(stage,), routes=default_routes((stage,)))
    cluster = Cluster(hosts=(host,), devices=tuple(devices))
    return ReplicaCost(LLAMA_70B, plan, cluster, NUMBERS[row.engine], engine=row.engine)


@cache
def kv_tokens_of(row: Row) -> int:
    """What weights and an engine's reserve leave of its share of the memory."""
    memory = MEMORY_SHARE * catalogue.kind(row.kind).memory_bytes - RESERVE_BYTES
    (instance,) = replica_of(row).hops()
    sizes = zip(instance.weight_bytes(), instance.kv_token_bytes(), strict=True)
    return min(int((memory - weights) / per_token) for weights, per_token in sizes)


@dataclass(frozen=True, slots=True)
class Judged:
    """Relative errors of one set of rows under constants that were fitted on another."""

    fitted_on: str
    judged_on: str
    num_rows: int
    mean: float
    p90: float
    most: float


def read_rows(path: Path) -> list[Row]:
    with path.open(newline="") as stream:
        return [
            Row(
                KINDS[each["system"]],
                each["backend"],
                int(each["isl"]),
                int(each["osl"]),
                int(each["batch_size"]),
                int(each["tp_size"]),
                float(each["silicon_tpot_ms"]) / 1e3,
            )
            for each in csv.DictReader(stream)
            if each["precision"] == "fp8"
        ]


def fitted(rows: Sequence[Row]) -> Constants:
    kind = catalogue.kind(rows[0].kind)
    start = Constants(
        kind=kind.name,
        engine=rows[0].engine,
        precision="fp8",
        eta=0.8,
        layer_s=50e-6,
        mfu=0.45,
        error=0.0,
        bandwidth_bytes_per_s=kind.bandwidth_bytes_per_s,
        flops_per_s=dict(kind.flops)["float16"],
        source=SOURCE,
    )
    return fit([Observation(row.tpot_s, row.predict) for row in rows], start)


def judged(on: str, rows: Sequence[Row], constants: Constants, fitted_on: str) -> Judged:
    return summed_up(on, [row.error(constants) for row in rows], fitted_on)


def summed_up(on: str, errors: Sequence[float], fitted_on: str) -> Judged:
    rising = sorted(errors)
    mean, p90 = sum(errors) / len(errors), rising[int(0.9 * (len(errors) - 1))]
    return Judged(fitted_on, on, len(errors), mean, p90, rising[-1])


def judge_all(groups: dict[tuple[str, str], list[Row]]) -> tuple[list[Constants], list[Judged]]:
    constants, results = [], []
    every: list[float] = []
    for (kind, engine), rows in sorted(groups.items()):
        name = f"{kind} {engine}"
        own = fitted(rows)
        constants.append(own)
        every += [row.error(own) for row in rows]
        results.append(judged(name, rows, own, name))
        for few, many in (("osl 1024", "osl 8192"), ("osl 8192", "osl 1024")):
            some = [row for row in rows if row.osl == int(few[4:])]
            rest = [row for row in rows if row.osl == int(many[4:])]
            if len(some) >= 3 and rest:
                results.append(judged(f"{name}, {many}", rest, fitted(some), f"{name}, {few}"))
        for ranks in sorted({row.num_ranks for row in rows}):
            some = [row for row in rows if row.num_ranks != ranks]
            rest = [row for row in rows if row.num_ranks == ranks]
            left = f"{name}, without TP{ranks}"
            results.append(judged(f"{name}, TP{ranks}", rest, fitted(some), left))
        for (other, same), theirs in sorted(groups.items()):
            if other != kind and same == engine:
                found = fitted(theirs)
                results.append(judged(name, rows, found, f"{other} {engine} (never saw this GPU)"))
    return constants, [summed_up("all rows", every, "each GPU and engine by itself"), *results]


def judge_all_reduce() -> Iterable[Judged]:
    """Every second size left out, and predicted from those between which it lies."""
    for kind, link in (("H100-SXM", "nvlink"), ("A100-80-SXM", "nvlink"), ("L40S", "pcie4")):
        for table in catalogue.all_reduce_tables(kind, link):
            kept, left = table.points[::2], table.points[1:-1:2]
            errors = [abs(time_at(kept, size) / time - 1) for size, time in left]
            name = f"all-reduce {kind} {table.backend} {table.num_ranks} ranks"
            yield summed_up(name, errors, "every second size")


def write_catalogue(constants: Sequence[Constants]) -> None:
    about = (
        "What the cost model's roofline leaves out, by kind, engine and precision of weights; "
        "error: mean relative error of TPOT where it was fitted. From benchmarks/cost_model.py."
    )
    lines = [
        json.dumps(
            {
                "kind": each.kind,
                "engine": each.engine,
                "precision": each.precision,
                "eta": round(each.eta, 3),
                "layer_us": round(each.layer_s * 1e6, 1),
                "mfu": round(each.mfu, 3),
                "error": round(each.error, 3),
                "source": each.source,
            }
        )
        for each in constants
    ]
    body = ",\n".join("    " + line for line in lines)
    text = f'{{\n  "about": {json.dumps(about)},\n  "constants": [\n{body}\n  ]\n}}\n'
    Path(str(resources.files("shoal.cluster") / "constants.json")).write_text(text)


def say(text: str) -> None:
    sys.stdout.write(text + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("csv", type=Path)
    parser.add_argument("-o", "--output", type=Path, help="folder for the results")
    parser.add_argument("--write", action="store_true", help="put the constants in the catalogue")
    arguments = parser.parse_args()
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in read_rows(arguments.csv):
        groups[row.kind, row.engine].append(row)
    constants, results = judge_all(groups)
    results += judge_all_reduce()
    for found in constants:
        say(
            f"{found.kind:10} {found.engine:7} eta {found.eta:.3f}  c {found.layer_s * 1e6:.1f} us"
            f"  mfu {found.mfu:.3f}"
        )
    for each in results:
        say(
            f"{each.judged_on:44} {each.num_rows:4} rows  mean {each.mean:6.1%}"
            f"  p90 {each.p90:6.1%}  most {each.most:6.1%}  fitted on {each.fitted_on}"
        )
    if arguments.write:
        write_catalogue(constants)
    if arguments.output:
        report = {
            "command": "python benchmarks/cost_model.py llama70b_h100_h200_isl1024.csv",
            "machine": platform.processor() or platform.machine(),
            "source": SOURCE,
            "constants": [asdict(each) for each in constants],
            "judged": [asdict(each) for each in results],
        }
        name = f"cost_model_llama70b-h100-h200_{date.today():%Y-%m-%d}.json"
        (arguments.output / name).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
