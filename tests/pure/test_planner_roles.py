"""Roles in large clusters: where prompts and decoding get replicas of their own, and where not."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from shoal.cli.main import main
from shoal.cluster.cluster_file import read_cluster
from shoal.core.cluster import Cluster
from shoal.core.latency import Slo
from shoal.model.known_shapes import shape_folder
from shoal.model.spec import read_spec
from shoal.plan_file import dump_plan, read_plan
from shoal.planner.chains import Bench
from shoal.planner.choice import carried, share_of
from shoal.planner.goal import Goal
from shoal.planner.kv_links import KvLinks, poorly_joined
from shoal.planner.large import LargeSearch
from shoal.planner.mix import mixed
from shoal.planner.profiles import Problem
from shoal.planner.program import pack
from shoal.planner.prompts import kv_bytes, moved_s
from shoal.planner.roles import with_roles
from shoal.planner.search import Outcome, find_plan
from shoal.planner.small import SmallSearch
from shoal.planner.to_plan import to_plan

SPEC = read_spec(shape_folder("llama-3.1-70b"))
FLEET = ("8x H100-SXM nvlink", "8x A100-40-SXM nvlink", "8x L40S pcie4")
GOAL = Goal(slo=Slo(ttft_s=1.0, tpot_s=0.05), may_specialise=True)


def cluster_of(folder: Path, devices: tuple[str, ...], speed: str, more: str = "") -> Cluster:
    path = folder / "cluster.yaml"
    hosts = "\n".join(f"  - {{name: h{n}, devices: {each}}}" for n, each in enumerate(devices))
    network = f"network: {{latency: 20us, bandwidth: {speed}}}"
    path.write_text(f"hosts:\n{hosts}\n{network}\n{more}", encoding="utf-8")
    return read_cluster(path)


def roles_of(outcome: Outcome) -> set[str]:
    return {each.chain.role for each in outcome.choices}


def test_a_fleet_starts_requests_here_and_goes_on_with_them_there(tmp_path: Path) -> None:
    cluster = cluster_of(tmp_path, FLEET, "100Gbit/s")
    found = find_plan(Problem(SPEC, cluster, GOAL))
    whole = find_plan(Problem(SPEC, cluster, replace(GOAL, may_specialise=False)))
    assert not found.unmet and roles_of(whole) == {"any"}
    assert {"prefill", "decode"} <= roles_of(found)
    assert whole.value * 1.1 < found.value <= (found.bound or 0.0) * (1 + 1e-9)
    names = [name for each in found.choices for name in each.names]
    assert len(names) == len(set(names))
    decoding = [each for each in found.choices if each.chain.role == "decode"]
    assert all(len(each.chain.segments) == 1 for each in decoding)
    arrives = [moved_s(found.problem, each.names) for each in decoding]
    assert [each.chain.moved_s for each in decoding] == pytest.approx(arrives)
    assert found.mean("tpot") <= 0.05 and 0 < found.mean("ttft") <= 1.0
    plan = to_plan(found.choices, cluster, "m")
    path = tmp_path / "plan.yaml"
    path.write_text(dump_plan(plan), encoding="utf-8")
    drafts = read_plan(path).drafts
    assert [each.role for each in drafts] == [each.role for each in plan.replicas]
    again = find_plan(Problem(SPEC, cluster, GOAL))
    assert to_plan(again.choices, cluster, "m") == plan


def test_none_are_superfluous(tmp_path: Path) -> None:
    found = find_plan(Problem(SPEC, cluster_of(tmp_path, FLEET, "100Gbit/s"), GOAL))
    for choice in found.choices:
        others = [each for each in found.choices if each is not choice]
        assert carried(others) < carried(found.choices)


@pytest.mark.parametrize("speed", ["1Gbit/s", "100Gbit/s"])
def test_where_roles_do_not_pay_the_plan_stays_as_it_is(tmp_path: Path, speed: str) -> None:
    """Slow links, or nobody who minds how long a token takes."""
    goal = GOAL if speed == "1Gbit/s" else replace(GOAL, slo=Slo())
    cluster = cluster_of(tmp_path, FLEET, speed)
    found = find_plan(Problem(SPEC, cluster, goal))
    whole = find_plan(Problem(SPEC, cluster, replace(goal, may_specialise=False)))
    assert to_plan(found.choices, cluster, "m") == to_plan(whole.choices, cluster, "m")
    assert (found.bound or 0.0) >= (whole.bound or 0.0)


def test_a_rate_costs_no_more_with_roles(tmp_path: Path) -> None:
    cluster = cluster_of(tmp_path, FLEET, "100Gbit/s")
    goal = replace(GOAL, objective="cost", rate_per_s=13.0)
    found = find_plan(Problem(SPEC, cluster, goal))
    assert not found.unmet and {"prefill", "decode"} <= roles_of(found)
    assert found.capacity_per_s >= 13.0
    assert (found.bound or 0.0) <= found.value * (1 + 1e-9)
    whole = find_plan(Problem(SPEC, cluster, replace(goal, may_specialise=False)))
    assert whole.unmet  # 11.7 requests/s are the most without


@pytest.mark.parametrize(
    ("devices", "model", "goal"),
    [
        (
            ("2x L40S pcie4", "2x A100-80-SXM nvlink"),
            "llama-3.1-8b",
            Goal(input_tokens=2048, output_tokens=128, slo=Slo(tpot_s=0.02), may_specialise=True),
        ),
        (("2x H100-SXM nvlink", "4x A100-40-SXM pcie4"), "llama-3.1-70b", GOAL),
        (("4x H100-SXM nvlink",), "llama-3.1-8b", replace(GOAL, slo=Slo(tpot_s=0.01))),
    ],
)
def test_few_devices_are_used_about_as_well_as_by_looking_at_all_plans(
    tmp_path: Path, devices: tuple[str, ...], model: str, goal: Goal
) -> None:
    cluster = cluster_of(tmp_path, devices, "200Gbit/s")
    problem = Problem(read_spec(shape_folder(model)), cluster, goal)
    bench, names = Bench(problem, cluster.devices), [each.name for each in cluster.devices]
    best = carried(SmallSearch(problem, bench, names).most_goodput())
    found = with_roles(problem, LargeSearch(problem).most_goodput())
    assert carried(found.choices) > 0.9 * best
    assert found.bound >= carried(found.choices)


def test_all_that_have_roles_keep_kv_alike(tmp_path: Path) -> None:
    """V100s have no bfloat16: what they start, A100s would compute again."""
    devices = ("8x A100-40-SXM nvlink", "8x V100-SXM2-32 nvlink")
    problem = Problem(SPEC, cluster_of(tmp_path, devices, "100Gbit/s"), GOAL)
    whole = LargeSearch(problem)
    kept = {numbers for each in whole.columns for numbers in each.choice.keeps}
    assert len(kept) > 1
    for like in kept:
        columns = LargeSearch(problem, like).columns
        assert all(each.choice.keeps == {like} for each in columns)
    found = with_roles(problem, whole.most_goodput())
    if any(each.chain.role != "any" for each in found.choices):
        assert len({numbers for each in found.choices for numbers in each.keeps}) == 1


def test_a_host_that_kv_gets_to_slowly_has_no_role(tmp_path: Path) -> None:
    rows = ", ".join(
        f"{{between: [h{n}, h3], latency: 1ms, bandwidth: 100Mbit/s}}" for n in range(3)
    )
    hosts = (*FLEET, "4x H100-SXM nvlink")
    cluster = cluster_of(tmp_path, hosts, "100Gbit/s", f"links: [{rows}]\n")
    assert poorly_joined(cluster) == {"h3"}
    found = find_plan(Problem(SPEC, cluster, GOAL))
    assert {"prefill", "decode"} <= roles_of(found)
    for each in found.choices:
        if each.chain.role != "any":
            assert not any(name.startswith("h3") for name in each.names)


def test_kv_takes_as_long_as_over_the_slowest_link_to_any_other_device(tmp_path: Path) -> None:
    devices = ("2x H100-SXM nvlink", "1x H100-SXM", "1x A100-80-SXM")
    link = "{between: [h1, h2], latency: 1us, bandwidth: 1GB/s}"
    cluster = cluster_of(tmp_path, devices, "20GB/s", f"links: [{link}]\n")
    problem = Problem(SPEC, cluster, GOAL)
    links = KvLinks(cluster, frozenset())
    for host in cluster.hosts:
        own = [each for each in cluster.devices if each.host == host.name]
        seconds = links.slowest_s({host.name}, kv_bytes(problem, own))
        assert seconds == pytest.approx(moved_s(problem, [each.name for each in own]))
    assert links.slowest_s({"h0"}, 1e9) == pytest.approx(0.05, rel=0.01)
    without = KvLinks(cluster, frozenset({"h2"}))
    assert without.slowest_s({"h1"}, 1e9) < links.slowest_s({"h1"}, 1e9)


def test_whole_replicas_beside_roles_share_what_is_carried(tmp_path: Path) -> None:
    problem = Problem(SPEC, cluster_of(tmp_path, FLEET, "100Gbit/s"), GOAL)
    (like,) = {n for each in find_plan(problem).choices for n in each.keeps}
    columns = LargeSearch(problem, like).columns
    some = {each.role: each.choice for each in columns}
    choices = [some["any"], some["prefill"], some["decode"], some["decode"]]
    shares = [share_of(each, choices) for each in choices]
    assert shares[0] + shares[1] == pytest.approx(1.0) == shares[0] + shares[2] + shares[3]
    assert shares[0] == pytest.approx(choices[0].rate_per_s / carried(choices))


def test_no_counts_of_columns_carry_more_than_the_program_says(tmp_path: Path) -> None:
    problem = Problem(SPEC, cluster_of(tmp_path, FLEET, "100Gbit/s"), GOAL)
    (like,) = {n for each in find_plan(problem).choices for n in each.keeps}
    search = LargeSearch(problem, like)
    mix, rng = mixed(search.columns, search.stock), Random(3)
    assert mix.carried == pytest.approx(mix.bound)
    for _ in range(200):
        left, taken = list(search.stock), []
        for column in rng.sample(search.columns, len(search.columns)):
            if all(use <= n for use, n in zip(column.uses, left, strict=True)):
                left = [n - use for use, n in zip(column.uses, left, strict=True)]
                taken.append(column.choice)
        assert carried(taken) <= mix.bound * (1 + 1e-9)


def test_balances_hold_and_their_prices_bound() -> None:
    rng = Random(5)
    for _ in range(30):
        rates = [rng.uniform(0.1, 5) for _ in range(12)]
        roles = [rng.choice(("any", "prefill", "decode")) for _ in rates]
        takes = [[rng.choice([0, 1, 2]) + (n == k % 3) for n in range(3)] for k in range(12)]
        brings = [
            [-rate if role == own else 0.0 for own in ("prefill", "decode")]
            for rate, role in zip(rates, roles, strict=True)
        ]
        uses = [[*own, *more] for own, more in zip(takes, brings, strict=True)]
        uses.append([0, 0, 0, 1, 1])
        values = [r if role == "any" else 0.0 for r, role in zip(rates, roles, strict=True)]
        stock = [*(rng.randint(1, 9) for _ in range(3)), rng.choice([0, 2]), rng.choice([0, 3])]
        packing = pack([*values, 1.0], uses, stock, 2)
        for row, most in enumerate(stock):
            used = sum(n * use[row] for n, use in zip(packing.counts, uses, strict=True))
            assert used <= most + 1e-9
        worth = sum(n * value for n, value in zip(packing.counts, [*values, 1.0], strict=True))
        assert worth == pytest.approx(packing.bound)


def test_the_command_tells_roles_of_many_devices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster_of(tmp_path, FLEET, "100Gbit/s")
    words = ["plan", "llama-3.1-70b", "--cluster", str(tmp_path / "cluster.yaml"), "--roles"]
    monkeypatch.setattr("sys.argv", ["shoal", *words, "--slo", "ttft=1s,tpot=50ms"])
    monkeypatch.setattr("sys.stdin", io.StringIO())
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().out
    assert not ended.value.code and "decode" in said and "prefill" in said
    assert "at most" in said and "best mix" in said
