"""Simulations that end before their load does, and loads that no engine could be meant to take."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_cost import LinearCost
from test_simulation import arrivals, run, setup

from shoal.core.workload import Arrival, Workload
from shoal.sim import Fault, Simulation, summarise
from shoal.sim.prompts import Prompts
from shoal.sim.records import Gaps

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


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32), until_s=st.floats(0.0, 20.0), num_stages=st.integers(1, 2))
def test_runs_and_single_steps_end_at_the_same_time(
    seed: int, until_s: float, num_stages: int
) -> None:
    """In the middle of runs, between two looks of the router."""
    rng = Random(seed)
    load = arrivals(*((rng.uniform(0, 15), rng.choice([5, 300]), 400) for _ in range(12)))
    load = Workload("some", tuple(sorted(load.arrivals, key=lambda each: each.arrival_s)))
    found = []
    for runs in (True, False):
        setups = [setup(f"replica-{number}", num_stages=num_stages) for number in range(2)]
        simulation = Simulation(load, setups, Random(0), runs=runs)
        records = simulation.run(until_s)
        report = summarise(records, setups, simulation.stats(), {"ttft": 0.5})
        found.append((records.requests, records.gaps.counts, records.samples, report))
    assert found[0] == found[1]
    assert found[0][3]["duration_s"] == until_s or found[0][3]["requests"]["never_ended"] == 0


def test_what_a_server_refuses_as_too_long_is_refused() -> None:
    """By its prompt and the answer that it asks for, at the least context of those that run."""
    load = arrivals((0.0, 90, 11), (1.0, 90, 10), (2.0, 90, 11), (4.0, 90, 11), (4.0, 102, 1))
    setups = [setup("small", max_model_len=100), setup("large", max_model_len=101)]
    lost = [Fault(at_s=3.0, replica="small", kind="lose")]
    simulation = Simulation(load, setups, Random(0), faults=lost)
    requests = simulation.run().requests
    simulation.check_integrity()
    long = "context_length_exceeded"
    assert [each.error for each in requests] == [long, None, long, None, long]
    assert [each.num_output for each in requests] == [0, 10, 0, 11, 0]


@pytest.mark.parametrize("share", [0.3, 0.8])
def test_one_at_a_time_is_the_queue_of_the_books(share: float) -> None:
    """Lindley's recursion: waits are what the one before waited and took, less the gap."""
    rng, now_s, rows = Random(4), 0.0, list[tuple[float, int, int]]()
    for _ in range(400):
        rows.append((now_s, 16, rng.choice([5, 20, 35])))
        now_s += rng.expovariate(share / (20 * 0.01 + 20 * 0.001 + 0.015))
    setups = [setup(max_num_seqs=1, max_waiting=1000, prefix_caching=False)]
    records = Simulation(arrivals(*rows), setups, Random(0)).run()
    wait_s, before = 0.0, (0.0, 0.0)
    for (at_s, prompt, answer), record in zip(rows, records.requests, strict=True):
        wait_s = max(wait_s + before[1] - (at_s - before[0]), 0.0)
        took_s = 0.01 + prompt * 0.001 + (answer - 1) * 0.011
        assert record.queue_s == pytest.approx(wait_s, abs=1e-6)
        assert record.e2e_s == pytest.approx(wait_s + took_s, abs=1e-6)
        before = at_s, took_s
    assert sum(each.queue_s or 0.0 for each in records.requests) > 1.0


def test_a_replica_that_has_said_nothing_new_foresees_nothing_anew() -> None:
    """Where requests move, all are asked at every look: four a second, beside Steps of two."""
    asked = [0]

    class CountedCost(LinearCost):
        def decodes_s(
            self, lengths: Sequence[int], count: int, route: int, hop: int
        ) -> list[float]:
            asked[0] += 1
            return super().decodes_s(lengths, count, route, hop)

    setups = [
        replace(setup(name), cost=CountedCost(step_s=2.0), role=role)
        for name, role in (("one", "any"), ("other", "any"))
    ]
    drain = [Fault(at_s=1e4, replica="other", kind="drain")]
    Simulation(arrivals((0.0, 10, 200)), setups, Random(0), faults=drain).run()
    assert 0 < asked[0] <= 200  # once a Step at most


def test_no_percentile_is_above_the_longest() -> None:
    gaps = Gaps()
    for seconds in (0.011, 0.011, 0.0):
        gaps.add(seconds)
    assert gaps.percentile(99) == gaps.longest_s == 0.011


def test_nothing_is_simulated_for_a_file_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Simulation, "run", None)
    (tmp_path / "plan.yaml").write_text(PLAN)
    (tmp_path / "cluster.yaml").write_text("devices: 1x H100-SXM\n")
    argv = ["shoal", "simulate", str(tmp_path / "plan.yaml"), "--rate", "1"]
    argv += ["--cluster", str(tmp_path / "cluster.yaml")]
    for flag, path in (("--html", tmp_path / "no" / "page.html"), ("--output", tmp_path)):
        assert run(monkeypatch, [*argv, flag, str(path)]) == 2
        assert f"choose another {flag}" in capsys.readouterr().err


def test_what_stalls_for_years_ends_and_what_failed_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("shoal.cli.simulate._MOST_S", 60.0)
    (tmp_path / "plan.yaml").write_text(PLAN)
    (tmp_path / "cluster.yaml").write_text("devices: 1x H100-SXM\n")
    (tmp_path / "events.yaml").write_text("- {at: 1, replica: replica-0, stall: 1000000000}\n")
    rows = [(0, 10, 5), (2, 10, 5), (3, 10, 2_000_000)]
    lines = [
        json.dumps({"arrival_s": at, "prompt_tokens": prompt, "output_tokens": answer})
        for at, prompt, answer in rows
    ]
    (tmp_path / "trace.jsonl").write_text("\n".join(lines))
    argv = ["shoal", "simulate", str(tmp_path / "plan.yaml"), "--json"]
    argv += ["--workload", str(tmp_path / "trace.jsonl"), "--events", str(tmp_path / "events.yaml")]
    assert run(monkeypatch, [*argv, "--cluster", str(tmp_path / "cluster.yaml")]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["duration_s"] == 63.0
    assert report["requests"]["never_ended"] == 1
    assert report["errors"] == {"context_length_exceeded": 1}
    assert "1 requests failed: context_length_exceeded" in report["notes"]


def test_of_many_replicas_a_terminal_shows_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = "\n".join(f"  - stages: [{{devices: [cuda:{n}]}}]" for n in range(20))
    (tmp_path / "plan.yaml").write_text(f"model: llama-3.1-8b\nreplicas:\n{rows}\n")
    (tmp_path / "cluster.yaml").write_text("devices: 20x L4 pcie4\n")
    argv = ["shoal", "simulate", str(tmp_path / "plan.yaml"), "--rate", "5", "--num-requests", "3"]
    assert run(monkeypatch, [*argv, "--cluster", str(tmp_path / "cluster.yaml")]) == 0
    said = capsys.readouterr().out
    assert said.count(": busy ") == 16 and "... and 4 replicas more" in said
    assert "second attempts" not in said


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
