"""Ten times what a fleet can carry, in the simulator: who is let in is served in time."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from linear_cost import LinearCost

from shoal.core.latency import Slo
from shoal.core.workload import Arrival, Workload
from shoal.engine.config import EngineConfig
from shoal.policy.cost_model.loads import StepLoad, Windows
from shoal.sim import ReplicaSetup, Simulation
from shoal.sim.records import RequestRecord

SLO = Slo(ttft_s=4.0, tpot_s=0.25)
SPEEDS = (1.0, 0.5, 0.25)
FLOOD_S = 30.0
AFTER_S, NUM_AFTER = 5.0, 12


@dataclass(slots=True)
class Noisy:
    """Steps take now more and now less, and one of a hundred four times as long."""

    inner: LinearCost
    rng: random.Random
    windows: Windows = (None,)
    error: float = 0.0

    def compute_s(self, load: StepLoad, route: int, hop: int) -> float:
        return self.inner.compute_s(load, route, hop) * self._times()

    def decodes_s(self, lengths: Sequence[int], count: int, route: int, hop: int) -> list[float]:
        found = self.inner.decodes_s(lengths, count, route, hop)
        return [each * self._times() for each in found]

    def transfer_s(self, num_tokens: int, route: int, hop: int) -> float:
        return self.inner.transfer_s(num_tokens, route, hop)

    def _times(self) -> float:
        hiccup = 4.0 if self.rng.random() < 0.01 else 1.0
        return hiccup * math.exp(self.rng.gauss(0.0, 0.15))


def setups() -> list[ReplicaSetup]:
    """Of a small model on CPUs."""
    config = EngineConfig(
        instance_blocks=(4000,),
        max_model_len=8192,
        vocab_size=1000,
        max_num_seqs=64,
        max_num_batched_tokens=512,
        max_waiting=100_000,
        tpot_target_s=SLO.tpot_s,
    )
    costs = (LinearCost(step_s=0.012 / s, token_s=0.0011 / s, context_s=6e-7 / s) for s in SPEEDS)
    return [
        ReplicaSetup(
            name=f"replica-{number}", config=config, cost=Noisy(cost, random.Random(number))
        )
        for number, cost in enumerate(costs)
    ]


def is_kept(record: RequestRecord) -> bool:
    assert record.ttft_s is not None
    assert SLO.ttft_s is not None
    assert SLO.tpot_s is not None
    return record.ttft_s <= SLO.ttft_s and (record.tpot_s or 0.0) <= SLO.tpot_s


@pytest.mark.parametrize(
    ("prompt", "output", "per_s", "knows_speeds", "least"),
    [
        (150, 32, 30.0, False, 0.95),
        (150, 32, 30.0, True, 0.95),
        (300, 60, 20.0, False, 0.95),
        # Of which the slowest replica takes 2.6 s for a prompt when it is alone with it.
        (600, 60, 10.0, False, 0.9),
    ],
)
def test_who_is_let_in_during_a_flood_is_served_in_time(
    prompt: int, output: int, per_s: float, knows_speeds: bool, least: float
) -> None:
    """Before anybody knows how fast these replicas are, too."""
    rng, count = random.Random(5), round(FLOOD_S * per_s)

    def arrival(at_s: float) -> Arrival:
        tokens = max(int(rng.gauss(prompt, prompt / 10)), 20)
        return Arrival(arrival_s=at_s, prompt_tokens=tokens, output_tokens=output)

    flood = [arrival(number / per_s) for number in range(count)]
    later = [arrival(FLOOD_S + AFTER_S + 2 * number) for number in range(NUM_AFTER)]
    workload = Workload("flood", (*flood, *later))
    made = Simulation(
        workload, setups(), random.Random(0), slo=SLO, knows_speeds=knows_speeds, runs=False
    )
    records = made.run().requests
    errors = {each.error for each in records[:count] if each.error is not None}
    accepted = [each for each in records[:count] if each.is_good]
    assert errors == {"overloaded"}
    assert 0.05 * count <= len(accepted) <= 0.4 * count
    assert sum(map(is_kept, accepted)) >= least * len(accepted)
    assert all(each.is_good and is_kept(each) for each in records[count:])
