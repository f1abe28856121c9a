"""Helix's clusters: measured layers beside them, and placements whose layers overlap."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from shoal.cluster.cluster_file import read_cluster
from shoal.cluster.cluster_writer import dump_cluster
from shoal.cluster.helix_placement import read_placement
from shoal.core.cluster import Cluster, LayerTimes
from shoal.core.errors import ConfigError
from shoal.core.model_spec import ModelSpec
from shoal.core.plan import Hop, Plan
from shoal.core.split import Range
from shoal.core.workload import Arrival, Workload
from shoal.model.known_shapes import shape_folder
from shoal.model.spec import read_spec
from shoal.planner.goal import Goal
from shoal.planner.placement import placed_replica, routes_of
from shoal.planner.profiles import Problem
from shoal.policy.cost_model import Numbers, ReplicaCost, StepLoad
from shoal.sim import Simulation
from shoal.sim.from_plan import Limits, replica_setups

PROFILE = "outbound_nic_speed = 10 * gbps\ndisk_speed = 1 * gbps\nvram_size = {} * GB\n"
NODES = ("T4", "L4", "A100", "T4")
PLACEMENT = {2: "[0, 1]", 0: "[2, 3, 4, 5, 6, 7]", 3: "[2, 3, 4]", 1: "[4, 5, 6, 7]"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    sizes = {"T4": 16, "L4": 24, "A100": 40}
    profiles = "".join(f"[{kind}]\n{PROFILE.format(size)}" for kind, size in sizes.items())
    (tmp_path / "machine_profiles.ini").write_text(profiles)
    nodes = "".join(f"[ComputeNode-{i}]\ntype={kind}\n" for i, kind in enumerate(NODES))
    links = "".join(
        f"[Link-{a}-{b}]\nbandwidth=1000 * mbps\nlatency=1 * MilliSec\n"
        for a in range(len(NODES))
        for b in range(a)
    )
    (tmp_path / "cluster.ini").write_text(nodes + links)
    for machine, slow in (("t4", 5), ("l4", 4), ("a100", 1)):
        own = tmp_path / "llama2_70b" / machine
        own.mkdir(parents=True)
        (own / "decode_bs2time.csv").write_text(f"0,0\n2,{1.4 * slow}\n100,{2.4 * slow}\n")
        (own / "prompt_bs2time.csv").write_text(f"0,0\n250,{2 * slow}\n1000,{8 * slow}")
    return tmp_path


def _eight_layers() -> ModelSpec:
    whole = read_spec(shape_folder("llama-2-70b"))
    return replace(whole, num_layers=8, layers=whole.layers[:8])


def _placement(folder: Path, parts: dict[int, str] | None = None) -> Path:
    lines = [f"compute_node_{i + 2}={layers}" for i, layers in (parts or PLACEMENT).items()]
    path = folder / "ilp_sol.ini"
    path.write_text("[Settings]\noffset=2\n[Solution]\n" + "\n".join(lines))
    return path


def _problem(cluster: Cluster) -> Problem:
    return Problem(_eight_layers(), cluster, Goal(precisions=("float16",)))


def test_measured_layers_count(folder: Path) -> None:
    cluster = read_cluster(folder / "cluster.ini")
    assert {each.kind for each in cluster.layer_times} == {"T4", "L4", "A100-40-SXM"}
    problem = _problem(cluster)
    replica = placed_replica(read_placement(_placement(folder), cluster), problem)
    numbers = Numbers(weights="float16", activations="float16", kv="float16")
    cost = ReplicaCost(problem.spec, replica, cluster, numbers)
    first = cost.hops(0)[1]  # 3 layers on a T4, without the head
    decode = StepLoad.decode(51, 500)
    assert first.time(decode).total_s == pytest.approx(3 * (7 + 5 * 49 / 98) / 1e3)
    assert first.time(StepLoad.decode(1, 9)).total_s == pytest.approx(3 * 7e-3)  # as for two
    prompt = StepLoad.prefill(500)
    assert first.time(prompt).total_s == pytest.approx(3 * 20e-3)
    assert first.time(decode + prompt).total_s == pytest.approx(
        first.time(decode).total_s + first.time(prompt).total_s
    )
    assert first.time(StepLoad.prefill(4000)).total_s == pytest.approx(3 * 160e-3)
    assert first.error == 0.1
    other = replace(cluster, layer_times=tuple(_of_ffn(each, 1) for each in cluster.layer_times))
    roofline = ReplicaCost(problem.spec, replica, other, numbers).hops(0)[1]
    assert roofline.time(decode).total_s != pytest.approx(first.time(decode).total_s)


def _of_ffn(times: LayerTimes, ffn_size: int) -> LayerTimes:
    return replace(times, ffn_size=ffn_size)


def test_layer_times_in_a_cluster_file(folder: Path, tmp_path: Path) -> None:
    cluster = read_cluster(folder / "cluster.ini")
    path = tmp_path / "cluster.yaml"
    path.write_text(dump_cluster(cluster))
    assert read_cluster(path).layer_times == cluster.layer_times
    text = path.read_text()
    for old, new, message in (
        ("ffn: 28672, ", "", "layer times have no ffn"),
        ("kind: T4, hidden", "kind: T5, hidden", "no device of kind 'T5'"),
        ("decode: {2:", "decode: {few:", "must be a whole number from 1"),
        ("decode: {2: 7ms", "decode: {2: 7", "7"),
    ):
        assert old in text
        path.write_text(text.replace(old, new, 1))
        with pytest.raises(ConfigError, match=message):
            read_cluster(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0,0\n2,fast\n", "csv:2: '2,fast' is no point"),
        ("0,0\n4,1\n2,1\n", "must rise from line to line"),
        ("0,0\n2,-1\n", "more than 0 ms"),
        ("0,0\n", "must rise"),
    ],
)
def test_layer_times_that_are_broken(folder: Path, text: str, message: str) -> None:
    (folder / "llama2_70b" / "t4" / "decode_bs2time.csv").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_cluster(folder / "cluster.ini")


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({0: "[0, 1, 2]", 1: "[4, 5, 6, 7]"}, "no chain of devices covers layers 0-8"),
        ({0: "[0, 2]"}, "must follow each other"),
        ({9: "[0, 1]"}, "there is no host 'n9'"),
        ({0: "[0, 1, 2, 3, 4, 5, 6, 7, 8]"}, "given layers 0-9; this model has 8"),
    ],
)
def test_placements_that_are_broken(folder: Path, parts: dict[int, str], message: str) -> None:
    cluster = read_cluster(folder / "cluster.ini")
    with pytest.raises(ConfigError, match=message):
        placed_replica(read_placement(_placement(folder, parts), cluster), _problem(cluster))


def test_routes_carry_what_devices_can() -> None:
    ranges = [Range(0, 4), Range(4, 6), Range(2, 8), Range(6, 8)]
    routes = routes_of(ranges, [8.0, 2.0, 2.0, 9.0], 8)
    assert routes == [
        (Hop(0, Range(0, 4)), Hop(1, Range(4, 6)), Hop(3, Range(6, 8))),  # 1 request/s
        (Hop(0, Range(0, 4)), Hop(2, Range(4, 8))),  # 0.5
    ]


def test_routes_of_different_lengths_are_simulated(folder: Path) -> None:
    """Every request ends, on a plan with a route of two hops and one of three."""
    cluster = read_cluster(folder / "cluster.ini")
    problem = _problem(cluster)
    replica = placed_replica(read_placement(_placement(folder), cluster), problem)
    assert [[hop.layers for hop in route] for route in replica.routes] == [
        [Range(0, 2), Range(2, 5), Range(5, 8)],  # of the L4's layers 4-8, a part
        [Range(0, 2), Range(2, 8)],
    ]
    setups = replica_setups(
        Plan(replicas=(replica,)), problem.spec, cluster, Limits(precision="float16")
    )
    arrivals = [
        Arrival(arrival_s=index * 0.05, prompt_tokens=40 + index, output_tokens=12)
        for index in range(40)
    ]
    simulation = Simulation(Workload("few", tuple(arrivals)), setups, Random(0))
    records = simulation.run()
    simulation.check_integrity()
    assert all(each.is_good and each.num_output == 12 for each in records.requests)
