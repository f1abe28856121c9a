"""KV between replicas of a plan, on paper: bytes and links are the planner's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shoal.cli.main import main
from shoal.cli.model_shape import spec_of
from shoal.cluster.cluster_file import read_cluster
from shoal.plan_file import read_plan
from shoal.planner.goal import Goal
from shoal.planner.profiles import Problem
from shoal.planner.prompts import moved_s
from shoal.sim.from_plan import Limits, planned_links, replica_setups

CLUSTER = """\
hosts:
  - {name: a, devices: 2x H100-SXM nvlink}
  - {name: b, devices: 2x A100-40-SXM pcie4}
network: {latency: 5us, bandwidth: 10Gbit/s}
"""
PLAN = """\
model: llama-3.1-8b
replicas:
  - role: prefill
    stages:
      - {layers: 0-14, devices: [{host: a, device: "cuda:0"}]}
      - {layers: 14-32, devices: [{host: a, device: "cuda:1"}]}
  - role: decode
    stages: [{devices: [{host: b, device: "cuda:0"}, {host: b, device: "cuda:1"}]}]
"""


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    plan, cluster = tmp_path / "plan.yaml", tmp_path / "cluster.yaml"
    plan.write_text(PLAN)
    cluster.write_text(CLUSTER)
    return plan, cluster


def test_kv_takes_as_long_as_the_planner_says(files: tuple[Path, Path]) -> None:
    spec, cluster = spec_of("llama-3.1-8b"), read_cluster(files[1])
    plan = read_plan(files[0]).resolve(spec)
    num_blocks = 64
    goal = Goal(input_tokens=16 * num_blocks, precisions=("bfloat16",))
    wanted_s = moved_s(Problem(spec, cluster, goal, "shoal"), ["b.0", "b.1"])
    links = planned_links(plan, spec, cluster, Limits())
    for pair in (("replica-0", "replica-1"), ("replica-1", "replica-0")):
        link = links(*pair)
        assert link.latency_s + num_blocks * link.block_s == pytest.approx(wanted_s, rel=0.01)
    starts, goes_on = replica_setups(plan, spec, cluster, Limits())
    assert starts.kv_block_bytes == goes_on.kv_block_bytes == 16 * 32 * 2 * 8 * 128 * 2


def test_a_plan_with_roles_is_simulated_with_its_kv(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, cluster = map(str, files)
    load = [
        "--rate",
        "1",
        "--num-requests",
        "20",
        "--input-tokens",
        "1024",
        "--output-tokens",
        "64",
    ]
    monkeypatch.setattr(
        "sys.argv", ["shoal", "simulate", plan, "--cluster", cluster, *load, "--json"]
    )
    with pytest.raises(SystemExit) as left:
        main()
    assert not left.value.code
    report = json.loads(capsys.readouterr().out)
    starts, goes_on = report["replicas"]
    assert report["kv_moved"]["pulls"] == report["requests"]["succeeded"] == 20
    assert report["kv_moved"]["blocks"] == 20 * 64
    assert goes_on["cached_tokens"] == 20 * 1024
    assert goes_on["output_tokens"] > 0.5 * 20 * 64 > starts["output_tokens"] >= 20
