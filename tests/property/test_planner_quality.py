"""Bits within a limit of quality, against every composition of layers, precisions and batches."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from random import Random

import pytest
from random_clusters import random_cluster, random_goal, random_spec

from shoal.core.cluster import Precision
from shoal.planner.bits import Held, richer
from shoal.planner.chains import Bench, partitions
from shoal.planner.pipeline import Chain
from shoal.planner.profiles import Problem
from shoal.planner.quality import loss_of
from shoal.planner.search import find_plan
from shoal.planner.service import keeps

BITS: tuple[Precision, ...] = ("bfloat16", "int8", "int4")
WITHIN = 1.03


def problem_of(seed: int, num_devices: int, share: float) -> Problem:
    """At random; perplexity may rise by a share of what int4 costs (as ln)."""
    rng = Random(seed)
    spec = replace(random_spec(rng), num_layers=5)
    spec = replace(spec, layers=spec.layers[:1] * 5)
    cluster = random_cluster(rng, num_devices)
    devices = tuple(replace(each, precisions=BITS) for each in cluster.devices)
    most = math.expm1(share * loss_of(spec, "int4").log_ratio)
    goal = replace(
        random_goal(rng),
        precisions=BITS,
        max_quality_loss=most,
        max_concurrency=6,
        objective="goodput",
    )
    return Problem(spec, replace(cluster, devices=devices), goal)


def exhaustive(problem: Problem) -> float:
    """The most requests per second of replicas that are each within the limit."""
    cluster = problem.cluster
    bench, names = Bench(problem, cluster.devices), tuple(each.name for each in cluster.devices)
    carry: dict[tuple[str, ...], float] = {}
    for count in range(1, len(names) + 1):
        for own in itertools.combinations(names, count):
            carry[own] = max(map(most_of, bench.chains(own)), default=0.0)
    return max(sum(carry[own] for own in blocks) for blocks in partitions(names))


def most_of(chain: Chain) -> float:
    best = 0.0
    for layers, variants in held(chain):
        for count in chain.micro_batch_counts():
            for batch in range(1, chain.goal.max_concurrency // count + 1):
                found = chain.at(layers, variants, count, batch)
                if found is not None and keeps(chain.goal, found):
                    best = max(best, found.rate_per_s)
    return best


def held(chain: Chain) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    total, parts = chain.spec.num_layers, len(chain.segments)
    ways = [range(len(each.group.variants)) for each in chain.segments]
    for edges in itertools.combinations(range(1, total), parts - 1):
        layers = tuple(b - a for a, b in itertools.pairwise((0, *edges, total)))
        for variants in itertools.product(*ways):
            yield layers, variants


@pytest.mark.parametrize("share", [0.0, 0.05, 0.3, 0.6])
@pytest.mark.parametrize("seed", range(5))
def test_it_is_near_the_best_within_the_limit(seed: int, share: float) -> None:
    problem = problem_of(seed, 2 + seed % 2, share)
    limit = math.log1p(problem.goal.max_quality_loss or 0.0)
    best = exhaustive(problem)
    found = find_plan(problem)
    if not best:
        assert found.unmet
        return
    assert not found.unmet
    assert found.value * WITHIN >= best
    assert found.log_loss <= limit * (1 + 1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_more_loss_carries_no_less(seed: int) -> None:
    values = [find_plan(problem_of(seed, 3, share)) for share in (0.0, 0.1, 0.5, 1.0)]
    met = [each.value for each in values if not each.unmet]
    assert all(b >= a * 0.97 for a, b in itertools.pairwise(met))


def test_the_latency_plan_is_within_it_too() -> None:
    problem = problem_of(1, 3, 0.3)
    goal = replace(problem.goal, objective="latency", rate_per_s=None)
    found = find_plan(replace(problem, goal=goal))
    assert found.log_loss <= math.log1p(goal.max_quality_loss or 0.0) * (1 + 1e-6)
    free = find_plan(replace(problem, goal=replace(goal, max_quality_loss=1.0)))
    assert free.value <= found.value * (1 + 1e-9)


def test_without_a_limit_fewer_bits_must_pay() -> None:
    """A stage that is not in the way, or gains less speed than it loses quality, keeps its bits."""
    problem = problem_of(1, 3, 1.0)
    free = replace(problem, goal=replace(problem.goal, max_quality_loss=None))
    found = find_plan(free)
    few = find_plan(replace(free, goal=replace(free.goal, precisions=("int4",))))
    many = find_plan(replace(free, goal=replace(free.goal, precisions=("bfloat16",))))
    assert found.log_loss <= few.log_loss
    gained = few.log_loss - found.log_loss
    assert found.value >= few.value * (1 - max(0.011, gained + 0.011))
    assert found.value >= many.value * 0.98


def test_equal_plans_have_more_bits() -> None:
    """`richer` by itself: worth says what three stages are in the way of."""
    losses = [(0.0, 0.01, 0.4)] * 3

    def worth(held: Held) -> float | None:
        _, variants = held
        if variants[2] == 0:
            return None  # no room
        return 1.0 if variants[0] == 2 else 0.7

    start = (2, 2, 1), (2, 2, 2)
    assert richer(start, losses, worth, trades=False) == ((2, 2, 1), (2, 0, 1))
    # 0.4 of two fifths of the layers is 0.16: less than the 0.3 that it would cost.
    assert richer(start, losses, worth, trades=True) == ((2, 2, 1), (2, 0, 1))
    cheap = [(0.0, 0.01, 2.0)] * 3
    assert richer(start, cheap, worth, trades=True) == ((2, 2, 1), (0, 0, 1))
