"""Policies in the simulator, on unequal replicas, and on one that slows down."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from linear_cost import LinearCost

from shoal.core.latency import Slo, is_within
from shoal.core.workload import Arrival, Workload, poisson_workload
from shoal.engine.config import EngineConfig
from shoal.sim import Fault, ReplicaSetup, Simulation, summarise

SLO = {"ttft": 1.2, "tpot": 0.06}
SPEEDS = (1.0, 1.0, 0.5, 0.5, 0.25, 0.25)


def setups() -> list[ReplicaSetup]:
    config = EngineConfig(
        instance_blocks=(3000,),
        max_model_len=8192,
        vocab_size=1000,
        max_num_seqs=32,
        max_num_batched_tokens=1024,
        max_waiting=100_000,
    )
    return [
        ReplicaSetup(
            name=f"replica-{number}",
            config=config,
            cost=LinearCost(step_s=0.008 / speed, token_s=1e-4 / speed, context_s=4e-8 / speed),
        )
        for number, speed in enumerate(SPEEDS)
    ]


def load(rate_per_s: float, num_requests: int) -> Workload:
    lengths = [(64, 60), (256, 90), (700, 120), (1500, 60), (4000, 40)]
    return poisson_workload(
        rate_per_s=rate_per_s, num_requests=num_requests, lengths=lengths, rng=random.Random(3)
    )


def simulation(
    policy: str, workload: Workload, faults: Sequence[Fault] = (), *, knows_speeds: bool = True
) -> Simulation:
    return Simulation(
        workload,
        setups(),
        random.Random(0),
        faults=faults,
        policy=policy,
        slo=Slo(ttft_s=SLO["ttft"], tpot_s=SLO["tpot"]),
        hedging=False,
        knows_speeds=knows_speeds,
    )


@pytest.mark.parametrize("knows_speeds", [True, False])
def test_prediction_beats_counting_on_unequal_replicas(knows_speeds: bool) -> None:
    workload, found = load(6.0, 220), {}
    for policy in ("predicted", "least-outstanding"):
        made = simulation(policy, workload, knows_speeds=knows_speeds)
        found[policy] = summarise(made.run(), setups(), made.stats(), SLO)
    predicted, counted = found["predicted"], found["least-outstanding"]
    assert predicted["latency_s"]["ttft"]["p99"] <= 0.7 * counted["latency_s"]["ttft"]["p99"]
    assert predicted["goodput"]["share"] > counted["goodput"]["share"]


def test_a_replica_that_slows_down_gets_what_it_can_carry_and_comes_back() -> None:
    workload = load(10.0, 250)

    def slow(at_s: float, speed: float = 0.2) -> Fault:
        return Fault(at_s=at_s, replica="replica-0", kind="slow", speed=speed)

    def good(since_s: float, *faults: Fault) -> float:
        records = simulation("predicted", workload, faults).run().requests
        later = [each for each in records if each.arrival_s >= since_s]
        got = [{"ttft": each.ttft_s, "tpot": each.tpot_s} for each in later]
        return sum(is_within(each, SLO) for each in got) / len(later)

    assert good(8.0, slow(8.0)) >= 0.85 * good(8.0, slow(0.0))
    assert good(18.0, slow(6.0), slow(13.0, 1.0)) >= 0.97 * good(18.0)


def test_a_long_prompt_that_is_over_keeps_nobody_out_of_its_replica() -> None:
    """Its stream goes on for a minute, and has room for others at the TPOT to be kept."""
    config = EngineConfig(
        instance_blocks=(3000,),
        max_model_len=16_384,
        vocab_size=1000,
        max_num_seqs=32,
        max_num_batched_tokens=2048,
        tpot_target_s=0.03,
    )
    cost = LinearCost(step_s=0.019, token_s=5e-4, context_s=1e-8)
    replicas = [ReplicaSetup(name=f"replica-{n}", config=config, cost=cost) for n in range(2)]
    long = [Arrival(arrival_s=0.0, prompt_tokens=12_000, output_tokens=3000) for _ in replicas]
    short = [Arrival(arrival_s=20.0 + n, prompt_tokens=100, output_tokens=20) for n in range(12)]
    made = Simulation(
        Workload("long, then short", (*long, *short)),
        replicas,
        random.Random(0),
        slo=Slo(ttft_s=12.0, tpot_s=0.03),
    )
    records = made.run().requests
    assert [each.error for each in records] == [None] * len(records)
    assert max(each.first_s or 0.0 for each in records[2:]) < min(
        each.last_s or 0.0 for each in records[:2]
    )
    assert max(each.ttft_s or 0.0 for each in records[2:]) < 1.0
