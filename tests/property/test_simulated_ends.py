"""Simulations that end before their load does, and loads that no engine could be meant to take."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from random import Random

import pytest
from test_simulation import arrivals, run, setup

from shoal.core.workload import Arrival, Workload
from shoal.sim import Simulation, summarise
from shoal.sim.prompts import Prompts

PLAN = "model: llama-3.1-8b\nstages: [{layers: 0-32, devices: [cuda:0]}]\n"


def test_requests_that_had_not_come_count_nowhere() -> None:
    load = arrivals(*((float(at), 10, 20) for at in range(100)))
    setups = [setup()]
    simulation = Simulation(load, setups, Random(0))
    records = simulation.run(9.5)
    report = summarise(records, setups, simulation.stats(), {"ttft": 1e9})
    counts = report["requests"]
    assert counts["planned"] == 10 and counts["not_come"] == 90
    assert counts["finished"] + counts["never_ended"] == 10
    assert report["goodput"]["share"] == counts["succeeded"] / 10
    whole = Simulation(load, setups, Random(0))
    told = summarise(whole.run(), setups, whole.stats(), {})["requests"]
    assert (told["planned"], told["not_come"]) == (100, 0)


def test_the_command_says_how_many_were_to_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "plan.yaml").write_text(PLAN)
    (tmp_path / "cluster.yaml").write_text("devices: 1x H100-SXM\n")
    base = ["shoal", "simulate", str(tmp_path / "plan.yaml")]
    base += ["--cluster", str(tmp_path / "cluster.yaml"), "--rate", "1", "--num-requests", "50"]
    assert run(monkeypatch, [*base, "--until", "10", "--slo", "ttft=10s", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    later = report["requests"]["not_come"]
    assert later == 50 - report["requests"]["planned"] and 20 < later < 50
    assert any(f"{later} more requests were to come" in each for each in report["notes"])


def test_a_prompt_that_no_replica_takes_is_refused_and_takes_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "plan.yaml").write_text(PLAN)
    (tmp_path / "cluster.yaml").write_text("devices: 1x H100-SXM\n")
    rows = [
        {"arrival_s": 0, "prompt_tokens": 10, "output_tokens": 5},
        {"arrival_s": 1, "prompt_tokens": 2_000_000_000, "output_tokens": 5},
        {"arrival_s": 3, "prompt_tokens": 10, "output_tokens": 5},
    ]
    trace = tmp_path / "trace.jsonl"
    trace.write_text("\n".join(map(json.dumps, rows)))
    argv = ["shoal", "simulate", str(tmp_path / "plan.yaml"), "--workload", str(trace), "--json"]
    tracemalloc.start()
    try:
        assert run(monkeypatch, [*argv, "--cluster", str(tmp_path / "cluster.yaml")]) == 0
        most_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    report = json.loads(capsys.readouterr().out)
    assert report["requests"]["succeeded"] == 2 and report["requests"]["never_ended"] == 0
    assert most_bytes < 300 << 20


def test_instances_that_are_in_no_route_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    second = "{instances: [{layers: 16-32, devices: [cuda:1]}, {layers: 16-32, devices: [cuda:2]}]}"
    stages = f"stages: [{{layers: 0-16, devices: [cuda:0]}}, {second}]"
    (tmp_path / "cluster.yaml").write_text("devices: 3x L4 pcie4\n")
    argv = ["shoal", "simulate", str(tmp_path / "plan.yaml"), "--rate", "1", "--num-requests", "3"]
    for routes, said in (("", 0), ("routes: [[0, 2]]\n", 1)):
        (tmp_path / "plan.yaml").write_text(f"model: llama-3.1-8b\n{stages}\n{routes}")
        assert run(monkeypatch, [*argv, "--cluster", str(tmp_path / "cluster.yaml"), "--json"]) == 0
        notes = json.loads(capsys.readouterr().out)["notes"]
        assert sum("1 of 3 instances are in no route" in each for each in notes) == said


@pytest.mark.parametrize("hashes", [(), (1, 2, 3)])
def test_prompts_end_where_they_are_refused_anyway(hashes: tuple[int, ...]) -> None:
    long = Arrival(arrival_s=0, prompt_tokens=10**9, output_tokens=1, block_hashes=hashes)
    short = Arrival(arrival_s=1, prompt_tokens=40, output_tokens=1, block_hashes=hashes)
    prompts = Prompts(Workload("w", (long, short)), most_tokens=1000)
    assert [len(prompts.request(number).prompt_ids) for number in (0, 1)] == [1000, 40]
