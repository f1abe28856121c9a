"""The planner on known clusters: what goes where, wishes that can't be met, the command."""

from __future__ import annotations

import io
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from shoal.cli.main import main
from shoal.cluster.cluster_file import read_cluster
from shoal.core.cluster import Cluster
from shoal.core.errors import ConfigError
from shoal.core.latency import Slo
from shoal.core.model_spec import ModelSpec
from shoal.core.plan import RankPlan, ReplicaPlan
from shoal.model.known_shapes import known_shapes, shape_folder
from shoal.model.spec import read_spec
from shoal.plan_file import dump_plan, read_plan
from shoal.planner.bunches import late_wait_s, mean_of
from shoal.planner.engines import emit
from shoal.planner.goal import Goal
from shoal.planner.inventory import Inventory
from shoal.planner.pipeline import Chain, Segment, in_the_way
from shoal.planner.profiles import Problem
from shoal.planner.program import pack
from shoal.planner.search import Outcome, find_plan
from shoal.planner.service import quickest
from shoal.planner.to_plan import to_plan
from shoal.planner.what_if import changed, left_out, one_more

TWO_KINDS = """
hosts:
  - {name: a, devices: 2x H100-SXM nvlink}
  - {name: b, devices: 2x L4 pcie4}
network: {latency: 20us, bandwidth: 25GB/s}
"""
MIXED = """
hosts:
  - {name: a, devices: H100-SXM}
  - {name: b, devices: 2x A100-40-SXM nvlink}
network: {latency: 5us, bandwidth: 25GB/s}
"""


def cluster_of(tmp_path: Path, text: str) -> Cluster:
    path = tmp_path / "cluster.yaml"
    path.write_text(text, encoding="utf-8")
    return read_cluster(path)


def shape(name: str) -> ModelSpec:
    return read_spec(shape_folder(name))


def stages_of(outcome: Outcome) -> list[list[tuple[str, int]]]:
    """Of each replica: kinds and layers of each stage."""
    return [
        [
            (segment.group.kinds, layers)
            for segment, layers in zip(each.chain.segments, each.operation.layers, strict=True)
        ]
        for each in outcome.choices
    ]


@pytest.mark.parametrize("name", known_shapes())
def test_known_shapes_are_read(name: str) -> None:
    assert shape(name).num_layers > 0


def test_equal_devices_get_equal_parts(tmp_path: Path) -> None:
    cluster = cluster_of(tmp_path, "devices: 4x H100-SXM nvlink")
    goal = Goal(objective="latency", rate_per_s=0.1)
    found = find_plan(Problem(shape("llama-3.1-70b"), cluster, goal))
    (replica,) = to_plan(found.choices, cluster, "m").replicas
    (stage,) = replica.stages
    assert [len(each) for each in stage.instances[0].split.heads] == [16, 16, 16, 16]


def test_a_slow_device_takes_less(tmp_path: Path) -> None:
    text = "devices: [1x A100-80-SXM, {kind: A100-80-SXM, speed: 0.5}]\nlink: nvlink"
    cluster = cluster_of(tmp_path, text)
    goal = Goal(objective="latency", rate_per_s=0.1)
    found = find_plan(Problem(shape("llama-3.1-8b"), cluster, goal))
    (replica,) = to_plan(found.choices, cluster, "m").replicas
    split = replica.stages[0].instances[0].split
    # Weights of a query head with its part of K and V, in columns of the MLP.
    head = 2 * (1 + 8 / 32) * 128 / 3
    sizes = [len(a) * head + len(b) for a, b in zip(split.heads, split.ffn, strict=True)]
    assert 0.08 < sizes[1] / sum(sizes) < 0.35


def test_memory_that_does_not_hold_the_model_says_so_and_plans_fewer_bits(tmp_path: Path) -> None:
    cluster = cluster_of(tmp_path, "devices: 3x A100-40-SXM nvlink")
    found = find_plan(Problem(shape("llama-3.1-70b"), cluster, Goal()))
    assert "memory binds" in found.unmet[0] and "141" in found.unmet[0]
    assert {s.group.variants[v].precision for s, v in _used(found)} == {"int8"}
    with pytest.raises(ConfigError, match=r"memory binds.*add devices"):
        find_plan(Problem(shape("llama-3.1-405b"), cluster, Goal()))


