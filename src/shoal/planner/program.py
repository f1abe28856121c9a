"""A packing linear program: the most value from resources, by the simplex method.

    maximise  value · x    so that    uses x <= stock,   x >= 0

Prices come with it: stock · prices is an upper bound of any x, whole numbers or not (duality),
whatever rounding did to the x that was found: prices are raised until no column is worth more than
it costs.

Of the last rows, which are balances, a column may also bring some: what others need of it. The
price of a balance is worth that much to who brings it (Lagrange), whatever it is; so what is left
is a program of resources again, and its prices are raised as before. Knows nothing of devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_NOTHING = 1e-12
_MAX_PIVOTS = 2_000

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Packing:
    """How often each column is taken (fractions), the price of each resource, and the bound."""

    counts: tuple[float, ...]
    prices: tuple[float, ...]
    bound: float


def pack(
    values: Sequence[float] | Array,
    uses: Sequence[Sequence[float]] | Array,
    stock: Sequence[float],
    num_balances: int = 0,
) -> Packing:
    """
    Args:
        values: of each column.
        uses: of each column, how much it takes of each resource; more than 0 of one at least. Of
            balances less than 0 is what it brings; who does takes some resource.
        stock: of each resource; at least 0.
        num_balances: the last rows.
    """
    num_columns, num_rows = len(values), len(stock)
    columns = np.array(uses, dtype=float).reshape(num_columns, num_rows).T
    rows = np.hstack([columns, np.eye(num_rows)])
    right = np.array(stock, dtype=float)
    gains = np.concatenate([np.array(values, dtype=float), np.zeros(num_rows)])
    basis = list(range(num_columns, num_columns + num_rows))
    worth = _NOTHING * max(1.0, float(np.abs(gains).max(initial=0.0)))
    for pivots in range(_MAX_PIVOTS):
        by_index = pivots > _MAX_PIVOTS // 2  # Bland's rule ends where the steepest goes round
        entering = int(np.argmax(gains > worth)) if by_index else int(np.argmax(gains))
        if gains[entering] <= worth:
            break
        _pivot(rows, right, gains, _leaving(rows[:, entering], right, basis), entering, basis)
    counts = np.zeros(len(gains))
    counts[basis] = right
    prices = np.maximum(-gains[num_columns:], 0.0)
    prices = _balanced(prices, np.array(values, dtype=float), columns, num_rows - num_balances)
    return Packing(
        tuple(counts[:num_columns].tolist()),
        tuple(prices.tolist()),
        float(prices @ np.array(stock, dtype=float)),
    )


def _leaving(column: Array, right: Array, basis: Sequence[int]) -> int:
    """The row that bounds a column first; of equal ones that of the first column."""
    ratios = [
        (right[index] / own, basis[index], index)
        for index, own in enumerate(column.tolist())
        if own > _NOTHING
    ]
    assert ratios, "every column takes something"
    return min(ratios)[2]


def _pivot(
    rows: Array, right: Array, gains: Array, leaving: int, entering: int, basis: list[int]
) -> None:
    scale = rows[leaving, entering]
    rows[leaving] /= scale
    right[leaving] /= scale
    factors = rows[:, entering].copy()
    factors[leaving] = 0.0
    rows -= np.outer(factors, rows[leaving])
    right -= factors * right[leaving]
    np.maximum(right, 0.0, out=right)
    gains -= gains[entering] * rows[leaving]
    basis[leaving] = entering


def _balanced(prices: Array, values: Array, columns: Array, num_resources: int) -> Array:
    """Prices at which no column is worth more than what it takes, less what it brings."""
    takes, balances = columns[:num_resources], columns[num_resources:]
    own = prices[num_resources:]
    for column in np.flatnonzero(~takes.any(axis=0)):  # nothing but balances pay for these
        use = balances[:, column]
        short = values[column] - own @ use
        own = own + np.maximum(short, 0.0) / use.sum() * (use > 0)
    values = values - own @ balances
    return np.concatenate([_raised(prices[:num_resources], values, takes), own])


def _raised(prices: Array, values: Array, columns: Array) -> Array:
    """Prices at which no column is worth more than what it takes."""
    costs = prices @ columns
    free = (costs <= _NOTHING) & (values > _NOTHING)
    if free.any():
        # None of what these take has a price yet: all of that is priced by them.
        for column in np.flatnonzero(free):
            use = columns[:, column]
            prices = np.where(use > 0, np.maximum(prices, values[column] / use.sum()), prices)
        costs = prices @ columns
    over = values > costs + _NOTHING * max(1.0, float(values.max(initial=0.0)))
    scale = float((values[over] / costs[over]).max(initial=1.0))
    return prices * scale
