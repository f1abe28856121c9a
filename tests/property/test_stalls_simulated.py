"""Stalls that requests meet, in the simulator: what hedging leaves of the longest TTFTs."""

from __future__ import annotations

import random

from linear_cost import LinearCost

from shoal.core.latency import percentile
from shoal.core.workload import poisson_workload
from shoal.engine.config import EngineConfig
from shoal.sim import ReplicaSetup, Simulation
from shoal.sim.faults import RequestStall

SPEEDS = (1.0, 1.0, 1.0, 0.7, 0.7, 0.7, 0.5, 0.5)
NUM_REQUESTS, STALL_S = 1200, 2.0


def setups() -> list[ReplicaSetup]:
    config = EngineConfig(
        instance_blocks=(3000,),
        max_model_len=8192,
        vocab_size=2000,
        max_num_seqs=32,
        max_num_batched_tokens=1024,
        max_waiting=100_000,
    )
    costs = (LinearCost(step_s=0.01 / s, token_s=6e-5 / s, context_s=4e-8 / s) for s in SPEEDS)
    return [
        ReplicaSetup(name=f"replica-{number}", config=config, cost=cost)
        for number, cost in enumerate(costs)
    ]


def test_what_hedging_leaves_of_stalls_that_requests_meet() -> None:
    workload = poisson_workload(
        rate_per_s=40.0,
        num_requests=NUM_REQUESTS,
        lengths=[(64, 60), (256, 90), (700, 60), (1000, 40)],
        rng=random.Random(3),
    )
    met = random.Random(0).sample(range(200, NUM_REQUESTS), 6)
    stalls = [RequestStall(request=number, seconds=STALL_S) for number in met]
    longest_s, stats = {}, {}
    for hedging in (True, False):
        made = Simulation(workload, setups(), random.Random(0), faults=stalls, hedging=hedging)
        requests = made.run().requests
        made.check_integrity()
        assert all(each.is_good for each in requests)
        ttfts_s = sorted(each.ttft_s or 0.0 for each in requests)
        longest_s[hedging], stats[hedging] = percentile(ttfts_s, 99.9), made.hedges
    assert longest_s[False] > STALL_S
    assert longest_s[True] <= 0.3 * longest_s[False]
    extra = stats[True].extra_tokens + stats[True].rescued_tokens
    assert 0 < extra <= 0.05 * stats[True].computed_tokens
