"""Policies that count: none of them knows how long anything takes, but `weighted` a little.

    round-robin        one after the other
    weighted           so that requests are shared out as speeds are
    least-outstanding  who has the fewest
    power-of-two       the one with fewer of two, by chance (Mitzenmacher 2001)
    prefix-aware       who has most of the prompt, unless that one has too many; as SGLang's router

Each chooses among the replicas whose numbers it is given. Knows nothing of what is in a request.
"""

from __future__ import annotations

from random import Random

import numpy as np

from shoal.policy.routing.fleet import Ask, Fleet, Numbers, Row

_WORTH_IT = 0.5
_UNEVEN_BY, _UNEVEN_TIMES = 32, 1.5


def round_robin(fleet: Fleet, fit: Numbers, ask: Ask, now: float, rng: Random) -> int:
    del ask, now, rng
    return int(fit[fleet.num_decided % len(fit)])


def weighted(fleet: Fleet, fit: Numbers, ask: Ask, now: float, rng: Random) -> int:
    """Who would have had the least for its weight, since the fleet last changed."""
    del ask, now, rng
    shares = (fleet.table[Row.SENT, fit] + 1) / fleet.table[Row.WEIGHT, fit]
    return int(fit[shares.argmin()])


def least_outstanding(fleet: Fleet, fit: Numbers, ask: Ask, now: float, rng: Random) -> int:
    """Of equals, who was sent the fewest; then who has most of the prompt; then the first."""
    del now, rng
    counts = fleet.table[Row.NUM, fit]
    return _of_equals(fleet, fit[counts == counts.min()], ask)


def power_of_two(fleet: Fleet, fit: Numbers, ask: Ask, now: float, rng: Random) -> int:
    del ask, now
    if len(fit) == 1:
        return int(fit[0])
    one, other = rng.sample(range(len(fit)), 2)
    counts = fleet.table[Row.NUM]
    return int(min(fit[one], fit[other], key=lambda number: counts[number]))


def prefix_aware(fleet: Fleet, fit: Numbers, ask: Ask, now: float, rng: Random) -> int:
    counts = fleet.table[Row.NUM, fit]
    most, least = counts.max(), counts.min()
    is_uneven = most - least > _UNEVEN_BY and most > _UNEVEN_TIMES * least
    if ask.cached is not None and not is_uneven:
        held = ask.cached[fit]
        if held.max() >= _WORTH_IT * ask.num_tokens:
            having = fit[held == held.max()]
            return int(having[fleet.table[Row.NUM, having].argmin()])
    return least_outstanding(fleet, fit, ask, now, rng)


def _of_equals(fleet: Fleet, equals: Numbers, ask: Ask) -> int:
    if len(equals) == 1:
        return int(equals[0])
    held = np.zeros(len(equals)) if ask.cached is None else ask.cached[equals]
    order = np.lexsort((fleet.table[Row.SENT, equals], -held))
    return int(equals[order[0]])