def test_devices_without_kernels_are_left_out_with_the_reason(tmp_path: Path) -> None:
    cluster = cluster_of(
        tmp_path,
        "hosts: [{name: a, devices: 2x H100-SXM nvlink}, {name: b, devices: 1x A100-80-SXM}]\n"
        "network: {latency: 20us, bandwidth: 25GB/s}",
    )
    found = find_plan(Problem(shape("llama-3.1-70b"), cluster, Goal(precisions=("fp8",))))
    (gone,) = left_out(found)
    assert (gone.names, gone.reason) == (("b.0",), "it has no kernels for weights in fp8")


def test_a_device_that_only_slows_is_left_out_with_numbers(tmp_path: Path) -> None:
    cluster = cluster_of(tmp_path, TWO_KINDS)
    goal = Goal(objective="latency", rate_per_s=0.5)
    found = find_plan(Problem(shape("llama-3.1-70b"), cluster, goal))
    (gone,) = left_out(found)
    assert gone.names == ("b.0", "b.1")
    assert "TPOT" in gone.reason and "%" in gone.reason


def test_a_mixed_cluster_uses_both_kinds_when_one_does_not_hold_the_model(tmp_path: Path) -> None:
    cluster = cluster_of(tmp_path, MIXED)
    found = find_plan(Problem(shape("llama-3.1-70b"), cluster, Goal(max_concurrency=16)))
    (stages,) = stages_of(found)
    assert sum(layers for _, layers in stages) == 80
    assert any("H100" in kinds for kinds, _ in stages)
    assert any("A100" in kinds for kinds, _ in stages)


def test_an_slo_that_nothing_keeps_gets_the_nearest_plan(tmp_path: Path) -> None:
    cluster = cluster_of(tmp_path, "devices: 4x H100-SXM nvlink")
    goal = Goal(slo=Slo(tpot_s=0.001))
    found = find_plan(Problem(shape("llama-3.1-70b"), cluster, goal))
    assert found.choices and "SLO TPOT of 1 ms" in found.unmet[0]


def test_a_rate_that_is_too_high_gets_the_most_there_is(tmp_path: Path) -> None:
    cluster = cluster_of(tmp_path, "devices: 4x H100-SXM nvlink")
    goal = Goal(objective="latency", rate_per_s=1000.0)
    found = find_plan(Problem(shape("llama-3.1-70b"), cluster, goal))
    assert found.choices and "the rate of 1000 requests/s" in found.unmet[0]


PAIRS = """
hosts:
  - {name: a, devices: 2x L40S pcie4}
  - {name: b, devices: 2x A100-80-SXM nvlink}
network: {latency: 5us, bandwidth: %s}
"""


def test_a_request_waits_for_a_place_the_longer_the_fuller_the_plan(tmp_path: Path) -> None:
    """Four places: near what they carry, waiting takes longer than all the rest."""
    cluster = cluster_of(tmp_path, "devices: 1x A100-80-SXM")
    goal = Goal(objective="goodput", max_concurrency=4)
    problem = Problem(shape("llama-3.1-8b"), cluster, goal)
    planned = find_plan(problem)
    alone = replace(problem, goal=replace(goal, objective="latency"))
    chain = Chain(alone, planned.choices[0].chain.segments)
    most = planned.capacity_per_s * 4 / mean_of(4)  # all places taken, all of the time
    at = {share: quickest(chain, share * most) for share in (0.12, 0.97)}
    few, many = at[0.12], at[0.97]
    assert few is not None and many is not None
    assert many.ttft_s > many.tpot_s * goal.output_tokens
    assert few.ttft_s < many.ttft_s / 10
    assert quickest(chain, 1.01 * most) is None


def test_what_is_carried_leaves_places_for_bunches(tmp_path: Path) -> None:
    """A Poisson number of sequences has a place for 95 % of the time."""
    for places in (1, 4, 42, 256):
        mean = mean_of(places)
        term, within = math.exp(-mean), 0.0
        for number in range(places + 1):
            within += term
            term *= mean / (number + 1)
        assert within == pytest.approx(0.95, abs=0.03)
    cluster = cluster_of(tmp_path, "devices: 1x A100-80-SXM")
    (few, many) = (
        find_plan(Problem(shape("llama-3.1-8b"), cluster, Goal(max_concurrency=places)))
        for places in (4, 64)
    )
    for found, places in ((few, 4), (many, 64)):
        (operation,) = (each.operation for each in found.choices)
        full = places / (256 * operation.tpot_s)
        assert found.capacity_per_s == pytest.approx(full * mean_of(places) / places)
        assert found.mean("tpot") <= operation.tpot_s


