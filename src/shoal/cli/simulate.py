"""`shoal simulate PLAN --cluster F --workload F`: what a plan would give, with nothing loaded.

Reads flags and files, wires plan, cluster, load and report together; simulates nothing itself.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Annotated, Any

import typer
from rich.console import Console, Group, RenderableType
from rich.text import Text

from shoal.cli import workloads
from shoal.cli.fault_file import read_faults
from shoal.cli.latency_table import goodput_lines, latency_table, policy_table
from shoal.cli.model_shape import spec_of
from shoal.cli.options import Batching, TpotTarget
from shoal.cli.result_file import write_result
from shoal.cli.router_options import Collapse, Hedging
from shoal.cli.wrong_input import engine_of, judges_input
from shoal.cluster.cluster_file import read_cluster
from shoal.cluster.helix_placement import read_placement
from shoal.core.cluster import Cluster
from shoal.core.errors import ConfigError
from shoal.core.latency import Slo, parse_slo
from shoal.core.model_spec import ModelSpec
from shoal.core.options import MAX_NUM_SEQS
from shoal.core.plan import Plan
from shoal.core.workload import Workload
from shoal.plan_file import PlanFile, read_plan
from shoal.planner.goal import Goal
from shoal.planner.placement import placed_replica
from shoal.planner.profiles import Problem
from shoal.policy.routing import policy_named
from shoal.sim import ReplicaSetup, Simulation, html_page, summarise
from shoal.sim.faults import Fault, RequestStall, drains
from shoal.sim.from_plan import Limits, planned_links, precision_of, replica_setups

_MOST_S = 30 * 86400.0
"""Thirty days, of a load and once more for what is left of it: routers look at their replicas four
times a second, all of the time."""

_MOST_SHOWN = 16
"""Replicas."""


@judges_input
def simulate(
    plan: Annotated[
        Path, typer.Argument(help="plan file: what `shoal plan` writes; or Helix's ilp_sol.ini")
    ],
    cluster: Annotated[Path, typer.Option(help="cluster file: its devices and links")],
    model: Annotated[
        str | None,
        typer.Option(help="default: what the plan names; a folder needs config.json only"),
    ] = None,
    workload: workloads.Trace = None,
    rate: workloads.Rate = None,
    num_requests: workloads.NumRequests = None,
    input_tokens: workloads.InputTokens = None,
    output_tokens: workloads.OutputTokens = None,
    time_scale: workloads.TimeScale = 1.0,
    events: Annotated[
        Path | None, typer.Option(help="YAML: slow-downs, deaths and joins of replicas")
    ] = None,
    slo: workloads.SloBounds = None,
    router_policy: Annotated[
        str,
        typer.Option(help="of `shoal serve`; several, with commas between them, are compared"),
    ] = "predicted",
    hedging: Hedging = True,
    collapse: Collapse = True,
    seed: Annotated[int, typer.Option(help="of arrivals")] = 0,
    precision: Annotated[
        str, typer.Option(help="of weights, where the plan says nothing")
    ] = "bfloat16",
    kv_cache_precision: Annotated[str, typer.Option(help="of KV")] = "bfloat16",
    engine: Annotated[
        str, typer.Option(help="whose constants the cost model takes: shoal, vllm, ...")
    ] = "shoal",
    max_num_seqs: Annotated[
        int | None, typer.Option(min=1, help="as of `shoal serve`; default: the plan's, or 64")
    ] = None,
    max_num_batched_tokens: Annotated[int | None, typer.Option(min=1)] = None,
    batching: Batching = "even",
    tpot_target: TpotTarget = None,
    max_model_len: Annotated[int | None, typer.Option(min=1)] = None,
    max_waiting: Annotated[int, typer.Option(min=0)] = 256,
    enable_prefix_caching: Annotated[bool, typer.Option()] = True,
    until: Annotated[
        float | None, typer.Option(min=0, help="seconds after which it stops, whatever is left")
    ] = None,
    stepwise: Annotated[
        bool, typer.Option("--stepwise", help="take every Step by itself: slower, the same result")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print the report as JSON")] = False,
    html: Annotated[Path | None, typer.Option(help="also write a page with plots here")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="also write the JSON report here")
    ] = None,
) -> None:
    """Predict TTFT, TPOT, goodput and utilisation of a plan under a load."""
    policies = [each.strip() for each in router_policy.split(",")]
    for each in policies:
        policy_named(each)
    if html is not None and len(policies) > 1:
        raise ConfigError("--html shows one run; name one --router-policy, or leave it out")
    for path, flag in ((html, "--html"), (output, "--output")):
        _check_folder(path, flag)
    load = workloads.chosen_workload(
        workload,
        rate,
        num_requests=num_requests,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        rng=Random(seed),
    ).stretched(time_scale)
    bounds = parse_slo(slo) if slo is not None else {}
    file = None if plan.suffix == ".ini" else read_plan(plan)
    limits = Limits(
        max_num_seqs=max_num_seqs or (file and file.max_num_seqs) or MAX_NUM_SEQS,
        max_num_batched_tokens=max_num_batched_tokens,
        batching=batching,
        tpot_target_s=tpot_target or bounds.get("tpot"),
        max_model_len=max_model_len,
        max_waiting=max_waiting,
        prefix_caching=enable_prefix_caching,
        precision=precision_of(precision),
        kv_precision=precision_of(kv_cache_precision),
        engine=engine,
    )
    known = read_cluster(cluster)
    engine_of(engine, known)
    name, spec, chosen = _chosen(file, plan, model, known, limits)
    setups = replica_setups(chosen, spec, known, limits)
    faults = read_faults(events) if events is not None else ()
    last_s = _last_s(load, faults)
    may_move = any(each.role != "any" for each in setups) or drains(faults)
    links = planned_links(chosen, spec, known, limits) if may_move else None

    def simulated(policy: str) -> dict[str, Any]:
        simulation = Simulation(
            load,
            setups,
            Random(seed),
            faults=faults,
            runs=not stepwise,
            request_s=known.request_s,
            policy=policy,
            slo=Slo(ttft_s=bounds.get("ttft"), tpot_s=bounds.get("tpot")) if bounds else None,
            hedging=hedging,
            collapse=collapse,
            kv_links=links,
        )
        records = simulation.run(min(last_s + _MOST_S, math.inf if until is None else until))
        summary = summarise(records, setups, simulation.stats(), bounds)
        summary["hedges"] = asdict(simulation.hedges)
        summary["kv_moved"] = asdict(simulation.kv_moved)
        report = _report(summary, load, setups, f"{name} by {plan}")
        report["notes"] += _idle(chosen)
        return report

    reports = {each: simulated(each) for each in policies}
    report = reports[policies[0]] if len(policies) == 1 else {"policies": reports}
    if html is not None:
        write_result(html, html_page(report), "--html")
    text = json.dumps(report, indent=1)
    if output is not None:
        write_result(output, text + "\n", "--output")
    if as_json:
        typer.echo(text)
    else:
        Console().print(_rendered(report))


def _last_s(load: Workload, faults: Sequence[Fault | RequestStall]) -> float:
    """When all that is to come has come; clocks must still tell a step from the next one."""
    times = [("the load lasts", load.duration_s)]
    times += [("an event is", each.at_s) for each in faults if isinstance(each, Fault)]
    for what, at_s in times:
        if not at_s <= _MOST_S:
            raise ConfigError(
                f"{what} until {at_s:g} s; a simulation takes 30 days at most: check --rate, "
                "--time-scale and the times in the trace and in --events"
            )
    return max(at_s for _, at_s in times)


def _chosen(
    file: PlanFile | None, path: Path, model: str | None, cluster: Cluster, limits: Limits
) -> tuple[str, ModelSpec, Plan]:
    """A plan, or (no plan file) a placement of Helix: with its model's name and shapes."""
    name = model or (file.model if file else None)
    if name is None:
        wanted = "add `model:` there, or give --model" if file else "give --model"
        raise ConfigError(f"{path} names no model; {wanted}")
    spec = spec_of(name)
    if file is not None:
        return name, spec, file.resolve(spec)
    goal = Goal(precisions=(limits.precision,), kv_precision=limits.kv_precision)
    problem = Problem(spec, cluster, goal, limits.engine)
    replica = placed_replica(read_placement(path, cluster), problem)
    return name, spec, Plan(replicas=(replica,), model=name)


