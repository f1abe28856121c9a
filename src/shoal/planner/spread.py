"""The least mean latency at a rate, of a large cluster: which replicas serve, and with what share.

    points     of each column, rates from little to the most it carries, each so much more than the
               one before
    program    least  sum of y x latency  so that  sum of y = rate,  sum of y uses / rate of the
               point <= stock: a linear program over points; one stands for all rates since the
               point before, with the latency of that, so that its optimum is below any mixture
    whole      replicas of the program; then one more, one less or another, as long as it helps;
               the rate is shared out so that a bit more costs all the same

A point's latency is worked out when the program takes it; until then it counts with that of a
smaller rate, which is no more. Knows nothing of how columns are found.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from shoal.planner.columns import Column
from shoal.planner.pipeline import Operation
from shoal.planner.profiles import Problem
from shoal.planner.program import pack
from shoal.planner.service import quickest

_STEP = 1.1
"""From a point's rate to the next one's."""
_LEAST_SHARE = 0.04
"""Of the most that a column carries, at its first point."""
_FIRST_WORTH = 8.0
"""A request that is carried counts as more than so many times the longest latency."""
_MOST_ADDED, _MOST_ROUNDS = 60, 350
_MOST_TRIED = 10
"""Columns of which one more is tried."""
_MOST_SWAPS = 3
_WORTH = 1e-3
"""More replicas, for less gain than that, are not worth it."""
_HALVINGS = 18
_FAR_S = 1e9

Served = tuple[Column, Operation, float]
"""A replica's column, how it works, and its share of all requests."""


