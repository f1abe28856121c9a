"""A packing linear program: the most value from resources, by the simplex method.

    maximise  value · x    so that    uses x <= stock,   x >= 0

Prices come with it: stock · prices is an upper bound of any x, whole numbers or not (duality),
whatever rounding did to the x that was found: prices are raised until no column is worth more than
it costs. Knows nothing of devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_NOTHING = 1e-12
_MAX_PIVOTS = 2_000


@dataclass(frozen=True, slots=True)
class Packing:
    """How often each column is taken (fractions), the price of each resource, and the bound."""

    counts: tuple[float, ...]
    prices: tuple[float, ...]
    bound: float


def pack(
    values: Sequence[float], uses: Sequence[Sequence[float]], stock: Sequence[float]
) -> Packing:
    """
    Args:
        values: of each column, at least 0.
        uses: of each column, how much it takes of each resource; more than 0 of one at least.
        stock: of each resource.
    """
    rows = [
        [float(use[index]) for use in uses] + [float(index == other) for other in range(len(stock))]
        for index in range(len(stock))
    ]
    right = [float(each) for each in stock]
    gains = [*values, *(0.0 for _ in stock)]
    basis = [len(values) + index for index in range(len(stock))]
    for pivots in range(_MAX_PIVOTS):
        entering = _entering(gains, by_index=pivots > _MAX_PIVOTS // 2)
        if entering is None:
            break
        leaving = _leaving(rows, right, basis, entering)
        assert leaving is not None, "every column takes something"
        _pivot(rows, right, gains, leaving, entering)
        basis[leaving] = entering
    counts = [0.0] * len(gains)
    for row, column in enumerate(basis):
        counts[column] = right[row]
    prices = _raised([max(-gain, 0.0) for gain in gains[len(values) :]], values, uses)
    bound = sum(price * each for price, each in zip(prices, stock, strict=True))
    return Packing(tuple(counts[: len(values)]), prices, bound)


def _entering(gains: Sequence[float], *, by_index: bool) -> int | None:
    """The column that gains most; by index (Bland) once that may go in circles."""
    if by_index:
        return next((index for index, gain in enumerate(gains) if gain > _NOTHING), None)
    best = max(range(len(gains)), key=gains.__getitem__)
    return best if gains[best] > _NOTHING else None


def _leaving(
    rows: list[list[float]], right: list[float], basis: list[int], entering: int
) -> int | None:
    ratios = [
        (right[index] / row[entering], basis[index], index)
        for index, row in enumerate(rows)
        if row[entering] > _NOTHING
    ]
    return min(ratios)[2] if ratios else None


def _pivot(
    rows: list[list[float]], right: list[float], gains: list[float], leaving: int, entering: int
) -> None:
    scale = rows[leaving][entering]
    rows[leaving] = pivot = [each / scale for each in rows[leaving]]
    right[leaving] /= scale
    for index, row in enumerate(rows):
        factor = row[entering]
        if index != leaving and factor:
            rows[index] = [a - factor * b for a, b in zip(row, pivot, strict=True)]
            right[index] = max(right[index] - factor * right[leaving], 0.0)
    factor = gains[entering]
    gains[:] = [a - factor * b for a, b in zip(gains, pivot, strict=True)]


def _raised(
    prices: Sequence[float], values: Sequence[float], uses: Sequence[Sequence[float]]
) -> tuple[float, ...]:
    """Prices at which no column is worth more than what it takes."""
    scale = 1.0
    for value, use in zip(values, uses, strict=True):
        cost = sum(price * each for price, each in zip(prices, use, strict=True))
        if value > cost * scale:
            if cost <= _NOTHING:
                # None of what it takes has a price yet: all of that is priced by this column.
                return _raised(
                    [
                        max(p, value / sum(use) if each else 0.0)
                        for p, each in zip(prices, use, strict=True)
                    ],
                    values,
                    uses,
                )
            scale = value / cost
    return tuple(price * scale for price in prices)
