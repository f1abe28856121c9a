"""Wishes that are missed, loads that are told, and what one command hands to the next."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shoal.cli.main import main
from shoal.cluster.cluster_file import read_cluster
from shoal.core.cluster import Cluster
from shoal.core.latency import Slo
from shoal.model.known_shapes import shape_folder
from shoal.model.spec import read_spec
from shoal.planner.explain import report, text
from shoal.planner.goal import Goal
from shoal.planner.large import LargeSearch
from shoal.planner.profiles import Problem
from shoal.planner.search import find_plan

SPEC = read_spec(shape_folder("llama-3.1-8b"))


def cluster_of(folder: Path, text: str) -> Cluster:
    path = folder / "cluster.yaml"
    path.write_text(text, encoding="utf-8")
    return read_cluster(path)


def shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *args: str
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["shoal", *args])
    with pytest.raises(SystemExit) as left:
        main()
    told = capsys.readouterr()
    return int(left.value.code or 0), told.out, told.err


# --- prices ---


def priced(cluster: Cluster, *prices: float) -> Cluster:
    devices = (
        replace(each, usd_per_hour=prices[index % len(prices)])
        for index, each in enumerate(cluster.devices)
    )
    return replace(cluster, devices=tuple(devices))


@pytest.mark.parametrize(
    "prices", [(0.0,), (0.0, 1.0), (1e-30,), (1e-300, 2e-300), (0.0, 1e-9, 1e9)]
)
@pytest.mark.parametrize("rate_per_s", [1e-7, 2.0, 40.0])
def test_devices_that_cost_little_or_nothing(
    tmp_path: Path, prices: tuple[float, ...], rate_per_s: float
) -> None:
    hosts = "".join(f"- {{name: h{n}, devices: L40S}}\n" for n in range(9))
    network = "network: {latency: 20us, bandwidth: 100Gbit/s}\n"
    cluster = priced(cluster_of(tmp_path, f"hosts:\n{hosts}{network}"), *prices)
    goal = Goal(objective="cost", rate_per_s=rate_per_s)
    found = find_plan(Problem(SPEC, cluster, goal))
    assert not found.unmet and found.capacity_per_s >= rate_per_s
    assert found.bound is not None and 0 <= found.bound <= found.value * (1 + 1e-9)
    assert found.value <= sum(each.usd_per_hour or 0.0 for each in cluster.devices)
    if rate_per_s <= 2 and 0.0 in prices:
        assert found.value == 0.0 and found.gap == 0.0


def test_prices_are_the_same_in_any_currency(tmp_path: Path) -> None:
    cluster = cluster_of(tmp_path, "devices: 8x L40S pcie4\n")
    bounds = []
    for unit in (1.0, 1e-12, 1e12):
        own = priced(cluster, unit, 2 * unit)
        goal = Goal(objective="cost", rate_per_s=30.0)
        found = LargeSearch(Problem(SPEC, own, goal)).cheapest()
        bounds.append(found.bound / unit)
    assert bounds == pytest.approx([bounds[0]] * 3)


# --- loads ---


@pytest.mark.parametrize("objective", ["latency", "cost", "goodput"])
def test_numbers_beside_a_rate_that_is_too_high_are_those_of_what_is_carried(
    tmp_path: Path, objective: str
) -> None:
    problem = Problem(SPEC, cluster_of(tmp_path, "devices: 1x H100-SXM"), Goal())
    most = find_plan(problem)
    for share in (1.0 + 1e-6, 1.05, 100.0):
        goal = Goal(objective=objective, rate_per_s=most.capacity_per_s * share)  # type: ignore[arg-type]
        found = find_plan(replace(problem, goal=goal))
        if not found.unmet:
            continue  # latency may take more places than goodput does
        assert found.flow_per_s == found.capacity_per_s
        assert found.mean("tpot") >= most.mean("tpot") * 0.99
        told = report(found, [])
        assert told["arriving_per_s"] == told["requests_per_s"]
        assert "; then TTFT" in text(told, explained=True)[0]


def test_a_slo_that_nothing_keeps_leaves_what_is_carried_without_it(tmp_path: Path) -> None:
    cluster = cluster_of(tmp_path, "devices: 2x H100-SXM nvlink")
    slo = Slo(ttft_s=1e-6, tpot_s=1e-6)
    goal = Goal(objective="latency", rate_per_s=1.0, slo=slo)
    found = find_plan(Problem(SPEC, cluster, goal))
    free = find_plan(Problem(SPEC, cluster, replace(goal, slo=Slo())))
    assert found.capacity_per_s == pytest.approx(free.capacity_per_s, rel=1e-6)
    (missed,) = found.unmet
    assert "TTFT <= 0.001 ms" in missed and "at this rate TPOT is" in missed


def test_a_request_alone_is_told_as_that(tmp_path: Path) -> None:
    problem = Problem(SPEC, cluster_of(tmp_path, "devices: 1x H100-SXM"), Goal())
    missed = replace(problem, goal=Goal(slo=Slo(tpot_s=1e-4), rate_per_s=3.0))
    alone = replace(problem, goal=Goal(objective="latency"))
    for each in (missed, alone):
        found = find_plan(each)
        assert found.flow_per_s == 0.0
        assert "of one request alone TTFT" in text(report(found, []), explained=False)[0]
    carried = find_plan(replace(problem, goal=Goal(objective="latency", rate_per_s=3.0)))
    assert "at 3 requests/s TTFT" in text(report(carried, []), explained=False)[0]


def test_where_no_bound_is_known_none_is_told(tmp_path: Path) -> None:
    """Where replicas of low latency don't carry the rate, what carries most stands in."""
    cluster = cluster_of(tmp_path, "devices: 7x L40S pcie4")
    problem = Problem(SPEC, cluster, Goal(slo=Slo(ttft_s=0.3, tpot_s=0.05)))
    rate_per_s = 0.97 * find_plan(problem).capacity_per_s
    goal = replace(problem.goal, objective="latency", rate_per_s=rate_per_s)
    found = find_plan(replace(problem, goal=goal))
    told = report(found, [])
    lines = text(told, explained=False)
    assert found.bound is None and found.gap is None and not found.is_exact
    assert (told["bound"], told["gap"], told["looked_at"]) == (None, None, 0)
    assert not any("from the best mix" in each for each in lines)
    assert any("this is the one that carries most" in each for each in lines)