class Spread:
    """
    Attributes:
        bound_s: no mixture of the columns has less, in seconds; once it was looked for.
    """

    def __init__(self, problem: Problem, columns: Sequence[Column], stock: Sequence[int]) -> None:
        self.goal, self.columns, self.stock = problem.goal, list(columns), tuple(stock)
        self.rate_per_s = problem.goal.rate_per_s or 0.0
        self._tables = [_Table(each, self.rate_per_s) for each in columns]
        self._means: dict[tuple[tuple[int, int], ...], float] = {}
        self.bound_s = 0.0

    def found(self) -> list[Served]:
        """Empty: they do not carry the rate."""
        if not self.rate_per_s:
            return self._alone()
        counts = self._solved()
        if counts is None:
            return []
        return self._served(self._whole(counts))

    def _alone(self) -> list[Served]:
        """Of a request that is alone."""
        timed = [(table.latency_s(-1), index) for index, table in enumerate(self._tables)]
        self.bound_s, index = min(timed)
        operation = self._tables[index].operation(0.0)
        return [] if operation is None else [(self.columns[index], operation, 1.0)]

    def _solved(self) -> list[float] | None:
        """How many of each column, in fractions; None: they do not carry the rate."""
        points = [(i, k) for i, table in enumerate(self._tables) for k in range(len(table.rates))]
        starts = {i: n for n, (i, k) in enumerate(points) if k == 0}
        rates = np.array([self._tables[i].rates[k] for i, k in points])
        owners = np.array([i for i, _ in points])
        uses = np.array([each.uses for each in self.columns], dtype=float)
        floors = np.array([self._tables[i].floor_s(k - 1) for i, k in points])
        # All columns at their most, so that the rate is carried if it can be.
        active = {n for n, (i, k) in enumerate(points) if k == len(self._tables[i].rates) - 1}
        worth_s, rounds_left = _FIRST_WORTH * float(floors.max()), _MOST_ROUNDS
        while True:
            chosen = sorted(active)
            values = worth_s - floors
            own = np.hstack([uses[owners[chosen]] / rates[chosen, None], np.ones((len(chosen), 1))])
            packing = pack(values[chosen], own, (*self.stock, self.rate_per_s))
            prices = np.array(packing.prices)
            gains = values - (uses @ prices[:-1])[owners] / rates - prices[-1]
            better = [n for n in np.argsort(-gains)[:_MOST_ADDED] if gains[n] > _WORTH * _WORTH]
            if not active.issuperset(better):
                active.update(better)
                continue
            taken = [
                (points[n], count)
                for n, count in zip(chosen, packing.counts, strict=True)
                if count > 0
            ]
            if sum(count for _, count in taken) < self.rate_per_s * (1 - 1e-6):
                if worth_s > _FAR_S:
                    return None
                worth_s *= _FIRST_WORTH
                continue
            self.bound_s = worth_s - packing.bound / self.rate_per_s
            unknown = [(i, k) for (i, k), _ in taken if not self._tables[i].is_known(k - 1)]
            if not unknown or not rounds_left:
                break
            rounds_left -= 1
            for i, k in unknown:
                self._tables[i].look(k - 1)
            for i, _ in unknown:
                for k in range(len(self._tables[i].rates)):
                    floors[starts[i] + k] = min(self._tables[i].floor_s(k - 1), _FAR_S)
        counts = [0.0] * len(self.columns)
        for (i, k), count in taken:
            counts[i] += count / self._tables[i].rates[k]
        return counts

    def _whole(self, fractions: Sequence[float]) -> dict[int, int]:
        """Of each column how many, the rate in mind."""
        taken = [index for index, each in enumerate(fractions) if each > 1e-6]
        dense = sorted(
            range(len(self.columns)),
            key=lambda i: -self.columns[i].rate_per_s / self.columns[i].num_devices,
        )
        quick = sorted(range(len(self.columns)), key=lambda i: self._tables[i].floor_s(-1))
        near = quick[:_MOST_TRIED], dense[:_MOST_TRIED]
        tried = list(dict.fromkeys([*taken, *near[0], *near[1]]))
        whole = {i: n for i in taken if (n := int(fractions[i] + 1e-6))}
        best = min((self._grown(each, tried) for each in (whole, {})), key=self._mean_s)
        for _ in range(_MOST_SWAPS):
            least_s = self._mean_s(best)
            others = (self._grown(_less(best, i), tried) for i in list(best))
            other = min(others, key=self._mean_s, default=best)
            if self._mean_s(other) >= least_s * (1 - _WORTH):
                break
            best = other
        return best

    def _grown(self, counts: dict[int, int], tried: Sequence[int]) -> dict[int, int]:
        """With one more as long as it helps."""
        counts, least_s = dict(counts), self._mean_s(counts)
        while True:
            more = [{**counts, i: counts.get(i, 0) + 1} for i in tried if self._has(counts, i)]
            carried = self._carried(counts)
            if not more:
                return counts
            if math.isinf(least_s):
                # Towards the rate first, by what there is of devices.
                best = max(more, key=lambda each: self._carried(each) - carried)
            else:
                best = min(more, key=self._mean_s)
                if self._mean_s(best) >= least_s * (1 - _WORTH):
                    return counts
            counts, least_s = best, self._mean_s(best)

    def _has(self, counts: dict[int, int], more: int) -> bool:
        left = list(self.stock)
        for index, count in (*counts.items(), (more, 1)):
            for sort, use in enumerate(self.columns[index].uses):
                left[sort] -= use * count
        return min(left) >= 0

    def _carried(self, counts: dict[int, int]) -> float:
        return sum(n * self._tables[i].rates[-1] for i, n in counts.items())

    def _mean_s(self, counts: dict[int, int]) -> float:
        key = tuple(sorted(counts.items()))
        if key not in self._means:
            self._means[key] = self._shared_s(counts)
        return self._means[key]

    def _shared_s(self, counts: dict[int, int]) -> float:
        shared = self._shared(counts)
        if shared is None:
            return math.inf
        return (
            sum(
                n * self._tables[i].rate(k) * self._tables[i].latency_s(k)
                for (i, n), k in zip(counts.items(), shared, strict=True)
            )
            / self.rate_per_s
        )

    def _shared(self, counts: dict[int, int]) -> list[int] | None:
        """A point of each column, together just the rate; None: they do not carry it."""
        if self._carried(counts) < self.rate_per_s:
            return None
        low, high = 0.0, _FAR_S
        best: list[int] | None = None
        for _ in range(_HALVINGS):
            middle = math.sqrt(max(low, 1e-4) * high)
            points = [self._tables[i].worthwhile(middle) for i in counts]
            total = sum(
                n * self._tables[i].rate(k)
                for (i, n), k in zip(counts.items(), points, strict=True)
            )
            if total >= self.rate_per_s:
                best, high = points, middle
            else:
                low = middle
        return best

    def _served(self, counts: dict[int, int]) -> list[Served]:
        shared = self._shared(counts)
        if shared is None:
            return []
        rates = [self._tables[i].rate(k) for i, k in zip(counts, shared, strict=True)]
        total = sum(n * rate for n, rate in zip(counts.values(), rates, strict=True))
        found: list[Served] = []
        for (index, count), rate in zip(counts.items(), rates, strict=True):
            own = rate / total * self.rate_per_s
            operation = self._tables[index].operation(own) if own else None
            if operation is not None:
                found += [(self.columns[index], operation, own / self.rate_per_s)] * count
        return found


