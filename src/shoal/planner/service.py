"""The best that a pipeline can do for a goal: its most requests per second, its least latency.

Both look for the batch at which it works, by halving: with more sequences at once, TPOT, TTFT and
the rate all rise. Knows nothing of how pipelines are found.
"""

from __future__ import annotations

import math
from dataclasses import replace

from shoal.planner.ceiling import last, least_batch
from shoal.planner.goal import Goal
from shoal.planner.pipeline import Chain, Fixed, Operation
from shoal.planner.polish import Held, polished
from shoal.planner.prompts import prompt_layers, starting

_SLACK = 1e-9


def peak(chain: Chain, fixed: Fixed = None) -> Operation | None:
    """The most requests per second that keep the SLO; None: not even one request does."""
    if chain.role == "prefill":
        return starting(chain, None, fixed)
    every = (_largest(chain, count, fixed) for count in chain.micro_batch_counts())
    found = (each for each in every if each is not None)
    if not chain.thorough:
        return next(found, None)  # more in flight carry more, if they keep the SLO at all
    best = max(found, key=lambda each: each.rate_per_s, default=None)
    if best is None and fixed is None and chain.goal.slo.ttft_s is not None:
        held = prompt_layers(chain)  # those of the shortest period may be late with any prompt
        return peak(chain, held) if held is not None else None
    return best


def quickest(
    chain: Chain, rate_per_s: float, fixed: Fixed = None, *, within_slo: bool = False
) -> Operation | None:
    """The least mean latency at a rate; None: the rate is too high.

    Where latency is the objective, a request also waits for a place.

    Args:
        within_slo: None where that is not kept, or bunches of arrivals find no seats (`has_seats`).
    """
    if chain.role == "prefill":
        return starting(chain, rate_per_s, fixed)
    counts = chain.micro_batch_counts()
    every = (_smallest(chain, count, rate_per_s, fixed) for count in counts)
    waits = rate_per_s > 0 and chain.goal.objective == "latency"
    output_tokens, best, lacks_seats = chain.goal.output_tokens, None, False
    found = (each for each in every if each is not None)
    for each in sorted(found, key=lambda each: each.latency_s(output_tokens)):
        if best is not None and each.latency_s(output_tokens) >= best.latency_s(output_tokens):
            break
        served = _waiting(chain, each, rate_per_s) if waits else each
        if served is None or (within_slo and not keeps(chain.goal, served)):
            continue
        if best is None or served.latency_s(output_tokens) < best.latency_s(output_tokens):
            if within_slo and not has_seats(chain, served, rate_per_s):
                lacks_seats = True
                continue
            best = served
    if best is not None or fixed is not None or not within_slo:
        return best
    others = [prompt_layers(chain)] if chain.goal.slo.ttft_s is not None else []
    if lacks_seats and (most := peak(chain)) is not None:
        others.append(most.held)
    tried = (quickest(chain, rate_per_s, held, within_slo=True) for held in others if held)
    return next((each for each in tried if each is not None), None)


def has_seats(chain: Chain, operation: Operation, rate_per_s: float) -> bool:
    """Whether its layers carry a rate with seats for bunches of arrivals, within the SLO; asked
    where latency is the objective, as waits by M/M/c alone would fill all places."""
    if not rate_per_s or chain.goal.objective != "latency":
        return True
    most = peak(chain, operation.held)
    return most is not None and most.rate_per_s * (1 + _SLACK) >= rate_per_s


def peak_polished(chain: Chain, found: Operation) -> Operation:
    """As `peak` found it, with layers and splits for the SLO of TTFT, too."""
    is_limited = chain.goal.slo.ttft_s is not None or chain.limit.most < math.inf
    if not is_limited or chain.role != "any":
        return found
    return polished(chain, found, lambda held: peak(chain, held), lambda each: -each.rate_per_s)


def quickest_polished(
    chain: Chain, rate_per_s: float, found: Operation, *, within_slo: bool = False
) -> Operation:
    """As `quickest` found it, with layers and splits for prompts and the wait, too."""
    count, waits = found.num_micro_batches, rate_per_s > 0 and chain.goal.objective == "latency"

    def work(held: Held) -> Operation | None:
        served = _smallest(chain, count, rate_per_s, held)
        if served is not None and waits:
            served = _waiting(chain, served, rate_per_s)
        is_late = within_slo and served is not None and not keeps(chain.goal, served)
        return None if is_late else served

    return polished(chain, found, work, lambda each: each.latency_s(chain.goal.output_tokens))


def keeps(goal: Goal, operation: Operation) -> bool:
    """Whether it is within the SLO."""
    slo = goal.slo
    tpot = slo.tpot_s is None or operation.tpot_s <= slo.tpot_s * (1 + _SLACK)
    return tpot and (slo.ttft_s is None or operation.late_ttft_s <= slo.ttft_s * (1 + _SLACK))


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
    fewest = least_batch(chain, count, rate_per_s)
    if fewest is None or fewest[0] > most:
        return None
    batch = last(too_small, most, fewest[0]) + 1
    found = _at(chain, count, batch, fixed, rate_per_s) if batch <= most else None
    return found if found is not None and found.rate_per_s >= rate_per_s else None


def _waiting(chain: Chain, found: Operation, rate_per_s: float) -> Operation | None:
    """The same, with the wait for one of the places that there is memory for; None: for ever.

    M/M/c by Sakasegawa (1977): residence x rho^(sqrt(2 (c + 1)) - 1) / (c (1 - rho)).
    """
    count, fixed = found.num_micro_batches, (found.layers, found.variants)
    most = chain.goal.max_concurrency // count
    fullest = last(lambda batch: chain.has_room(*fixed, count, batch), most)
    full = _at(chain, count, fullest, fixed, rate_per_s)
    assert full is not None, "what was found has room"
    busy, places = rate_per_s / full.rate_per_s, full.num_sequences
    if busy >= 1.0:
        return None
    residence_s = full.latency_s(chain.goal.output_tokens)
    wait_s = residence_s * busy ** (math.sqrt(2 * (places + 1)) - 1) / (places * (1 - busy))
    return replace(found, ttft_s=found.ttft_s + wait_s, late_ttft_s=found.late_ttft_s + wait_s)


def _at(
    chain: Chain, count: int, batch: int, fixed: Fixed, arrivals_per_s: float | None = None
) -> Operation | None:
    if fixed is None:
        return chain.fastest(count, batch, arrivals_per_s)
    return chain.at(*fixed, count, batch, arrivals_per_s)