def test_what_if_keeps_a_wish_that_is_missed_already(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster_of(tmp_path, "devices: 2x L4 pcie4")
    flags = ("plan", "llama-3.1-8b", "--cluster", str(tmp_path / "cluster.yaml"))
    wish = ("--slo", "tpot=1ms", "--what-if", "without local.1")
    _, out, _ = shown(capsys, monkeypatch, *flags, *wish, "--json")
    told = json.loads(out)
    assert "SLO TPOT of 1 ms" in told["unmet"][0]
    assert "SLO TPOT of 1 ms" in told["what_if"][0]["unmet"][0]
    wish = ("--rate", "1000", "--what-if", "local.1 at 50%")
    _, out, _ = shown(capsys, monkeypatch, *flags, *wish)
    assert "not met: the rate of 1000 requests/s" in out.split("what if")[1]
    code, _, err = shown(capsys, monkeypatch, *flags, "--what-if", "with more")
    assert code == 2 and "--what-if is" in err


# --- flags beside a trace ---


def test_a_flag_wins_over_the_trace(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster_of(tmp_path, "devices: 1x H100-SXM")
    rows = [{"arrival_s": n / 2, "prompt_tokens": 100 + n, "output_tokens": 50} for n in range(11)]
    trace = tmp_path / "trace.jsonl"
    trace.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    flags = ("plan", "llama-3.1-8b", "--cluster", str(tmp_path / "cluster.yaml"), "--json")

    def latency_s(*more: str) -> float:
        code, out, _ = shown(capsys, monkeypatch, *flags, *more)
        assert code == 0
        return float(json.loads(out)["latency_s"])

    of_trace = ("--workload", str(trace))
    by_hand = latency_s("--rate", "2", "--isl", "500", "--osl", "50")
    assert latency_s(*of_trace, "--isl", "500") == by_hand
    assert latency_s(*of_trace, "--osl", "80") == latency_s(
        "--rate", "2", "--isl", "105", "--osl", "80"
    )
    assert latency_s(*of_trace, "--rate", "1") == latency_s(
        "--rate", "1", "--isl", "105", "--osl", "50"
    )


# --- as many requests at once as were planned for ---


def test_a_plan_is_simulated_with_the_requests_it_was_made_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster_of(tmp_path, "devices: 1x H100-SXM")
    cluster, plan = str(tmp_path / "cluster.yaml"), str(tmp_path / "plan.yaml")
    crowd = ("--rate", "1000", "--num-requests", "300", "--input-tokens", "64", "--json")

    def most_running(*more: str) -> int:
        code, out, _ = shown(
            capsys, monkeypatch, "simulate", plan, "--cluster", cluster, *crowd, *more
        )
        assert code == 0
        (replica,) = json.loads(out)["series"]["replicas"]
        return int(max(replica["running"]))

    flags = ("plan", "llama-3.1-8b", "--cluster", cluster, "-o", plan)
    seen: dict[str, Any] = {}
    for planned in ("256", "16"):
        assert shown(capsys, monkeypatch, *flags, "--max-num-seqs", planned)[0] == 0
        seen[planned] = most_running()
    assert 64 < seen["256"] <= 256 and seen["16"] == 16
    assert most_running("--max-num-seqs", "8") == 8
    bare = (tmp_path / "plan.yaml").read_text("utf-8").replace("max_num_seqs: 16\n", "")
    (tmp_path / "plan.yaml").write_text(bare, "utf-8")
    assert most_running() == 64


def test_replicas_of_runner_ups_are_told_with_their_own_stages(tmp_path: Path) -> None:
    cluster = cluster_of(tmp_path, "devices: 2x H100-SXM nvlink")
    told = report(find_plan(Problem(SPEC, cluster, Goal())), ())
    other = {"wish": "w", "requests_per_s": 1.0, "ttft_s": 1.0, "tpot_s": 1.0, "quality_loss": 0.0}
    for stages, words in (([2, 1, 1], "1 x 2 + 2 x 1 stages"), ([1, 1], "2 x 1 stage,")):
        told["runner_ups"] = [{**other, "replicas": len(stages), "stages": stages}]
        assert any(f"instead, w: {words}" in each for each in text(told, explained=True))
