"""Large clusters whose hosts are not all joined alike: no group gets the links of another."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from shoal.cluster.cluster_file import read_cluster
from shoal.core.cluster import Cluster
from shoal.core.latency import Slo
from shoal.model.known_shapes import shape_folder
from shoal.model.spec import read_spec
from shoal.planner.chains import Bench
from shoal.planner.goal import Goal
from shoal.planner.inventory import Inventory
from shoal.planner.joins import Joins
from shoal.planner.pipeline import Chain, Segment
from shoal.planner.profiles import Group, Problem
from shoal.planner.search import Outcome, find_plan
from shoal.planner.service import peak
from shoal.planner.to_plan import to_plan

SPEC = read_spec(shape_folder("llama-3.1-70b"))
FAST = "{between: [%s, %s], latency: 5us, bandwidth: 400Gbit/s}"
SUMS = "{between: [%s, %s], points: {16KiB: 20us, 1MiB: 80us, 16MiB: 500us}}"
SLOW = "{latency: 50us, bandwidth: 1Gbit/s}"


def cluster_of(folder: Path, devices: Sequence[str], more: str, network: str = SLOW) -> Cluster:
    hosts = "\n".join(f"  - {{name: h{n}, devices: {each}}}" for n, each in enumerate(devices))
    path = folder / "cluster.yaml"
    path.write_text(f"hosts:\n{hosts}\nnetwork: {network}\n{more}", encoding="utf-8")
    return read_cluster(path)


def rates_of_real_links(outcome: Outcome) -> list[float]:
    """Of each replica what it carries, worked out anew for just its devices."""
    problem, rates = outcome.problem, []
    for choice in outcome.choices:
        segments = [
            Segment(
                tuple(
                    Group(problem, [problem.cluster.device(name) for name in group.names])
                    for group in segment.groups
                )
            )
            for segment in choice.chain.segments
        ]
        found = peak(Chain(problem, segments, thorough=False))
        rates.append(0.0 if found is None else found.rate_per_s)
    return rates


PAIRS = (("h0", "h1"),), (("h0", "h1"), ("h4", "h6")), (("h2", "h7"), ("h7", "h3"), ("h3", "h2"))


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize(("kind", "row"), [("links", FAST), ("sums", SUMS)])
@pytest.mark.parametrize("tpot_s", [0.035, 0.1])
def test_groups_over_hosts_have_the_links_that_they_have(
    tmp_path: Path, pairs: tuple[tuple[str, str], ...], kind: str, row: str, tpot_s: float
) -> None:
    rows = ", ".join(row % pair for pair in pairs)
    cluster = cluster_of(tmp_path, ["1x H100-SXM"] * 8, f"{kind}: [{rows}]\n")
    found = find_plan(Problem(SPEC, cluster, Goal(slo=Slo(tpot_s=tpot_s))))
    assert not found.unmet
    assert found.value <= (found.bound or 0.0) * (1 + 1e-9)
    told = [each.rate_per_s for each in found.choices]
    assert told == pytest.approx(rates_of_real_links(found), rel=1e-6)
    groups = [s.group for each in found.choices for s in each.chain.segments]
    joined = [{d.host for d in each.devices} for each in groups if len(each.devices) > 1]
    assert joined and all(tuple(sorted(each)) in map(_in_order, pairs) for each in joined)


@pytest.mark.parametrize("objective", ["latency", "cost"])
def test_other_objectives_serve_all_requests_over_real_links(
    tmp_path: Path, objective: str
) -> None:
    rows = ", ".join(FAST % pair for pair in (("h0", "h1"), ("h4", "h6")))
    cluster = cluster_of(tmp_path, ["1x H100-SXM"] * 8, f"links: [{rows}]\n")
    goal = Goal(objective=objective, rate_per_s=4.0)  # type: ignore[arg-type]
    found = find_plan(Problem(SPEC, cluster, goal))
    assert not found.unmet and found.capacity_per_s >= 4.0
    # A plan of other devices with fewer prompts in the way may be told as less than its most.
    told = [each.rate_per_s for each in found.choices]
    assert all(a <= b * (1 + 1e-6) for a, b in zip(told, rates_of_real_links(found), strict=True))
    if objective == "latency":
        assert sum(each.share or 0.0 for each in found.choices) == pytest.approx(1.0)


def test_pairs_of_devices_in_a_host_are_priced_as_they_are_joined(tmp_path: Path) -> None:
    """Bridges between 0 and 1 of each host, and nothing but PCIe between the others."""
    bridges = ", ".join(FAST % (f"h{n}.0", f"h{n}.1") for n in range(4))
    cluster = cluster_of(tmp_path, ["4x A100-80-PCIe pcie4"] * 4, f"links: [{bridges}]\n")
    found = find_plan(Problem(SPEC, cluster, Goal(slo=Slo(tpot_s=0.1))))
    told = [each.rate_per_s for each in found.choices]
    assert told == pytest.approx(rates_of_real_links(found), rel=1e-6)


def test_sums_of_some_hosts_are_not_those_of_others_in_small_clusters(tmp_path: Path) -> None:
    cluster = cluster_of(tmp_path, ["1x H100-SXM"] * 4, f"sums: [{SUMS % ('h0', 'h1')}]\n")
    bench = Bench(Problem(SPEC, cluster, Goal()), cluster.devices)
    fast, slow = bench.group(["h0.0", "h1.0"]), bench.group(["h2.0", "h3.0"])
    assert fast.variants[0].layer_s(1) * 2 < slow.variants[0].layer_s(1)


def test_classes_of_hosts(tmp_path: Path) -> None:
    devices = ["2x H100-SXM nvlink"] * 4
    assert Joins(cluster_of(tmp_path, devices, "")).num_classes == 1
    alike = cluster_of(tmp_path, devices, "links: [{between: [h0, h1], " + SLOW[1:] + "]")
    assert Joins(alike).num_classes == 1
    joins = Joins(cluster_of(tmp_path, devices, f"links: [{FAST % ('h0', 'h1')}]\n"))
    assert joins.num_classes == 2
    assert joins.between("h1", "h0") == 0 and joins.between("h0", "h2") == 1
    assert [joins.best(f"h{n}") for n in range(4)] == [0, 0, 1, 1]


def test_scarce_groups_are_a_resource_of_their_own(tmp_path: Path) -> None:
    pairs = (("h0", "h1"), ("h2", "h3"), ("h3", "h4"))
    rows = ", ".join(FAST % pair for pair in pairs)
    inventory = Inventory(cluster_of(tmp_path, ["1x H100-SXM"] * 6, f"links: [{rows}]\n"))
    (pair,) = (each for each in inventory.forms() if each.num_hosts == 2 and each.reach == 0)
    assert inventory.stock() == (6, 2)  # h2 is joined well to h3, or h3 to h4
    assert inventory.uses(pair) == ((0, 2), (1, 1))
    before = [each.name for each in inventory.free()]
    groups = inventory.take([pair, pair])
    assert groups is not None and inventory.stock() == (2, 0)
    for group in groups:
        assert tuple(sorted(each.host for each in group)) in pairs
    assert inventory.take([pair]) is None
    inventory.give_back([device for group in groups for device in group])
    assert [each.name for each in inventory.free()] == before


def test_groups_that_need_no_good_links_leave_them_to_others(tmp_path: Path) -> None:
    inventory = Inventory(
        cluster_of(tmp_path, ["1x H100-SXM"] * 4, f"links: [{FAST % ('h0', 'h1')}]\n")
    )
    single = next(each for each in inventory.forms() if each.num_devices == 1)
    taken = inventory.take([single, single])
    assert taken is not None and {each.host for (each,) in taken} == {"h2", "h3"}


def test_alike_each_time(tmp_path: Path) -> None:
    rows = ", ".join(FAST % (f"h{n}", f"h{n + 1}") for n in range(0, 12, 2))
    cluster = cluster_of(tmp_path, ["1x H100-SXM", "1x A100-80-SXM"] * 6, f"links: [{rows}]\n")
    problem = Problem(SPEC, cluster, Goal(slo=Slo(tpot_s=0.06)))
    found, again = find_plan(problem), find_plan(problem)
    assert to_plan(found.choices, cluster, "m") == to_plan(again.choices, cluster, "m")
    used = [name for each in found.choices for name in each.names]
    assert len(used) == len(set(used))


def _in_order(pair: tuple[str, str]) -> tuple[str, ...]:
    return tuple(sorted(pair))
