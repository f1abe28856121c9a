"""Replicas with more bits where these cost next to nothing: not every stage is in the way.

Fewer bits must pay: a stage keeps them if its replica is worse without by more than a hundredth;
and by more than what is gained in quality, if no limit says what that is worth. Knows nothing of
where losses come from.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace

from shoal.planner.bits import Held, richer
from shoal.planner.choice import Choice, carried, share_of
from shoal.planner.goal import Goal
from shoal.planner.service import keeps, peak, quickest


def with_more_bits(choices: Sequence[Choice], goal: Goal) -> tuple[Choice, ...]:
    """The same replicas; those with roles as they are: KV is exchanged by those that are alike."""
    before = tuple(choices)
    if len(goal.precisions) == 1 or any(each.chain.role != "any" for each in before):
        return before
    known: dict[Hashable, Held] = {}
    found = []
    for each in before:
        rate = share_of(each, before) * (goal.rate_per_s or 0.0)
        key = likeness(each), each.operation, rate
        if key not in known:
            known[key] = _richer(each, goal, rate)
        found.append(_working(each, known[key]))
    is_enough = goal.objective != "cost" or carried(found) >= (goal.rate_per_s or 0.0)
    return tuple(found) if is_enough else before


def _richer(choice: Choice, goal: Goal, rate_per_s: float) -> Held:
    chain = choice.chain
    now = quickest(chain, rate_per_s, choice.operation.held)
    is_kept = now is not None and keeps(goal, now)

    def worth(held: Held) -> float | None:
        if goal.objective == "latency":
            served = quickest(chain, rate_per_s, held, within_slo=is_kept)
            return None if served is None else 1 / served.latency_s(goal.output_tokens)
        most = peak(chain, held)
        return None if most is None else most.rate_per_s

    trades = goal.max_quality_loss is None
    return richer(choice.operation.held, chain.losses, worth, trades=trades)


def _working(choice: Choice, held: Held) -> Choice:
    if held == choice.operation.held:
        return choice
    most = peak(choice.chain, held)
    return choice if most is None else replace(choice, operation=most)


def likeness(choice: Choice) -> Hashable:
    """The same for pipelines that take as long."""
    groups = tuple(id(each.group.variants) for each in choice.chain.segments)
    return groups, choice.chain.hops
