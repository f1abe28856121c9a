"""Plans of many devices: replicas that prices ask for, groups over hosts, shares of a rate."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path
from random import Random

import numpy as np
import pytest

from shoal.cluster.cluster_file import read_cluster
from shoal.core.cluster import Cluster
from shoal.core.latency import Slo
from shoal.model.known_shapes import shape_folder
from shoal.model.spec import read_spec
from shoal.planner.goal import Goal
from shoal.planner.inventory import Form, Inventory
from shoal.planner.large import LargeSearch
from shoal.planner.pricing import packed_stages, traced
from shoal.planner.profiles import Problem
from shoal.planner.program import pack
from shoal.planner.search import find_plan
from shoal.planner.to_plan import to_plan

SPEC = read_spec(shape_folder("llama-3.1-70b"))


def cluster_of(folder: Path, hosts: list[str]) -> Cluster:
    path = folder / "cluster.yaml"
    rows = "\n".join(f"  - {{name: h{n}, devices: {each}}}" for n, each in enumerate(hosts))
    network = "network: {latency: 20us, bandwidth: 100Gbit/s}"
    path.write_text(f"hosts:\n{rows}\n{network}\n", encoding="utf-8")
    return read_cluster(path)


def test_hosts_of_one_device_work_together_where_alone_they_are_too_slow(tmp_path: Path) -> None:
    """A token's way through all weights on A100s of 40 GB takes 0.1 s, one by one."""
    cluster = cluster_of(tmp_path, ["A100-40-SXM"] * 8 + ["H200-SXM"] * 4)
    goal = Goal(slo=Slo(ttft_s=3.0, tpot_s=0.1))
    found = find_plan(Problem(SPEC, cluster, goal))
    assert not found.left_out
    groups = [s.group for each in found.choices for s in each.chain.segments]
    assert any(len({device.host for device in group.devices}) > 1 for group in groups)
    assert found.gap < 0.05


def test_prices_ask_for_pipelines_of_several_kinds(tmp_path: Path) -> None:
    """More is carried than any mix of pipelines of one kind or two, the first columns, can."""
    kinds = ("A100-80-SXM", "A100-40-SXM", "L40S", "A30", "RTX-3090")
    cluster = cluster_of(tmp_path, [each for each in kinds for _ in range(3)])
    search = LargeSearch(Problem(SPEC, cluster, Goal()))
    values, uses = [c.rate_per_s for c in search.columns], [c.uses for c in search.columns]
    first = pack(values, uses, search.stock).bound
    found = search.most_goodput()
    assert found.bound > first * 1.02
    used = [name for each in found.choices for name in each.names]
    assert len(used) == len(set(used))


@pytest.mark.parametrize("rate_per_s", [1.0, 10.0])
def test_a_rate_is_shared_out_over_replicas_that_differ(tmp_path: Path, rate_per_s: float) -> None:
    kinds = ("H200-SXM nvlink", "H100-SXM nvlink", "A100-80-SXM nvlink")
    cluster = cluster_of(tmp_path, [f"4x {each}" for each in kinds])
    goal = Goal(objective="latency", rate_per_s=rate_per_s)
    found = find_plan(Problem(SPEC, cluster, goal))
    assert not found.unmet
    assert sum(each.share or 0.0 for each in found.choices) == pytest.approx(1.0)
    assert found.bound <= found.value * (1 + 1e-9) and found.gap < 0.3
    again = find_plan(Problem(SPEC, cluster, goal))
    assert to_plan(found.choices, cluster, "m") == to_plan(again.choices, cluster, "m")


_PRINTS_A_PLAN = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_planner_fleets import HOSTS, SPEC, cluster_of
from shoal.planner.goal import Goal
from shoal.planner.profiles import Problem
from shoal.planner.search import find_plan
from shoal.planner.to_plan import to_plan
cluster = cluster_of(Path(sys.argv[2]), HOSTS)
print(to_plan(find_plan(Problem(SPEC, cluster, Goal())).choices, cluster, "m"))
"""
HOSTS = ["2x A100-80-SXM nvlink", "2x A100-80-SXM nvlink", "2x H100-SXM nvlink", "1x H100-SXM"]


def test_hash_seeds_and_the_order_of_hosts_do_not_matter(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _PRINTS_A_PLAN, str(Path(__file__).parent), str(tmp_path)]
    plans = {
        subprocess.run(
            command,
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(plans) == 1 and min(plans)
    values = [
        find_plan(Problem(SPEC, cluster_of(tmp_path, hosts), Goal())).value
        for hosts in (HOSTS, HOSTS[::-1])
    ]
    assert values[0] == pytest.approx(values[1], rel=0.01)


def test_more_load_takes_no_less(tmp_path: Path) -> None:
    cluster = cluster_of(tmp_path, ["4x H200-SXM nvlink", "4x H100-SXM nvlink"])
    found = [
        find_plan(Problem(SPEC, cluster, Goal(objective="latency", rate_per_s=rate)))
        for rate in (0.5, 4.0, 8.0)
    ]
    assert [each.value for each in found] == sorted(each.value for each in found)
    assert [each.bound for each in found] == sorted(each.bound for each in found)


def test_what_was_peeked_at_is_free_again(tmp_path: Path) -> None:
    inventory = Inventory(cluster_of(tmp_path, ["2x H100-SXM nvlink"] * 4))
    before = [each.name for each in inventory.free()]
    spread, single = Form(((0, 2),), 2), Form(((0, 1),))
    groups = inventory.peek([single, spread, single])
    assert groups is not None and [len(each) for each in groups] == [1, 4, 1]
    assert len({each.host for each in groups[1]}) == 2
    assert inventory.take([spread, spread, single]) is None
    assert [each.name for each in inventory.free()] == before


def test_the_cheapest_stages_are_those_of_all_ways() -> None:
    rng = Random(7)
    for _ in range(20):
        items = [(rng.uniform(0, 3), rng.randint(1, 6), rng.randint(1, 3)) for _ in range(4)]
        depth, num_layers = rng.randint(1, 5), rng.randint(3, 12)
        cost, taken = packed_stages(items, depth, num_layers)
        ways = itertools.product(*(range(copies + 1) for *_, copies in items))
        prices = [
            sum(n * price for n, (price, _, _) in zip(way, items, strict=True))
            for way in ways
            if sum(way) == depth
            and sum(n * held for n, (_, held, _) in zip(way, items, strict=True)) >= num_layers
        ]
        assert cost[depth, num_layers] == pytest.approx(min(prices, default=np.inf))
        if prices:
            counts = traced(taken, [held for _, held, _ in items], depth, num_layers)
            assert sum(counts) == depth
            own = sum(n * price for n, (price, _, _) in zip(counts, items, strict=True))
            assert own == pytest.approx(min(prices))


def test_programs_meet_their_bounds() -> None:
    rng = Random(3)
    for _ in range(30):
        values = [rng.uniform(0, 5) for _ in range(25)]
        uses = [[rng.choice([0, 0, 1, 2, 5]) for _ in range(4)] for _ in values]
        uses = [each if any(each) else [1, 0, 0, 0] for each in uses]
        stock = [rng.randint(1, 40) for _ in range(4)]
        packing = pack(values, uses, stock)
        for row, most in enumerate(stock):
            taken = sum(n * use[row] for n, use in zip(packing.counts, uses, strict=True))
            assert taken <= most * (1 + 1e-9)
        worth = sum(n * value for n, value in zip(packing.counts, values, strict=True))
        assert worth == pytest.approx(packing.bound)
