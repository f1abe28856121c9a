"""Replicas with roles in a large cluster, where that is better than whole ones.

Replicas exchange KV that keep it and their weights alike: each way to keep them is planned for by
itself, and the best of these plans counts if it gains more than moving KV about is worth. Knows
nothing of how plans are found.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from shoal.planner.choice import Choice, carried
from shoal.planner.formats import numbers_for
from shoal.planner.large import Found, LargeSearch
from shoal.planner.profiles import Problem
from shoal.planner.small import WORTH_ROLES
from shoal.policy.cost_model.numbers import Numbers


def with_roles(problem: Problem, whole: Found) -> Found:
    """What was found without roles, or what is better with them; its bound holds for both."""
    is_cost = problem.goal.objective == "cost"
    best, bounds, num_columns = whole, [whole.bound], whole.num_columns
    for like in _formats(problem):
        narrowed = replace(problem, goal=replace(problem.goal, precisions=(like.precision,)))
        search = LargeSearch(narrowed, like)
        found = search.cheapest() if is_cost else search.most_goodput()
        bounds.append(found.bound)
        num_columns += found.num_columns
        has_roles = any(each.chain.role != "any" for each in found.choices)
        if has_roles and _is_better(problem, found, best):
            best = found
    return replace(best, bound=(min if is_cost else max)(bounds), num_columns=num_columns)


def _formats(problem: Problem) -> Iterator[Numbers]:
    """In which two devices at least keep weights and KV."""
    goal = problem.goal
    for precision in goal.precisions:
        found = Counter(
            numbers_for([each], precision, goal.kv_precision) for each in problem.cluster.devices
        )
        yield from (numbers for numbers, n in found.items() if numbers is not None and n > 1)


def _is_better(problem: Problem, found: Found, best: Found) -> bool:
    if not found.choices or not best.choices:
        return bool(found.choices)
    if problem.goal.objective == "cost":
        return _price(problem, found.choices) < _price(problem, best.choices) * (1 - WORTH_ROLES)
    return carried(found.choices) > carried(best.choices) * (1 + WORTH_ROLES)


def _price(problem: Problem, choices: tuple[Choice, ...]) -> float:
    devices = (problem.cluster.device(name) for each in choices for name in each.names)
    return sum(problem.goal.price(each) for each in devices)
