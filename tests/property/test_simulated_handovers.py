"""Requests that leave their replicas in the simulator: their KV, what it takes and what comes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from linear_cost import LinearCost

from shoal.cli.fault_file import read_faults
from shoal.core.errors import ConfigError
from shoal.core.kv import KVArrived, KVHop, KVLoan, KVPull
from shoal.core.plan import Role
from shoal.core.split import Range
from shoal.core.workload import Arrival, Workload
from shoal.engine.config import EngineConfig
from shoal.sim import Fault, ReplicaSetup, Simulation, summarise
from shoal.sim.kv_links import KVLink
from shoal.sim.kv_traffic import Arrival as KVArrival
from shoal.sim.kv_traffic import KVTraffic

STEP_S, TOKEN_S = 0.01, 0.001
LINK = KVLink(latency_s=0.002, block_s=0.001)


def setup(name: str, role: Role = "any", **changes: Any) -> ReplicaSetup:
    fields: dict[str, Any] = {
        "instance_blocks": (1000,),
        "max_model_len": 4096,
        "vocab_size": 1000,
        "max_num_batched_tokens": 256,
        "max_waiting": 100_000,
    }
    cost = LinearCost(step_s=STEP_S, token_s=TOKEN_S, context_s=1e-7)
    config = EngineConfig(**{**fields, **changes})
    return ReplicaSetup(name=name, config=config, cost=cost, role=role, kv_block_bytes=1000)


SPECIALISED = [setup("starts", "prefill"), setup("goes-on", "decode")]
ALIKE = [setup("one"), setup("other")]


def run(
    workload: Workload,
    setups: Sequence[ReplicaSetup],
    link: KVLink | None = LINK,
    faults: Sequence[Fault] = (),
    **flags: Any,
) -> tuple[Simulation, dict[str, Any], tuple[Any, ...]]:
    """The simulation, its report, and all there is to know afterwards."""
    simulation = Simulation(
        workload,
        setups,
        random.Random(0),
        faults=faults,
        kv_links=None if link is None else lambda source, target: link,
        hedging=False,
        **flags,
    )
    records = simulation.run()
    simulation.check_integrity()
    report = summarise(records, setups, simulation.stats(), {"ttft": 1.0, "tpot": 0.02})
    everything = records.requests, records.gaps.counts, records.samples, report
    return simulation, report, (*everything, simulation.kv_moved)


def one(prompt_tokens: int, output_tokens: int) -> Workload:
    arrival = Arrival(arrival_s=0.0, prompt_tokens=prompt_tokens, output_tokens=output_tokens)
    return Workload("one", (arrival,))


def by_name(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {each["name"]: each for each in report["replicas"]}


def test_a_request_goes_on_with_its_kv_where_it_decodes() -> None:
    """320 tokens in two chunks; the first one's KV goes while the second is computed."""
    simulation, report, _ = run(one(320, 40), SPECIALISED)
    replicas = by_name(report)
    assert simulation.kv_moved.blocks == 20
    assert replicas["goes-on"]["cached_tokens"] == 320
    assert replicas["starts"]["output_tokens"] < 5 < 35 < replicas["goes-on"]["output_tokens"]


def test_while_kv_is_on_its_way_tokens_come_from_where_they_did() -> None:
    """Of the second chunk's four blocks, the rest went while it was computed."""
    token_s = STEP_S + TOKEN_S
    said = {}
    for block_s in (0.0, 0.001, 0.02):
        _, report, _ = run(one(320, 40), SPECIALISED, KVLink(0.0, block_s))
        said[block_s] = by_name(report)["starts"]["output_tokens"]
        # What was said meanwhile is computed again.
        again_s = said[block_s] * TOKEN_S
        assert report["latency_s"]["itl"]["max"] < 3 * token_s + again_s
    late_s = 20 * 0.02 - (STEP_S + 64 * TOKEN_S)
    assert said[0.0] <= said[0.001] < said[0.02]
    assert said[0.02] - said[0.0] == pytest.approx(late_s / token_s, abs=3)