def test_a_late_first_token_counts_and_not_the_mean() -> None:
    """M/D/1: what 95 % wait less than, against a queue that is gone through."""
    rng, service_s, busy = Random(1), 1.0, 0.7
    waits, free_s, now = [], 0.0, 0.0
    for _ in range(200_000):
        now += rng.expovariate(busy / service_s)
        waits.append(max(free_s - now, 0.0))
        free_s = max(free_s, now) + service_s
    waits.sort()
    assert late_wait_s(busy, service_s) == pytest.approx(waits[int(0.95 * len(waits))], rel=0.15)
    assert late_wait_s(0.04, service_s) == 0.0


def test_in_a_pipeline_one_prompt_is_in_the_way_of_all_steps() -> None:
    assert in_the_way(0.1, 400.0, 1) == 0.1
    some = [in_the_way(0.1, 4000.0, count) for count in (1, 4, 16)]
    assert some == sorted(some)
    chunk = 1 - math.exp(-512 / 400)
    assert in_the_way(0.1, 400.0, 1000) == pytest.approx(chunk)
    assert in_the_way(3.0, 400.0, 8) == 3.0  # each step has prompts of its own


def test_prompts_and_decoding_get_devices_of_their_own_where_it_pays(tmp_path: Path) -> None:
    """L40S have the arithmetic, A100 the bandwidth; a slow network takes the gain away."""
    spec = shape("llama-3.1-8b")
    goal = Goal(input_tokens=2048, output_tokens=128, slo=Slo(tpot_s=0.02), may_specialise=True)
    cluster = cluster_of(tmp_path, PAIRS % "25GB/s")
    found = find_plan(Problem(spec, cluster, goal))
    together = find_plan(Problem(spec, cluster, replace(goal, may_specialise=False)))
    assert found.capacity_per_s > 1.2 * together.capacity_per_s
    replicas = to_plan(found.choices, cluster, "m").replicas
    by_role = {
        role: {rank.host for each in replicas if each.role == role for rank in _ranks(each)}
        for role in ("any", "prefill", "decode")
    }
    assert not by_role["any"]
    assert "a" in by_role["prefill"] and by_role["decode"] == {"b"}
    starts = sum(each.rate_per_s for each in found.choices if each.chain.role == "prefill")
    goes_on = sum(each.rate_per_s for each in found.choices if each.chain.role == "decode")
    assert found.capacity_per_s == min(starts, goes_on)
    assert found.mean("tpot") <= 0.02 and found.mean("ttft") > 0
    slow = find_plan(Problem(spec, cluster_of(tmp_path, PAIRS % "100MB/s"), goal))
    assert slow.capacity_per_s < found.capacity_per_s


def test_prompts_alone_keep_the_ttft_that_is_asked_for(tmp_path: Path) -> None:
    cluster = cluster_of(tmp_path, PAIRS % "25GB/s")
    slo = Slo(tpot_s=0.02, ttft_s=0.6)
    goal = Goal(input_tokens=2048, output_tokens=128, slo=slo, may_specialise=True)
    found = find_plan(Problem(shape("llama-3.1-8b"), cluster, goal))
    assert {each.chain.role for each in found.choices} == {"prefill", "decode"}
    assert 0 < found.mean("ttft") <= 0.6
    free = find_plan(Problem(shape("llama-3.1-8b"), cluster, replace(goal, slo=Slo(tpot_s=0.02))))
    assert found.capacity_per_s < free.capacity_per_s


ROLES = """
hosts:
  - {name: a, devices: 2x H100-SXM nvlink}
  - {name: b, devices: 4x A100-40-SXM pcie4}
network: {latency: 5us, bandwidth: %s}
"""