def _report(
    summary: Mapping[str, Any], load: Workload, setups: tuple[ReplicaSetup, ...], title: str
) -> dict[str, Any]:
    errors = {setup.name: f"{setup.cost.error:.0%}" for setup in setups}
    notes = [f"{name}: times may be off by {error}" for name, error in errors.items()]
    if len(notes) > 1 and len(set(errors.values())) == 1:
        notes = [f"all {len(notes)} replicas: times may be off by {setups[0].cost.error:.0%}"]
    notes += [f"{count} requests failed: {code}" for code, count in summary["errors"].items()]
    if left := summary["requests"]["never_ended"]:
        notes.append(f"{left} requests had not ended when the simulation did")
    if later := summary["requests"]["not_come"]:
        notes.append(f"{later} more requests were to come after that; they are not counted")
    return {"title": title, "workload": load.name, **summary, "notes": notes}


def _idle(plan: Plan) -> Iterator[str]:
    """Instances that are told of, as nothing comes to them."""
    for index, replica in enumerate(plan.replicas):
        used = {hop.instance for route in replica.routes for hop in route}
        idle = [each.ranks[0] for n, each in enumerate(replica.instances) if n not in used]
        if idle:
            names = ", ".join(" ".join(filter(None, (each.host, each.device))) for each in idle[:8])
            yield (
                f"replica-{index}: {len(idle)} of {len(replica.instances)} instances are in no "
                f"route and do nothing ({names}{', ...' * (len(idle) > 8)})"
            )