class _Table:
    """A column's latency by its rate; point -1 is a request that is alone."""

    def __init__(self, column: Column, rate_per_s: float) -> None:
        self.column = column
        most = min(column.rate_per_s, rate_per_s) if rate_per_s else column.rate_per_s
        self.rates = list(_up_to(most))
        self._known: dict[int, float] = {}
        self._worthwhile: dict[float, int] = {}
        self._output_tokens = column.choice.chain.goal.output_tokens

    def rate(self, point: int) -> float:
        return self.rates[point] if point >= 0 else 0.0

    def is_known(self, point: int) -> bool:
        return point in self._known

    def look(self, point: int) -> None:
        """Work a point out; the first time, some others that are floors of what lies above."""
        if len(self._known) <= 1:
            for part in (1, 2, 3):
                self.latency_s(part * (len(self.rates) - 1) // 4)
        self.latency_s(point)

    def floor_s(self, point: int) -> float:
        """That of the next smaller rate which was worked out."""
        while point >= 0 and point not in self._known:
            point -= 1
        return self.latency_s(point)

    def latency_s(self, point: int) -> float:
        if point not in self._known:
            found = self.operation(self.rate(point))
            own = math.inf if found is None else found.latency_s(self._output_tokens)
            # More load takes no less: whatever is found at a smaller rate is a floor.
            below = [each for k, each in self._known.items() if k < point]
            self._known[point] = max(own, *below) if below else own
        return self._known[point]

    def operation(self, rate_per_s: float) -> Operation | None:
        choice = self.column.choice
        if not rate_per_s:
            return quickest(choice.chain, 0.0)
        found = quickest(choice.chain, rate_per_s, within_slo=True)
        # The layers that carry most have seats for any rate below, though some wait for longer.
        return found or quickest(choice.chain, rate_per_s, choice.operation.held)

    def worthwhile(self, cost_s: float) -> int:
        """The point to which a bit more adds no more than that, in requests under way for each
        request per second."""
        if cost_s in self._worthwhile:
            return self._worthwhile[cost_s]
        low, high = -1, len(self.rates) - 1
        while high > low:
            middle = (low + high + 1) // 2
            under_way = self.rates[middle] * self.latency_s(middle)
            before = self.rate(middle - 1) * self.latency_s(middle - 1) if middle else 0.0
            added = (under_way - before) / (self.rates[middle] - self.rate(middle - 1))
            low, high = (middle, high) if added <= cost_s else (low, middle - 1)
        self._worthwhile[cost_s] = low
        return low


def _less(counts: dict[int, int], index: int) -> dict[int, int]:
    left = {**counts, index: counts[index] - 1}
    return {each: n for each, n in left.items() if n}


def _up_to(most: float) -> Iterator[float]:
    """Rates in steps, up to the most."""
    num = round(math.log(1 / _LEAST_SHARE) / math.log(_STEP))
    for index in range(num, -1, -1):
        yield most / _STEP**index
