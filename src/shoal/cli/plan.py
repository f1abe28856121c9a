"""`shoal plan MODEL --cluster F`: which devices should run what, and why; nothing is loaded.

Reads flags and files, wires cluster, goal, search and report together; decides nothing itself.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Annotated, cast, get_args

import typer

from shoal.cli.model_shape import spec_of
from shoal.cli.options import Json
from shoal.cli.result_file import write_result
from shoal.cli.wrong_input import engine_of, judges_input, precisions_of, share_of
from shoal.cluster.cluster_file import read_cluster
from shoal.core.cluster import Cluster, Precision
from shoal.core.errors import ConfigError
from shoal.core.latency import Slo, parse_slo
from shoal.core.workload import read_workload
from shoal.model.known_shapes import known_shapes
from shoal.plan_file import dump_plan
from shoal.planner.engines import emit as emit_for
from shoal.planner.engines import engine_to_emit
from shoal.planner.explain import report, text
from shoal.planner.goal import CostUnit, Goal, lengths_of, objective_of, rate_of
from shoal.planner.profiles import Problem
from shoal.planner.search import Outcome, find_plan
from shoal.planner.to_plan import to_plan
from shoal.planner.what_if import changed, left_out, one_more, runner_ups

_INPUT_TOKENS, _OUTPUT_TOKENS = 1024.0, 256.0
_ANY_BITS: tuple[Precision, ...] = ("bfloat16", "fp8", "int8", "int4")
"""The best quality first."""


@judges_input
def plan(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="a known shape (llama-3.1-70b), a folder with config.json, or what `serve` takes",
        ),
    ],
    cluster: Annotated[Path, typer.Option(metavar="FILE", help="devices and links")],
    workload: Annotated[
        Path | None, typer.Option(metavar="FILE", help="a trace: its mean rate and lengths")
    ] = None,
    rate: Annotated[float | None, typer.Option(help="requests per second to carry")] = None,
    input_tokens: Annotated[
        float | None,
        typer.Option(
            "--input-tokens",
            "--isl",
            help="of a request, on average; the trace's, or 1024",
        ),
    ] = None,
    output_tokens: Annotated[
        float | None,
        typer.Option(
            "--output-tokens",
            "--osl",
            help="of a request, on average; the trace's, or 256",
        ),
    ] = None,
    max_model_len: Annotated[
        int, typer.Option(min=0, help="of the longest request: its KV must fit")
    ] = 0,
    slo: Annotated[str | None, typer.Option(help="bounds of means: ttft=2s,tpot=50ms")] = None,
    objective: Annotated[
        str | None, typer.Option(help="latency, goodput or cost; latency if there is a rate")
    ] = None,
    cost_unit: Annotated[str, typer.Option(help="of cost: usd, devices or watts")] = "usd",
    precision: Annotated[
        str | None,
        typer.Option(
            help="of weights, those that may be taken: bfloat16,fp8,int8,int4; default: bfloat16, "
            "or all with --max-quality-loss",
            show_default=False,
        ),
    ] = None,
    max_quality_loss: Annotated[
        str | None,
        typer.Option(metavar="SHARE", help="how much higher perplexity may be than in 16 bits: 1%"),
    ] = None,
    kv_cache_precision: Annotated[str, typer.Option(help="of KV")] = "bfloat16",
    max_num_seqs: Annotated[
        int, typer.Option(min=1, help="requests that a replica takes at once")
    ] = 256,
    engine: Annotated[
        str, typer.Option(help="whose constants the cost model takes: shoal, vllm, ...")
    ] = "shoal",
    roles: Annotated[
        bool, typer.Option(help="let replicas be for prompts or for decoding only, where it pays")
    ] = False,
    what_if: Annotated[
        list[str] | None,
        typer.Option(help="'without a.0' or 'a.0 at 50%', compared with the plan; may be repeated"),
    ] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="where time goes, runner-ups, one more device")
    ] = False,
    emit: Annotated[
        str | None, typer.Option(help="print the nearest vllm, sglang or llama.cpp command")
    ] = None,
    as_json: Json = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="write the plan here")
    ] = None,
) -> None:
    """Find the plan for a model on a cluster, with the reasons; nothing is loaded."""
    if emit is not None:
        engine_to_emit(emit)
    load = _load(workload, rate, input_tokens, output_tokens, max_model_len)
    goal = _towards(
        replace(
            load,
            slo=_slo(slo),
            cost_unit=_cost_unit(cost_unit),
            precisions=_precisions(precision, max_quality_loss),
            max_quality_loss=_quality_loss(max_quality_loss),
            kv_precision=_kv_precision(kv_cache_precision),
            max_concurrency=max_num_seqs,
            may_specialise=roles,
        ),
        objective,
    )
    known = read_cluster(cluster)
    problem = Problem(spec_of(model), known, goal, engine_of(engine, known))
    changes = [(each, changed(known, each)) for each in what_if or ()]
    found = find_plan(problem)
    made = to_plan(found.choices, problem.cluster, model)
    full = report(
        found,
        list(left_out(found)),
        list(one_more(found)) if explain else (),
        list(runner_ups(found)) if explain else (),
    )
    full["what_if"] = [_compared(problem, found, *each) for each in changes]
    words = [] if emit is None else emit_for(made, emit, model, problem.spec, goal.kv_precision)
    if as_json:
        emitted = {} if emit is None else {"emitted": words}
        print(json.dumps({"model": model, **full, "plan": dump_plan(made), **emitted}, indent=2))
    else:
        lines = text(full, explained=explain)
        lines += [each["text"] for each in full["what_if"]]
        lines += _to_say_again(goal)
        print("\n".join(lines if emit is None else [*_commented(lines, model), *words]))
    if output is not None:
        write_result(output, dump_plan(made), "-o")


def _load(
    workload: Path | None,
    rate: float | None,
    input_tokens: float | None,
    output_tokens: float | None,
    max_tokens: int,
) -> Goal:
    """What comes: as the flags say, and the trace where they don't."""
    longest = 0
    if workload is not None:
        trace = read_workload(workload, Random(0))
        mean_input, mean_output, longest = lengths_of(trace)
        rate = rate_of(trace) if rate is None else rate
        input_tokens = mean_input if input_tokens is None else input_tokens
        output_tokens = mean_output if output_tokens is None else output_tokens
    return Goal(
        rate_per_s=rate,
        input_tokens=_INPUT_TOKENS if input_tokens is None else input_tokens,
        output_tokens=_OUTPUT_TOKENS if output_tokens is None else output_tokens,
        max_tokens=max(max_tokens, longest),
    )


