"""The simulator: times that can be worked out by hand, faults, plans and clusters as files."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from linear_cost import LinearCost

from shoal.cli.fault_file import read_faults
from shoal.cli.main import main
from shoal.cluster import catalogue
from shoal.core.cluster import Cluster, Host
from shoal.core.errors import ConfigError
from shoal.core.plan import Hop, InstancePlan, RankPlan, ReplicaPlan, StagePlan, default_routes
from shoal.core.split import Range, split_by_weights
from shoal.core.workload import Arrival, Workload
from shoal.engine.config import EngineConfig
from shoal.model.known_shapes import shape_folder
from shoal.model.spec import read_spec
from shoal.policy.cost_model import Numbers, ReplicaCost, StepLoad
from shoal.policy.cost_model.constants import TYPICAL
from shoal.sim import (
    Fault,
    ModelledCost,
    ReplicaSetup,
    Simulation,
    html_page,
    summarise,
)
from shoal.sim.faults import RequestStall
from shoal.sim.records import Gaps, Records

STEP_S, TOKEN_S, HOP_S = 0.01, 0.001, 0.002


def setup(name: str = "replica-0", num_stages: int = 1, **changes: Any) -> ReplicaSetup:
    fields: dict[str, Any] = {
        "instance_blocks": (1000,) * num_stages,
        "max_model_len": 4096,
        "vocab_size": 1000,
        "max_num_batched_tokens": 256,
        "routes": (tuple(Hop(i, Range(i, i + 1)) for i in range(num_stages)),),
    }
    cost = LinearCost(step_s=STEP_S, token_s=TOKEN_S, hop_s=HOP_S)
    return ReplicaSetup(name=name, config=EngineConfig(**{**fields, **changes}), cost=cost)


def arrivals(*each: tuple[float, int, int]) -> Workload:
    return Workload(
        "test",
        tuple(Arrival(arrival_s=at, prompt_tokens=n, output_tokens=m) for at, n, m in each),
    )


def simulate(
    workload: Workload, setups: Sequence[ReplicaSetup], faults: Sequence[Fault | RequestStall] = ()
) -> tuple[Records, dict[str, Any]]:
    simulation = Simulation(workload, setups, random.Random(0), faults=faults)
    records = simulation.run()
    simulation.check_integrity()
    return records, summarise(records, setups, simulation.stats(), {"tpot": 0.0115})


def test_one_request_takes_what_its_steps_take() -> None:
    """A prompt of 300 tokens in chunks of 256 and 44, then a token in each Step."""
    records, report = simulate(arrivals((0.5, 300, 100)), [setup()])
    (request,) = records.requests
    assert request.started_s == 0.5
    assert request.ttft_s == pytest.approx(2 * STEP_S + 300 * TOKEN_S)
    assert request.tpot_s == pytest.approx(STEP_S + TOKEN_S)
    assert report["latency_s"]["itl"]["mean"] == pytest.approx(STEP_S + TOKEN_S)
    assert report["latency_s"]["itl"]["p99"] == pytest.approx(STEP_S + TOKEN_S, rel=0.005)
    assert report["goodput"]["share"] == 1.0
    assert report["replicas"][0]["steps"] == 2 + 99


def test_a_pipeline_adds_up_for_one_and_overlaps_for_many() -> None:
    """Each token waits for all stages; a third of the requests is in each Step, three at a time."""
    alone, _ = simulate(arrivals((0.0, 10, 50)), [setup(num_stages=3)])
    assert alone.requests[0].tpot_s == pytest.approx(3 * (STEP_S + TOKEN_S + HOP_S))
    many, report = simulate(arrivals(*[(0.0, 1, 400)] * 12), [setup(num_stages=3)])
    stage_s = STEP_S + 4 * TOKEN_S
    round_s = 3 * (stage_s + HOP_S)
    assert all(each.is_good for each in many.requests)
    for share in report["replicas"][0]["utilisation"]:
        assert share == pytest.approx(3 * stage_s / round_s, rel=0.02)
    rate = report["throughput"]["output_tokens_per_s"]
    assert rate == pytest.approx(12 / round_s, rel=0.02)


def test_prompts_that_begin_alike_are_found_cached() -> None:
    same = Arrival(arrival_s=0.0, prompt_tokens=1100, output_tokens=2, block_hashes=(7, 8, 9))
    later = Arrival(arrival_s=9.0, prompt_tokens=1100, output_tokens=2, block_hashes=(7, 8, 5))
    records, _ = simulate(Workload("alike", (same, later)), [setup()])
    assert [each.num_cached for each in records.requests] == [0, 1024]


def test_a_slow_instance_takes_longer_from_then_on() -> None:
    slow = Fault(at_s=1.0, replica="replica-0", kind="slow", speed=0.5)
    records, _ = simulate(arrivals((0.0, 10, 20), (2.0, 10, 20)), [setup()], [slow])
    first, second = records.requests
    assert first.tpot_s == pytest.approx(STEP_S + TOKEN_S)
    assert second.tpot_s == pytest.approx(2 * (STEP_S + TOKEN_S))


def test_a_lost_replica_s_requests_go_on_elsewhere() -> None:
    setups = [setup("a"), setup("b")]
    faults = [
        Fault(at_s=0.5, replica="a", kind="lose"),
        Fault(at_s=5.0, replica="a", kind="join"),
    ]
    load = arrivals(*[(0.01 * i, 10, 200) for i in range(6)], *[(6.0, 10, 200)] * 6)
    records, report = simulate(load, setups, faults)
    assert [each.num_output for each in records.requests] == [200] * 12
    steps = {each["name"]: each["steps"] for each in report["replicas"]}
    assert min(steps.values()) > 200  # a served again after it joined
    waiting, _ = simulate(
        arrivals((0.0, 10, 5)), [setup("a")], [Fault(at_s=3.0, replica="a", kind="join")]
    )
    assert waiting.requests[0].started_s == 3.0


def test_a_lost_instance_computes_its_kv_again() -> None:
    faults = [
        Fault(at_s=0.5, replica="replica-0", kind="lose", instance=1),
        Fault(at_s=2.0, replica="replica-0", kind="join", instance=1),
    ]
    records, _ = simulate(arrivals((0.0, 100, 60)), [setup(num_stages=2)], faults)
    (request,) = records.requests
    assert request.num_output == 60
    assert request.e2e_s is not None and request.e2e_s > 2.0


def test_a_stall_costs_a_request_little_when_others_have_time() -> None:
    stall = Fault(at_s=3.02, replica="replica-0", kind="stall", seconds=2.0)
    load = arrivals(*[(0.05 * number, 20, 10) for number in range(120)])
    setups = [setup(f"replica-{number}") for number in range(3)]
    ttfts, stats = {}, {}
    for hedging in (True, False):
        simulation = Simulation(
            load, setups, random.Random(0), faults=[stall], policy="round-robin", hedging=hedging
        )
        ttfts[hedging] = max(each.ttft_s or 0.0 for each in simulation.run().requests)
        stats[hedging] = simulation.hedges
    assert ttfts[False] == pytest.approx(2.0, abs=0.1)
    assert ttfts[True] < 0.5
    assert 0 < stats[True].extra_tokens <= 0.05 * stats[True].computed_tokens + 4096
    assert stats[False].extra_tokens == 0


def test_a_request_meets_the_stall_that_is_its_own_wherever_it_goes() -> None:
    """In whichever replica it is handed to, and only there."""
    load = arrivals(*[(3.0 * number, 100, 2) for number in range(4)])
    setups = [setup(f"replica-{number}") for number in range(3)]
    stalls = [RequestStall(request=1, seconds=2.0), RequestStall(request=3, seconds=0.5)]
    for policy in ("predicted", "round-robin"):
        simulation = Simulation(
            load, setups, random.Random(0), faults=stalls, policy=policy, hedging=False
        )
        alone_s = STEP_S + 100 * TOKEN_S
        expected = [alone_s, alone_s + 2.0, alone_s, alone_s + 0.5]
        assert [each.ttft_s for each in simulation.run().requests] == pytest.approx(expected)


def test_a_request_that_nobody_gets_stalls_nobody() -> None:
    load = arrivals(*[(0.0, 10, 50)] * 10)
    stalls = [RequestStall(request=9, seconds=5.0)]
    found = [
        simulate(load, [setup(max_num_seqs=2, max_waiting=3)], faults)[0] for faults in (stalls, ())
    ]
    assert found[0].requests == found[1].requests
    assert found[0].requests[9].error == "queue_full"


def test_stalls_of_one_request_add_up() -> None:
    stalls = [RequestStall(request=0, seconds=1.0), RequestStall(request=0, seconds=0.5)]
    records, _ = simulate(arrivals((0.0, 100, 2)), [setup()], stalls)
    assert records.requests[0].ttft_s == pytest.approx(1.5 + STEP_S + 100 * TOKEN_S)


def test_who_is_slow_for_long_is_said_once() -> None:
    slow = [
        Fault(at_s=10.0, replica="replica-0", kind="slow", speed=0.2),
        Fault(at_s=30.0, replica="replica-1", kind="slow", speed=0.2),
        Fault(at_s=34.0, replica="replica-1", kind="slow", speed=1.0),
    ]
    load = arrivals(*[(0.1 * number, 20, 10) for number in range(600)])
    setups = [setup(f"replica-{number}") for number in range(3)]
    simulation = Simulation(load, setups, random.Random(0), faults=slow, policy="round-robin")
    (replan,) = simulation.run().replans
    assert replan.replica == "replica-0"
    assert 20.0 < replan.at_s < 30.0
    assert 2.0 < replan.lag.p50 <= replan.lag.p95 < 6.0


def test_what_can_never_go_on_is_said() -> None:
    gone = Fault(at_s=0.5, replica="replica-0", kind="lose", instance=0)
    records, report = simulate(arrivals((0.0, 10, 500)), [setup()], [gone])
    assert report["requests"]["never_ended"] == 1
    assert not records.requests[0].is_finished


def test_too_many_requests_are_refused_as_live() -> None:
    records, report = simulate(
        arrivals(*[(0.0, 10, 50)] * 10), [setup(max_num_seqs=2, max_waiting=3)]
    )
    assert report["requests"]["refused"] == 4
    assert {each.error for each in records.requests} == {None, "queue_full"}


@pytest.mark.parametrize(
    "fault",
    [
        Fault(at_s=0.0, replica="nobody", kind="lose"),
        Fault(at_s=0.0, replica="replica-0", kind="lose", instance=3),
        Fault(at_s=0.0, replica="replica-0", kind="stall", instance=0, seconds=2.0),
        RequestStall(request=1, seconds=2.0),
    ],
)
def test_faults_of_nobody_are_errors(fault: Fault | RequestStall) -> None:
    with pytest.raises(ConfigError, match=r"nobody|instance 3|stalls instance 0|request 1;"):
        simulate(arrivals((0.0, 1, 1)), [setup()], [fault])


def test_gaps_are_right_to_half_a_percent() -> None:
    rng, gaps = random.Random(0), Gaps()
    values = sorted(rng.lognormvariate(-4, 1) for _ in range(999))
    for value in values:
        gaps.add(value)
    for percent in (50, 95, 99):
        near = values[math.ceil(len(values) * percent / 100) - 1]
        assert gaps.percentile(percent) == pytest.approx(near, rel=0.006)


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("exposed", [0.0, 0.7])
def test_seconds_asked_often_are_the_cost_model_s(
    num_ranks: int, window: int | None, exposed: float
) -> None:
    spec = read_spec(shape_folder("llama-3.1-8b"))
    layers = [replace(each, window=window if i % 2 else None) for i, each in enumerate(spec.layers)]
    spec = replace(spec, layers=tuple(layers))
    kind = catalogue.kind("RTX-4090")
    devices = tuple(kind.device(f"a.{i}", "a", f"cuda:{i}") for i in range(num_ranks))
    constants = replace(TYPICAL, kind=kind.name, engine="shoal", exposed=exposed)
    cluster = Cluster(
        hosts=(Host(name="a", link=kind.link("pcie")),), devices=devices, constants=(constants,)
    )
    instance = InstancePlan(
        layers=Range(0, spec.num_layers),
        ranks=tuple(RankPlan(device=each.device) for each in devices),
        split=split_by_weights(spec, [2.0, 1.0][:num_ranks]),
    )
    stages = (StagePlan(instances=(instance,)),)
    plan = ReplicaPlan(stages=stages, routes=default_routes(stages))
    model = ReplicaCost(spec, plan, cluster, Numbers())
    cost = ModelledCost(model, cluster)
    for rows in (
        [(0, 2000, True)],
        [(499, 1, True)] * 40,
        [(499, 1, True)] * 40,
        [(20_000, 1, True)] * 3,
        [(90, 1, True), (7000, 600, False), (0, 30, True)],
    ):
        load = StepLoad.of(rows, cost.windows)
        assert cost.compute_s(load, 0, 0) == pytest.approx(model.step_times(load)[0].total_s)
    (found,) = cost.decodes_s([500, 90], 1, 0, 0)
    load = StepLoad.of([(499, 1, True), (89, 1, True)], cost.windows)
    assert found == pytest.approx(model.step_times(load)[0].total_s)
    lengths = [500, 90, 7001]
    loads = (
        StepLoad.of([(n - 1 + at, 1, True) for n in lengths], cost.windows) for at in range(50)
    )
    assert cost.decodes_s(lengths, 50, 0, 0) == [cost.compute_s(load, 0, 0) for load in loads]


# --- as a command ---

PLAN = """\
model: llama-3.1-8b
replicas:
  - stages: [{devices: [cuda:0]}]
  - stages: [{layers: 0-20, devices: [cuda:1]}, {layers: 20-32, devices: [cuda:2]}]