def _rendered(report: Mapping[str, Any]) -> RenderableType:
    if "policies" in report:
        return policy_table(report["policies"])
    table = latency_table(f"{report['title']}: {report['workload']}", report["latency_s"])
    requests, throughput = report["requests"], report["throughput"]
    lines = [
        f"{requests['succeeded']} of {requests['planned']} requests succeeded, "
        f"{requests['refused']} refused, {requests['failed']} failed, in "
        f"{report['duration_s']:,.1f} s",
        f"throughput: {throughput['requests_per_s']:.2f} requests/s, "
        f"{throughput['output_tokens_per_s']:,.1f} output tokens/s",
    ]
    lines += goodput_lines(report)
    lines += [
        f"{each['name']}: busy {', '.join(f'{share:.0%}' for share in each['utilisation'])}, "
        f"{each['preemptions']} preemptions, {each['cached_tokens']:,} prompt tokens cached"
        for each in report["replicas"][:_MOST_SHOWN]
    ]
    if (num_more := len(report["replicas"]) - _MOST_SHOWN) > 0:
        lines.append(f"... and {num_more:,} replicas more: --json and --html have them all")
    hedges = report["hedges"]
    if num_second := hedges["hedged"] + hedges["rescued"]:
        extra = hedges["extra_tokens"] + hedges["rescued_tokens"]
        lines.append(
            f"second attempts: {num_second}, {hedges['won']} won; "
            f"{extra / max(hedges['computed_tokens'], 1):.1%} more tokens were computed"
        )
    if (moved := report["kv_moved"])["pulls"]:
        mean_s = moved["seconds"] / moved["pulls"]
        lines.append(
            f"KV between replicas: {moved['pulls']:,} times, {moved['blocks']:,} blocks, "
            f"{1000 * mean_s:,.1f} ms each"
        )
    lines += [f"note: {note}" for note in report["notes"]]
    return Group(table, *(Text(line) for line in lines))


def _check_folder(path: Path | None, flag: str) -> None:
    """Before the work is done, not after."""
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        what = "is a folder" if path.is_dir() else f"lies in no folder that there is: {path.parent}"
        raise ConfigError(f"cannot write {path}: it {what}; choose another {flag}")
