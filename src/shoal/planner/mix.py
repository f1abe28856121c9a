"""How many of each column, in fractions: a linear program of replicas, with or without roles.

    whole requests    w <= sum of rate x, of columns that do all of a request
    in two parts      t <= started + sum of rate x, of columns that start requests
                      t <= gone on with + sum of rate x, of those that go on with them

    maximise  w + t  so that  sum of uses x <= stock

`started` and `gone on with` is what replicas that are already taken carry beyond what both do.
Where a rate is wanted, w + t is at most that, and worth so much; columns have prices. Knows nothing
of how columns are found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shoal.planner.choice import Choice
from shoal.planner.columns import Column
from shoal.planner.program import pack

Spare = tuple[float, float]
"""Requests per second that are started, and gone on with, beyond what both are."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """
    Attributes:
        worth: of carrying all of the rate.
        prices: of each column.
    """

    rate_per_s: float
    worth: float
    prices: Sequence[float]


@dataclass(frozen=True, slots=True)
class Mix:
    """
    Attributes:
        counts: of each column.
        prices: of each resource of the stock.
        carried: requests per second; of what is wanted, the share.
        bound: no counts bring more.
    """

    counts: tuple[float, ...]
    prices: tuple[float, ...]
    carried: float
    bound: float


def mixed(
    columns: Sequence[Column],
    stock: Sequence[int],
    spare: Spare = (0.0, 0.0),
    wanted: Wanted | None = None,
) -> Mix:
    """The most requests per second; or, if a rate is wanted, the most of their worth."""
    worth = wanted.worth if wanted else 1.0
    rates = [each.rate_per_s / (wanted.rate_per_s if wanted else 1.0) for each in columns]
    costs = wanted.prices if wanted else [0.0] * len(columns)
    values, uses = [], []
    has_roles = any(each.role != "any" for each in columns)
    for each, rate, cost in zip(columns, rates, costs, strict=True):
        whole = rate if each.role == "any" else 0.0
        values.append(worth * whole - cost)
        brings = [-rate if each.role == role else 0.0 for role in ("prefill", "decode")]
        uses.append((*each.uses, *([whole] if wanted else []), *(brings if has_roles else [])))
    if has_roles:
        values.append(worth)
        uses.append((*(0 for _ in stock), *([1.0] if wanted else []), 1.0, 1.0))
    packing = pack(
        values,
        uses,
        (*stock, *([1.0] if wanted else []), *(spare if has_roles else ())),
        2 if has_roles else 0,
    )
    counts = packing.counts[: len(columns)]
    parts = packing.counts[-1] if has_roles else 0.0
    whole_rate = sum(
        n * rate for n, rate, c in zip(counts, rates, columns, strict=True) if c.role == "any"
    )
    return Mix(
        counts=counts,
        prices=packing.prices[: len(stock)],
        carried=whole_rate + parts,
        bound=packing.bound,
    )


def spare_of(choices: Sequence[Choice]) -> Spare:
    """Of replicas that are taken."""
    started, gone_on = (
        sum(each.rate_per_s for each in choices if each.chain.role == role)
        for role in ("prefill", "decode")
    )
    both = min(started, gone_on)
    return started - both, gone_on - both
