"""What arrivals that come in bunches take: seats beside those in use on average, and longer waits.

    n + 1.645 sqrt(n) = seats       n: the mean of a Poisson number that stays within the seats for
                                    95 % of the time (normal approximation)
    late wait                       what 95 % wait less than, before a queue of prompts

With as many seats as there are sequences on average, all of them are taken half of the time, and
the queue before them never ends. Knows nothing of memory or of where times come from.
"""

from __future__ import annotations

import math

_QUANTILE = 1.645
"""Standard deviations: 95 % of a normal distribution are below."""
_LATE = 0.05


def mean_of(num_seats: int) -> float:
    """Sequences at once, on average, that so many seats are enough for."""
    root = (math.sqrt(_QUANTILE**2 + 4 * num_seats) - _QUANTILE) / 2
    return root * root


def late_wait_s(busy: float, service_s: float) -> float:
    """What 95 % wait less than before one server that takes as long for everybody.

    M/D/1: P(wait > t) is about busy x exp(-2 (1 - busy) t / service) (Kingman's exponential tail).

    Args:
        busy: share of its time, below 1.
    """
    over = math.log(busy / _LATE) if busy > _LATE else 0.0
    return service_s * over / (2 * (1 - busy))