def _towards(goal: Goal, objective: str | None) -> Goal:
    """With the objective, or the one that fits."""
    default = "goodput" if goal.rate_per_s is None else "latency"
    return replace(goal, objective=objective_of(default if objective is None else objective))


def _to_say_again(goal: Goal) -> list[str]:
    """What a plan file does not say."""
    kept = goal.kv_precision
    if kept == "bfloat16":
        return []
    return [
        f"KV is planned in {kept}, which a plan does not say: give serve --kv-cache-dtype {kept}, "
        f"and simulate --kv-cache-precision {kept}"
    ]


def _commented(lines: list[str], model: str) -> list[str]:
    """Before a command for a shell."""
    if model in known_shapes():
        lines = [*lines, f"{model} stands for its checkpoint: put an id, a folder or a file there"]
    return [f"# {each}".rstrip() for each in lines]


def _compared(problem: Problem, found: Outcome, change: str, cluster: Cluster) -> dict[str, object]:
    """A plan of the changed cluster for what was asked for, beside the one found."""
    other_problem = replace(problem, cluster=cluster)
    try:
        other = find_plan(other_problem)
    except ConfigError as error:
        return {"change": change, "possible": False, "text": f"what if {change}: {error}"}
    rate = other.capacity_per_s / found.capacity_per_s - 1
    tpot = other.mean("tpot") / found.mean("tpot") - 1
    words = (
        f"what if {change}: {other.capacity_per_s:.3g} requests/s ({rate:+.0%}), "
        f"TPOT {other.mean('tpot') * 1e3:.1f} ms ({tpot:+.0%})"
    )
    return {
        "change": change,
        "possible": True,
        "requests_per_s": other.capacity_per_s,
        "ttft_s": other.mean("ttft"),
        "tpot_s": other.mean("tpot"),
        "unmet": list(other.unmet),
        "text": "; not met: ".join((words, *other.unmet)),
    }


def _slo(slo: str | None) -> Slo:
    bounds = parse_slo(slo) if slo is not None else {}
    if "e2e" in bounds:
        raise ConfigError("--slo e2e is not planned for; give ttft= and tpot=")
    return Slo(ttft_s=bounds.get("ttft"), tpot_s=bounds.get("tpot"))


def _precisions(names: str | None, max_quality_loss: str | None) -> tuple[Precision, ...]:
    """Whoever says what may be lost, and not how, leaves the choice."""
    if names is None:
        return _ANY_BITS if max_quality_loss is not None else _ANY_BITS[:1]
    return precisions_of(names, "--precision")


def _quality_loss(share: str | None) -> float | None:
    return None if share is None else share_of(share, "--max-quality-loss")


def _kv_precision(name: str) -> Precision:
    found = precisions_of(name, "--kv-cache-precision")
    if len(found) > 1:
        raise ConfigError(f"--kv-cache-precision is {name!r}; KV is kept in one: name one")
    return found[0]


def _cost_unit(name: str) -> CostUnit:
    if name not in get_args(CostUnit):
        raise ConfigError(
            f"--cost-unit is {name!r}; it must be one of {', '.join(get_args(CostUnit))}"
        )
    return cast(CostUnit, name)