def test_roles_are_taken_at_a_rate_that_only_they_carry_within_the_slo(tmp_path: Path) -> None:
    """The quickest plan at that rate is late; whole replicas carry less."""
    spec, slo = shape("llama-3.1-70b"), Slo(ttft_s=1.0, tpot_s=0.05)
    goal = Goal(slo=slo, may_specialise=True, objective="latency", rate_per_s=2.5)
    cluster = cluster_of(tmp_path, ROLES % "200Gbit/s")
    found = find_plan(Problem(spec, cluster, goal))
    assert not found.unmet
    assert {each.chain.role for each in found.choices} == {"prefill", "decode"}
    assert found.mean("ttft") < 1.0 and found.mean("tpot") < 0.05
    slow = cluster_of(tmp_path, ROLES % "2Gbit/s")
    most = replace(goal, objective="goodput", rate_per_s=None)
    assert {e.chain.role for e in find_plan(Problem(spec, slow, most)).choices} == {"any"}


def test_the_cheapest_plan_carries_the_rate_with_fewer_devices(tmp_path: Path) -> None:
    cluster = cluster_of(tmp_path, "devices: 4x H100-SXM nvlink")
    spec = shape("llama-3.1-8b")
    most = find_plan(Problem(spec, cluster, Goal()))
    goal = Goal(objective="cost", rate_per_s=most.capacity_per_s / 5, cost_unit="devices")
    found = find_plan(Problem(spec, cluster, goal))
    assert found.value == 1
    assert found.capacity_per_s >= most.capacity_per_s / 5


def test_what_if(tmp_path: Path) -> None:
    cluster = cluster_of(tmp_path, TWO_KINDS)
    assert [each.name for each in changed(cluster, "without b").devices] == ["a.0", "a.1"]
    assert changed(cluster, "a.1 at 50%").device("a.1").speed == 0.5
    for wrong in ("a.1 slower", "without z.9", "a.1 at 0%", "a.1 at ..%", "a.1 at 200%"):
        with pytest.raises(ConfigError):
            changed(cluster, wrong)


def test_one_more_device_is_worth_something(tmp_path: Path) -> None:
    cluster = cluster_of(tmp_path, "devices: 2x H100-SXM nvlink")
    found = find_plan(Problem(shape("llama-3.1-8b"), cluster, Goal()))
    ((kind, gain),) = one_more(found)
    assert kind == "H100-SXM"
    assert gain == pytest.approx(found.capacity_per_s / 2, rel=0.05)


MANY = "\n".join(
    [
        "hosts:",
        *(f"  - {{name: h{i}, devices: 8x H100-SXM nvlink}}" for i in range(1)),
        *(f"  - {{name: l{i}, devices: 4x L40S pcie4}}" for i in range(2)),
        *(f"  - {{name: t{i}, devices: 1x A100-40-SXM}}" for i in range(4)),
        "network: {latency: 20us, bandwidth: 12GB/s}",
    ]
)


def test_many_devices_are_planned_with_a_bound_and_alike_each_time(tmp_path: Path) -> None:
    cluster = cluster_of(tmp_path, MANY)
    problem = Problem(shape("llama-3.1-70b"), cluster, Goal(slo=Slo(tpot_s=0.08)))
    found = find_plan(problem)
    assert not found.is_exact
    assert found.value <= found.bound <= found.value * 1.3
    used = [name for each in found.choices for name in each.names]
    assert len(used) == len(set(used))
    again = find_plan(problem)
    assert to_plan(found.choices, cluster, "m") == to_plan(again.choices, cluster, "m")


def test_devices_that_a_probe_finds_nearly_alike_are_taken_for_alike(tmp_path: Path) -> None:
    cluster = cluster_of(tmp_path, "devices: 8x H100-SXM nvlink")
    devices = tuple(
        replace(
            each, bandwidth_bytes_per_s=3.3e12 + index * 1e9, memory_bytes=79_500_000_000 + index
        )
        for index, each in enumerate(cluster.devices)
    )
    measured = replace(cluster, devices=devices)
    assert Inventory(measured).stock() == (8,)
    found = find_plan(Problem(shape("llama-3.1-70b"), measured, Goal()))
    alike = find_plan(Problem(shape("llama-3.1-70b"), cluster, Goal()))
    assert found.value == pytest.approx(alike.value, rel=0.05)


