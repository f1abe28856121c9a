"""The best that a pipeline can do for a goal: its most requests per second, its least latency.

Both look for the batch at which it works, by halving: with more sequences at once, TPOT, TTFT and
the rate all rise. Knows nothing of how pipelines are found.
"""

from __future__ import annotations

from collections.abc import Callable

from shoal.planner.goal import Goal
from shoal.planner.pipeline import Chain, Fixed, Operation
from shoal.planner.prompts import starting

_SLACK = 1e-9


def peak(chain: Chain, fixed: Fixed = None) -> Operation | None:
    """The most requests per second that keep the SLO; None: not even one request does."""
    if chain.role == "prefill":
        return starting(chain, None, fixed)
    every = (_largest(chain, count, fixed) for count in chain.micro_batch_counts())
    found = (each for each in every if each is not None)
    if not chain.thorough:
        return next(found, None)  # more in flight carry more, if they keep the SLO at all
    return max(found, key=lambda each: each.rate_per_s, default=None)


def quickest(chain: Chain, rate_per_s: float, fixed: Fixed = None) -> Operation | None:
    """The least mean latency at a rate; None: the rate is too high.

    The SLO is not asked: who wants low latency gets the lowest there is.
    """
    if chain.role == "prefill":
        return starting(chain, rate_per_s, fixed)
    counts = chain.micro_batch_counts()
    found = (_smallest(chain, count, rate_per_s, fixed) for count in counts)
    return min(
        (each for each in found if each is not None),
        key=lambda each: each.latency_s(chain.goal.output_tokens),
        default=None,
    )


def keeps(goal: Goal, operation: Operation) -> bool:
    """Whether it is within the SLO."""
    slo = goal.slo
    tpot = slo.tpot_s is None or operation.tpot_s <= slo.tpot_s * (1 + _SLACK)
    return tpot and (slo.ttft_s is None or operation.ttft_s <= slo.ttft_s * (1 + _SLACK))


def _largest(chain: Chain, count: int, fixed: Fixed) -> Operation | None:
    best: Operation | None = None

    def fits(batch: int) -> bool:
        nonlocal best
        found = _at(chain, count, batch, fixed)
        if found is None or not keeps(chain.goal, found):
            return False
        if best is None or found.rate_per_s > best.rate_per_s:
            best = found
        return True

    last(fits, chain.goal.max_concurrency // count)
    return best


def _smallest(chain: Chain, count: int, rate_per_s: float, fixed: Fixed) -> Operation | None:
    def too_small(batch: int) -> bool:
        found = _at(chain, count, batch, fixed, rate_per_s)
        return found is not None and found.rate_per_s < rate_per_s

    most = chain.goal.max_concurrency // count
    batch = last(too_small, most) + 1
    found = _at(chain, count, batch, fixed, rate_per_s) if batch <= most else None
    return found if found is not None and found.rate_per_s >= rate_per_s else None


def _at(
    chain: Chain, count: int, batch: int, fixed: Fixed, arrivals_per_s: float | None = None
) -> Operation | None:
    if fixed is None:
        return chain.fastest(count, batch, arrivals_per_s)
    return chain.at(*fixed, count, batch, arrivals_per_s)


def last(holds: Callable[[int], bool], most: int) -> int:
    """The last of 1, 2, ..., most for which it holds, where it holds for all before; 0: none."""
    low, high = 0, 1
    while high <= most and holds(high):
        low, high = high, high * 2
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        if holds(middle):
            low = middle
        else:
            high = middle
    return low