"""
EVENTS = """\
- {at: 5, replica: replica-1, instance: 1, slow: 0.5}
- {at: 8, replica: replica-0, lose: yes}
- {at: 9, replica: replica-0, join: yes}
"""


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    written = {
        "plan.yaml": PLAN,
        "cluster.yaml": "devices: 3x RTX-4090 pcie4\n",
        "events.yaml": EVENTS,
    }
    for name, text in written.items():
        (tmp_path / name).write_text(text)
    return {name.split(".")[0]: tmp_path / name for name in written} | {"folder": tmp_path}


def command(files: dict[str, Path], *more: str) -> list[str]:
    base = ["shoal", "simulate", str(files["plan"]), "--cluster", str(files["cluster"])]
    load = ["--rate", "4", "--num-requests", "60", "--slo", "ttft=1s,tpot=50ms"]
    return [*base, *load, "--events", str(files["events"]), *more]


def run(monkeypatch: pytest.MonkeyPatch, argv: list[str]) -> int:
    monkeypatch.setattr("sys.argv", argv)
    with pytest.raises(SystemExit) as left:
        main()
    return int(left.value.code or 0)


def test_the_command_twice_to_the_byte(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = []
    for page in ("one.html", "two.html"):
        argv = command(files, "--json", "--html", str(files["folder"] / page))
        assert run(monkeypatch, argv) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    pages = [(files["folder"] / page).read_text() for page in ("one.html", "two.html")]
    assert pages[0] == pages[1]
    report = json.loads(said[0])
    counts = report["requests"]
    assert counts["succeeded"] + counts["refused"] == 60 and counts["succeeded"] > 50
    assert len(report["replicas"][1]["utilisation"]) == 2
    plots = re.findall(r"<svg.*?</svg>", pages[0], flags=re.DOTALL)
    assert len(plots) == 4 + 8
    assert all(ElementTree.fromstring(each).findall("polyline") for each in plots)
    assert not re.search(r"https?:|<script|src=|href=|url\(", pages[0])


def test_names_are_escaped_on_the_page() -> None:
    _, report = simulate(arrivals((0.0, 10, 20)), [setup("<b>"), setup("c")])
    page = html_page({"title": "<i>&", "notes": ["<u>"], **report})
    assert "<b>" not in page and "<u>" not in page and "<i>" not in page


def test_a_page_of_many_replicas_shows_what_they_lie_between() -> None:
    load = arrivals(*((at / 10, 10, 20) for at in range(40)))
    _, report = simulate(load, [setup(f"replica-{number}") for number in range(20)])
    page = html_page({"title": "many", "notes": [], **report})
    (running,) = re.findall(r'<svg[^>]*aria-label="requests that run".*?</svg>', page)
    assert running.count("<polyline") == 3
    assert [each in running for each in ("least of 20", "median of 20", "most of 20")] == [True] * 3
    assert "<details><summary>all 20</summary>" in page and "replica-19" in page
    (busy,) = re.findall(r'<svg[^>]*aria-label="busy, share of time".*?</svg>', page)
    labels = re.findall(r'text-anchor="end">([0-9.]+)<', busy)
    assert labels == ["0", "0.25", "0.5", "0.75", "1"]


def test_a_page_where_nothing_succeeded_says_so() -> None:
    lost = [Fault(at_s=0.05, replica="replica-0", kind="lose")]
    _, report = simulate(arrivals((0.1, 10, 20)), [setup()], faults=lost)
    page = html_page({"title": "none", "notes": [], **report})
    assert report["requests"]["succeeded"] == 0
    assert "No request succeeded" in page and "How many requests are within" not in page


def test_the_command_in_words(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, command(files)) == 0
    said = capsys.readouterr().out
    assert "of 60 requests succeeded" in said
    assert "goodput:" in said and "TPOT" in said


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("cluster", "devices: 1x RTX-4090\n", "cuda:1"),
        ("plan", PLAN.replace("model: llama-3.1-8b\n", ""), "names no model"),
        ("plan", PLAN.replace("llama-3.1-8b", "llama-3.1-70b").replace("32", "80"), "no room for"),
        ("events", "- {at: 1, replica: replica-7, lose: yes}\n", "replica-7"),
        ("events", "- {at: 1, replica: replica-0}\n", "events.yaml:1"),
        ("events", "- {at: soon, replica: replica-0, lose: yes}\n", "events.yaml:1"),
        ("events", "- {request: 1, at: 2, stall: 2}\n", "at, request, stall"),
        ("events", "- {request: 1, slow: 0.5}\n", "request and stall"),
        ("events", "- {request: -1, stall: 2}\n", "events.yaml:1"),
        ("events", "- {request: 999999, stall: 2}\n", "request 999999"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(
    name: str,
    text: str,
    complaint: str,
    files: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    files[name].write_text(text)
    assert run(monkeypatch, command(files)) == 2
    said = capsys.readouterr().err
    assert complaint in said and said.startswith("error: ") and said.count("\n") == 1


def test_events_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "events.yaml"
    file.write_text(EVENTS + "- {request: 17, stall: 2}\n")
    slow, lost, joined, stall = read_faults(file)
    assert stall == RequestStall(request=17, seconds=2.0)
    assert slow == Fault(at_s=5.0, replica="replica-1", kind="slow", instance=1, speed=0.5)
    assert (lost.kind, joined.kind, joined.at_s) == ("lose", "join", 9.0)