@pytest.mark.parametrize("objective", ["latency", "cost"])
def test_many_devices_by_the_other_objectives(tmp_path: Path, objective: str) -> None:
    cluster = cluster_of(tmp_path, MANY)
    goal = Goal(objective=objective, rate_per_s=0.5)  # type: ignore[arg-type]
    found = find_plan(Problem(shape("llama-3.1-70b"), cluster, goal))
    assert not found.unmet
    assert 0 < found.bound <= found.value * (1 + 1e-9)
    assert found.capacity_per_s >= 0.5


def test_the_linear_program() -> None:
    # max 3x + 5y, x <= 4, 2y <= 12, 3x + 2y <= 18: x = 2, y = 6 (Dantzig's classic)
    packing = pack([3.0, 5.0], [(1, 0, 3), (0, 2, 2)], (4, 12, 18))
    assert packing.counts == pytest.approx((2.0, 6.0))
    assert packing.bound == pytest.approx(36.0)


def test_the_plan_file_is_read_back(tmp_path: Path) -> None:
    cluster = cluster_of(tmp_path, MIXED)
    spec = shape("llama-3.1-70b")
    found = find_plan(Problem(spec, cluster, Goal(max_concurrency=16)))
    plan = to_plan(found.choices, cluster, "llama-3.1-70b")
    path = tmp_path / "plan.yaml"
    path.write_text(dump_plan(plan), encoding="utf-8")
    assert read_plan(path).resolve(spec) == plan


@pytest.mark.parametrize(
    ("engine", "words"),
    [
        ("vllm", "--pipeline-parallel-size"),
        ("sglang", "--pp-size"),
        ("llama.cpp", "--tensor-split"),
    ],
)
def test_emit(tmp_path: Path, engine: str, words: str) -> None:
    cluster = cluster_of(tmp_path, MIXED)
    found = find_plan(Problem(shape("llama-3.1-70b"), cluster, Goal(max_concurrency=16)))
    lines = emit(to_plan(found.choices, cluster, "m"), engine, "m", shape("llama-3.1-70b"))
    assert words in lines[-1]
    assert any(line.startswith("# ") for line in lines)
    with pytest.raises(ConfigError, match="must be one of"):
        emit(to_plan(found.choices, cluster, "m"), "tgi", "m", shape("llama-3.1-70b"))


def test_emit_roles(tmp_path: Path) -> None:
    path = tmp_path / "roles.yaml"
    path.write_text(
        "model: m\nreplicas:\n"
        "  - {stages: [{devices: [cuda:0]}], role: prefill}\n"
        "  - {stages: [{devices: [cuda:1]}], role: decode}\n",
        encoding="utf-8",
    )
    spec = shape("llama-3.1-8b")
    plan = read_plan(path).resolve(spec, num_cuda=2)
    *_, door = lines = emit(plan, "sglang", "m", spec)
    assert [line.split("--disaggregation-mode ")[1].split()[0] for line in lines[1:4:2]] == [
        "prefill",
        "decode",
    ]
    assert "--prefill http://127.0.0.1:8000 --decode http://127.0.0.1:8001" in door
    assert any(
        "role" in line or "only is not expressed" in line for line in emit(plan, "vllm", "m", spec)
    )


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *args: str) -> str:
    monkeypatch.setattr(sys, "argv", ["shoal", "plan", *args])
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    with pytest.raises(SystemExit) as left:
        main()
    told = capsys.readouterr()
    return told.out if not left.value.code else told.err


def test_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster_of(tmp_path, "devices: 2x H100-SXM nvlink")
    path, plan = str(tmp_path / "cluster.yaml"), tmp_path / "plan.yaml"
    flags = ("llama-3.1-70b", "--cluster", path, "--rate", "0.5", "--slo", "ttft=2s,tpot=60ms")
    shown = run(capsys, monkeypatch, *flags, "--explain", "-o", str(plan))
    assert "requests/s" in shown and "a decode step, ms" in shown
    assert read_plan(plan).model == "llama-3.1-70b"
    assert "vllm serve" in run(capsys, monkeypatch, *flags, "--emit", "vllm")