def test_without_links_it_is_computed_again() -> None:
    simulation, report, _ = run(one(320, 40), SPECIALISED, None)
    assert simulation.kv_moved.pulls == 0
    assert by_name(report)["goes-on"]["cached_tokens"] == 0
    with_kv = run(one(320, 40), SPECIALISED)[1]
    gap, gap_with = (each["latency_s"]["itl"]["max"] for each in (report, with_kv))
    assert gap > gap_with + 0.2


def test_who_has_no_room_for_kv_gets_no_request_yet() -> None:
    """Room for four of eight that begin at once: the others decode where they began until then."""
    burst = tuple(
        Arrival(arrival_s=0.001 * each, prompt_tokens=1000, output_tokens=100) for each in range(8)
    )
    starting = [setup(f"starts-{each}", "prefill") for each in range(8)]
    small = setup("goes-on", "decode", instance_blocks=(290,))
    _, report, (requests, *_) = run(Workload("burst", burst), [*starting, small])
    replicas = by_name(report)
    assert all(each.is_good for each in requests)
    assert replicas["goes-on"]["preemptions"] == 0
    # Whoever went found all of its KV there; whoever did not finished where it began.
    gone = [each for each in range(8) if replicas[f"starts-{each}"]["output_tokens"] < 100]
    assert len(gone) == 4
    assert replicas["goes-on"]["cached_tokens"] == len(gone) * (1000 // 16) * 16


def test_a_drained_replica_s_requests_go_on_with_their_kv_and_it_gets_none_until_it_may() -> None:
    workload = Workload(
        "two",
        tuple(Arrival(arrival_s=at, prompt_tokens=320, output_tokens=100) for at in (0.0, 0.01)),
    )
    later = Workload(
        "later",
        (
            *workload.arrivals,
            *(Arrival(arrival_s=at, prompt_tokens=20, output_tokens=5) for at in (2.0, 2.01)),
        ),
    )
    drained = Fault(at_s=0.8, replica="one", kind="drain")
    simulation, report, (requests, *_) = run(later, ALIKE, faults=[drained])
    assert all(each.is_good for each in requests)
    assert simulation.kv_moved.pulls == 1
    assert by_name(report)["other"]["cached_tokens"] >= 320
    resumed = Fault(at_s=1.5, replica="one", kind="resume")
    _, after, _ = run(later, ALIKE, faults=[drained, resumed])
    tokens = [by_name(each)["one"]["output_tokens"] for each in (report, after)]
    assert tokens[0] < tokens[1]


def some_workload(rng: random.Random, num_requests: int, rate_per_s: float) -> Workload:
    arrivals, now_s = [], 0.0
    for _ in range(num_requests):
        arrivals.append(
            Arrival(
                arrival_s=now_s,
                prompt_tokens=rng.choice([1, 16, 90, 512, 700]),
                output_tokens=rng.choice([1, 2, 17, 40, 150]),
                block_hashes=(rng.randrange(3),) if rng.random() < 0.3 else (),
            )
        )
        now_s += rng.choice([0.0, rng.expovariate(rate_per_s)])
    return Workload("some", tuple(arrivals))


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**32),
    roles=st.sampled_from(
        [("prefill", "decode"), ("prefill", "any", "decode"), ("prefill", "decode", "decode"),
         ("any", "any", "any")]
    ),
    num_blocks=st.sampled_from([80, 200, 1000]),
    depth=st.integers(1, 3),
    block_s=st.sampled_from([0.0, 0.0003, 0.05]),
    is_lost=st.booleans(),
)  # fmt: skip
def test_runs_change_nothing(
    seed: int,
    roles: tuple[Role, ...],
    num_blocks: int,
    depth: int,
    block_s: float,
    is_lost: bool,
) -> None:
    rng = random.Random(seed)
    workload = some_workload(rng, 25, rng.choice([1.0, 10.0]))
    setups = [
        setup(
            f"replica-{i}",
            role,
            instance_blocks=(num_blocks,),
            max_model_len=1024,
            max_steps_in_flight=depth,
        )
        for i, role in enumerate(roles)
    ]
    last = f"replica-{len(roles) - 1}"
    faults = [
        Fault(at_s=0.4, replica="replica-0", kind="drain"),
        Fault(at_s=1.2, replica="replica-0", kind="resume"),
    ]
    if is_lost:
        faults += [
            Fault(at_s=0.9, replica=last, kind="lose"),
            Fault(at_s=1.6, replica=last, kind="join"),
        ]
    link = KVLink(0.0005, block_s)
    stepwise = run(workload, setups, link, faults, runs=False)[2]
    assert run(workload, setups, link, faults, runs=True)[2] == stepwise
    assert all(each.is_good for each in stepwise[0])
    wanted = [each.output_tokens for each in workload.arrivals]
    assert [each.num_output for each in stepwise[0]] == wanted


