"""Runs of decode Steps taken at once leave what Steps one by one leave, to the float."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from linear_cost import LinearCost

from shoal.core.workload import Arrival, Workload
from shoal.engine.config import EngineConfig
from shoal.engine.events import Event
from shoal.engine.state import EngineState
from shoal.sim import Fault, ReplicaSetup, Simulation, summarise
from shoal.sim.faults import RequestStall

COST = LinearCost(
    step_s=0.003, weights_s=0.01, token_s=31e-6, context_s=11e-9, pair_s=3e-9, windows=(None,)
)


def some_workload(rng: random.Random, num_requests: int, rate_per_s: float) -> Workload:
    """Short and long outputs, some prompts that begin alike, bursts."""
    arrivals, now_s = [], 0.0
    for _ in range(num_requests):
        hashes = (rng.randrange(3),) if rng.random() < 0.3 else ()
        arrivals.append(
            Arrival(
                arrival_s=now_s,
                prompt_tokens=rng.choice([1, 16, 90, 512, 700, 1500]),
                output_tokens=rng.choice([1, 2, 17, 40, 90, 150]),
                block_hashes=hashes,
            )
        )
        now_s += rng.choice([0.0, rng.expovariate(rate_per_s)])
    return Workload("some", tuple(arrivals))


def some_setups(num: int, **changes: Any) -> list[ReplicaSetup]:
    fields: dict[str, Any] = {
        "instance_blocks": (400,),
        "max_model_len": 2048,
        "vocab_size": 1000,
        "max_num_seqs": 24,
        "max_num_batched_tokens": 256,
        "max_waiting": 100_000,
    }
    config = EngineConfig(**{**fields, **changes})
    return [ReplicaSetup(name=f"replica-{i}", config=config, cost=COST) for i in range(num)]


def outcome(
    workload: Workload,
    setups: Sequence[ReplicaSetup],
    faults: Sequence[Fault | RequestStall],
    *,
    runs: bool,
) -> tuple[Any, ...]:
    """All there is to know afterwards."""
    simulation = Simulation(workload, setups, random.Random(0), faults=faults, runs=runs)
    records = simulation.run()
    simulation.check_integrity()
    report = summarise(records, setups, simulation.stats(), {"ttft": 1.0, "tpot": 0.02})
    return records.requests, records.gaps.counts, records.samples, report


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**32),
    num_blocks=st.sampled_from([140, 200, 400, 3000]),
    depth=st.integers(1, 4),
    num_seqs=st.sampled_from([2, 24, 60]),
    num_tokens=st.sampled_from([64, 256, 1024]),
    tpot_target_s=st.sampled_from([None, 0.02, 0.1]),
    prefix_caching=st.booleans(),
    window=st.sampled_from([None, 100]),
    num_replicas=st.integers(1, 2),
)
def test_runs_change_nothing(
    seed: int,
    num_blocks: int,
    depth: int,
    num_seqs: int,
    num_tokens: int,
    tpot_target_s: float | None,
    prefix_caching: bool,
    window: int | None,
    num_replicas: int,
) -> None:
    rng = random.Random(seed)
    workload = some_workload(rng, 30, rng.choice([1.0, 10.0, 100.0]))
    cost = LinearCost(step_s=0.003, token_s=31e-6, context_s=1e-7, windows=(window,))
    setups = [
        ReplicaSetup(name=each.name, config=each.config, cost=cost)
        for each in some_setups(
            num_replicas,
            instance_blocks=(num_blocks,),
            max_steps_in_flight=depth,
            max_num_seqs=num_seqs,
            max_num_batched_tokens=num_tokens,
            tpot_target_s=tpot_target_s,
            prefix_caching=prefix_caching,
        )
    ]
    faults = [
        Fault(at_s=0.7, replica="replica-0", kind="slow", speed=0.3),
        Fault(at_s=1.1, replica="replica-0", kind="lose", instance=0),
        Fault(at_s=1.3, replica="replica-0", kind="join", instance=0),
        Fault(at_s=1.9, replica="replica-0", kind="lose"),
        Fault(at_s=2.3, replica="replica-0", kind="join"),
        Fault(at_s=2.6, replica="replica-0", kind="stall", seconds=1.7),
        RequestStall(request=rng.randrange(30), seconds=0.9),
    ]
    stepwise = outcome(workload, setups, faults, runs=False)
    assert outcome(workload, setups, faults, runs=True) == stepwise
    assert all(each.is_good for each in stepwise[0])
    wanted = [each.output_tokens for each in workload.arrivals]
    assert [each.num_output for each in stepwise[0]] == wanted


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often engines are."""
    handle, asked = EngineState.handle, [0]

    def counted(self: EngineState, event: Event, now: float) -> Any:
        asked[0] += 1
        return handle(self, event, now)

    monkeypatch.setattr(EngineState, "handle", counted)
    return asked


def test_a_thousand_requests_in_runs_and_stepwise(asked: list[int]) -> None:
    """KV enough for some and short for others; the engine is asked far less often."""
    workload = some_workload(random.Random(1), 1000, 4.0)
    setups = some_setups(3, instance_blocks=(130,))
    at_once = outcome(workload, setups, (), runs=True)
    num_at_once, asked[0] = asked[0], 0
    assert outcome(workload, setups, (), runs=False) == at_once
    assert num_at_once < asked[0] / 3
    requests, _, _, report = at_once
    assert all(each.is_good for each in requests)
    assert sum(each["preemptions"] for each in report["replicas"]) > 0
    assert report["tokens"]["cached"] > 0


def test_a_prompt_beside_streams_is_taken_in_few_events(asked: list[int]) -> None:
    """It comes in some hundred chunks."""
    streams = [Arrival(arrival_s=0.0, prompt_tokens=20, output_tokens=900) for _ in range(3)]
    prompt = Arrival(arrival_s=1.0, prompt_tokens=8000, output_tokens=3)
    workload = Workload("some", (*streams, prompt))
    setups = some_setups(1, instance_blocks=(4000,), max_model_len=9000, tpot_target_s=0.016)
    at_once = outcome(workload, setups, (), runs=True)
    num_at_once, asked[0] = asked[0], 0
    assert outcome(workload, setups, (), runs=False) == at_once
    assert asked[0] > 1500
    assert num_at_once < asked[0] / 15


def test_looks_disturb_no_run(asked: list[int]) -> None:
    workload, counts = some_workload(random.Random(2), 60, 4.0), []
    for num_samples in (2, 700):
        asked[0] = 0
        simulation = Simulation(workload, some_setups(2), random.Random(0), num_samples=num_samples)
        assert len(simulation.run().samples) > num_samples
        counts.append(asked[0])
    assert counts[0] == counts[1]


def test_who_says_the_next_token_first_goes_on_with_it_in_runs_too() -> None:
    """Streams stall where Steps take seconds; both attempts are heard token by token then."""
    streams = [Arrival(arrival_s=0.1 * i, prompt_tokens=20, output_tokens=300) for i in range(4)]
    workload = Workload("some", tuple(streams))
    slow = [Fault(at_s=1.0, replica="replica-0", kind="slow", speed=0.01)]
    found = []
    for runs in (True, False):
        simulation = Simulation(workload, some_setups(2), random.Random(0), faults=slow, runs=runs)
        requests = simulation.run().requests
        assert simulation.hedges.hedged + simulation.hedges.rescued > 0
        found.append((requests, simulation.hedges))
    assert found[0] == found[1]