def test_beside_another_engines_command_nothing_is_left_unsaid(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = cluster_of(tmp_path, "devices: 2x H100-SXM nvlink").devices[0].name
    path = str(tmp_path / "cluster.yaml")
    wished = ("--rate", "1e6", "--kv-cache-precision", "fp8", "--what-if", f"{first} at 50%")
    flags = ("llama-3.1-8b", "--cluster", path, *wished)
    shown = run(capsys, monkeypatch, *flags, "--emit", "vllm").splitlines()
    said = [each for each in shown if each.startswith("#")]
    commands = [each for each in shown if not each.startswith("#")]
    assert commands and all("vllm serve" in each for each in commands)
    for words in ("not met: the rate of 1e+06", "what if ", "--kv-cache-dtype fp8", "stands for"):
        assert any(words in each for each in said)
    told = json.loads(run(capsys, monkeypatch, *flags, "--emit", "vllm", "--json"))
    assert set(commands) <= set(told["emitted"]) and told["plan"] and told["unmet"]


def test_the_command_as_json_and_what_it_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = cluster_of(tmp_path, "devices: 2x H100-SXM nvlink")
    first = cluster.devices[0].name
    path = str(tmp_path / "cluster.yaml")
    flags = ("llama-3.1-8b", "--cluster", path, "--json", "--what-if", f"without {first}")
    told = json.loads(run(capsys, monkeypatch, *flags))
    assert told["exact"] and told["what_if"][0]["requests_per_s"] < told["requests_per_s"]
    assert "stages" in told["plan"]
    for wrong, said in (
        (("--objective", "cheap"), "must be one of"),
        (("--objective", "cost"), "needs a rate"),
        (("--precision", "int3"), "must be one of"),
        (("--slo", "e2e=1s"), "ttft= and tpot="),
        (("--isl", "0"), "at least 1"),
        (("--rate", "-1"), "more than 0"),
        (("--rate", "inf"), "a number of more than 0"),
        (("--rate", "1e308"), "a number of more than 0"),
        (("--what-if", "without zz"), "no device 'zz'"),
        (("--what-if", f"without {first.partition('.')[0]}"), "leaves no device"),
        (("--kv-cache-precision", "int4"), "KV is not kept in int4"),
    ):
        assert said in run(capsys, monkeypatch, "llama-3.1-8b", "--cluster", path, *wrong)


def test_a_rate_beyond_all_sense_gets_the_nearest_plan(tmp_path: Path) -> None:
    cluster = cluster_of(tmp_path, "devices: 1x H100-SXM")
    found = find_plan(
        Problem(shape("llama-3.1-8b"), cluster, Goal(objective="cost", rate_per_s=1e9))
    )
    assert "the rate of 1e+09 requests/s" in found.unmet[0]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("devices: 2x H100-SXM nvlink\nall_reduce: {2: {16KiB: 12ms}}", "check the units"),
        ("devices: 2x H100-SXM nvlink\nall_reduce: {2: {64MiB: 1us}}", "check the units"),
        ('hosts: [{name: "a\\nb", devices: H100-SXM}]', "can be printed"),
    ],
)
def test_clusters_that_cannot_be_meant(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        cluster_of(tmp_path, text)


def test_a_trace_gives_rate_and_lengths(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster_of(tmp_path, "devices: 1x H100-SXM")
    trace = tmp_path / "trace.jsonl"
    rows = [
        {"arrival_s": index / 2, "prompt_tokens": 100 + index, "output_tokens": 50}
        for index in range(11)
    ]
    trace.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    flags = ("llama-3.1-8b", "--cluster", str(tmp_path / "cluster.yaml"), "--json")
    told = json.loads(run(capsys, monkeypatch, *flags, "--workload", str(trace)))
    assert (told["objective"], told["rate_per_s"]) == ("latency", 2.0)
    by_hand = json.loads(
        run(capsys, monkeypatch, *flags, "--rate", "2", "--isl", "105", "--osl", "50")
    )
    assert told["latency_s"] == by_hand["latency_s"]


def _ranks(replica: ReplicaPlan) -> list[RankPlan]:
    return [rank for each in replica.instances for rank in each.ranks]


def _used(outcome: Outcome) -> list[tuple[Segment, int]]:
    return [
        (segment, variant)
        for each in outcome.choices
        for segment, variant in zip(each.chain.segments, each.operation.variants, strict=True)
    ]