# --- KV on its way ---


def loan(move: int, num_ready: int, num: int = 10) -> KVLoan:
    return KVLoan(move, (KVHop(0, Range(0, 2), tuple(range(num))),), num_ready)


def pull(move: int, first: int, num: int) -> KVPull:
    return KVPull(move, move, first, (), (KVHop(0, Range(0, 2), tuple(range(num))),))


def arrived(replica: str, move: int, num: int) -> list[KVArrival]:
    return [KVArrival(replica, KVArrived(move, (num,)))]


def traffic() -> KVTraffic:
    return KVTraffic(lambda source, target: KVLink(1.0, 0.5))


def test_what_is_ready_goes_at_once_and_the_rest_as_it_comes() -> None:
    wires = traffic()
    wires.lend("a", loan(1, num_ready=4))
    assert wires.pull("b", pull(1, first=2, num=8), 0.0) == []
    assert wires.next_s == float("inf")
    wires.grow(loan(1, num_ready=10), 10.0)
    assert wires.next_s == 10.0 + 1.0 + 6 * 0.5
    assert wires.due(13.9) == []
    assert wires.due(14.0) == arrived("b", 1, 8)


def test_two_over_the_same_link_go_one_after_the_other_and_others_beside_them() -> None:
    wires = traffic()
    for move, target in enumerate(("b", "b", "c")):
        wires.lend("a", loan(move, num_ready=10))
        wires.pull(target, pull(move, first=0, num=10), 0.0)
    assert wires.due(6.0) == [*arrived("b", 0, 10), *arrived("c", 2, 10)]
    assert wires.due(11.0) == arrived("b", 1, 10)


def test_what_was_there_counts_when_it_is_stopped_or_the_lender_is_gone() -> None:
    for end in ("stop", "loan", "lost"):
        wires = traffic()
        wires.lend("a", loan(1, num_ready=10))
        wires.pull("b", pull(1, first=0, num=10), 0.0)
        ends = {
            "stop": lambda: wires.stop(1, 2.6),  # noqa: B023
            "loan": lambda: wires.end_loan(1, 2.6),  # noqa: B023
            "lost": lambda: wires.lost("a", 2.6),  # noqa: B023
        }
        assert ends[end]() == arrived("b", 1, 3)
        assert wires.due(100.0) == []


def test_what_will_never_be_ready_is_not_waited_for() -> None:
    wires = traffic()
    wires.lend("a", loan(1, num_ready=4))
    wires.pull("b", pull(1, first=0, num=10), 0.0)
    wires.grow(loan(1, num_ready=4, num=4), 1.0)
    assert wires.due(100.0) == arrived("b", 1, 4)
    assert wires.pull("b", pull(2, first=0, num=3), 5.0) == arrived("b", 2, 0), "nobody lends it"


def test_drains_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "events.yaml"
    file.write_text("- {at: 1, replica: a, drain: yes}\n- {at: 2, replica: a, resume: yes}\n")
    drain, resume = read_faults(file)
    assert (drain.kind, resume.kind) == ("drain", "resume")
    with pytest.raises(ConfigError, match="drains instance 0"):
        run(one(10, 2), ALIKE, faults=[replace(drain, replica="one", instance=0)])
