"""A good plan of many devices, and a bound on any better one of the same kind.

    columns    replicas worth having (`columns.py`), and those that the program's prices ask for
    program    how many of each, in fractions, from what there is: a linear program; its optimum is
               the bound
    rounding   whole replicas of the program's; with what is left the same again, columns for the
               new prices among them, one replica where no whole one is in it; then what is over

The bound holds for all mixtures of the columns that were looked at (Gilmore and Gomory, 1961),
however devices would be put together; other replicas than those are not in it. The least latency is
in `spread.py`. Knows nothing of reasons.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from shoal.core.cluster import Device
from shoal.planner.chains import Bench
from shoal.planner.choice import Choice
from shoal.planner.columns import MOST_STAGES, Column, Columns
from shoal.planner.inventory import Inventory
from shoal.planner.pipeline import Chain, Segment
from shoal.planner.profiles import Problem
from shoal.planner.program import Packing, pack
from shoal.planner.service import peak
from shoal.planner.small import MOST_DEVICES, SmallSearch
from shoal.planner.spread import Spread

_MOST_ROUNDS = 12
"""Of columns for the program's prices; and of those for what is left over."""
_MOST_LEFT_ROUNDS = 3
_WHOLE = 1e-6


@dataclass(frozen=True, slots=True)
class Found:
    """Replicas; no mixture of columns gives more than the bound (latency, cost: less)."""

    choices: tuple[Choice, ...]
    bound: float
    num_columns: int


class LargeSearch:
    """
    Attributes:
        prices: of one more device of each sort, in requests/s; once goodput was looked for.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self._made = Columns(problem)
        self.stock = self._made.stock
        self.columns = self._made.at_first()
        self.prices: tuple[float, ...] = ()

    def most_goodput(self) -> Found:
        """The most requests per second within the SLO."""
        packing = self._packed(self.stock, _MOST_ROUNDS)
        if packing is None:
            return Found((), 0.0, 0)
        self.prices = packing.prices
        inventory, choices = Inventory(self.problem.cluster), []
        while more := self._rounded(inventory):
            choices += more
        choices += self._leftover(list(inventory.free()))
        rate = sum(each.rate_per_s for each in choices)
        return Found(tuple(choices), max(packing.bound, rate), len(self.columns))

    def cheapest(self) -> Found:
        """The least price that carries the goal's rate."""
        goal = self.problem.goal
        assert goal.rate_per_s is not None
        packing = self._packed(self.stock, _MOST_ROUNDS)
        if packing is None or packing.bound < goal.rate_per_s:
            return Found((), 0.0, len(self.columns))
        # So much a request is worth that all are carried.
        worth = 2 * max(self._price(each) / each.rate_per_s for each in self.columns)
        uses = [(*each.uses, each.rate_per_s) for each in self.columns]
        while True:
            values = [worth * each.rate_per_s - self._price(each) for each in self.columns]
            program = pack(values, uses, (*self.stock, goal.rate_per_s))
            carried = sum(
                n * each.rate_per_s for n, each in zip(program.counts, self.columns, strict=True)
            )
            if carried >= goal.rate_per_s * (1 - _WHOLE) or worth > 1e12:
                break
            worth *= 8
        least = worth * goal.rate_per_s - program.bound
        inventory, choices, left = Inventory(self.problem.cluster), [], goal.rate_per_s
        for column, count in zip(self.columns, program.counts, strict=True):
            for _ in range(int(count + _WHOLE)):
                choice = self._made.taken(column, inventory)
                if choice is not None:
                    choices.append(choice)
                    left -= choice.rate_per_s
        choices += self._completed(left, inventory)
        if sum(each.rate_per_s for each in choices) < goal.rate_per_s:
            return Found((), 0.0, len(self.columns))
        least = max(least, min(map(self._price, self.columns)))  # one whole replica at least
        return Found(tuple(choices), least, len(self.columns))

    def quickest(self) -> Found:
        """The least mean latency at the goal's rate."""
        packing = self._packed(self.stock, _MOST_ROUNDS)
        if packing is None:
            return Found((), 0.0, 0)
        spread = Spread(self.problem, self.columns, self.stock)
        inventory, choices = Inventory(self.problem.cluster), []
        for column, operation, share in spread.found():
            choice = self._made.taken(column, inventory)
            if choice is not None:
                choices.append(replace(choice, operation=operation, share=share))
        return Found(tuple(choices), spread.bound_s, len(self.columns))

    def example(self, sort: int) -> str:
        """Name of a device of a sort."""
        return self._made.example(sort)

    def _packed(self, stock: Sequence[int], most_rounds: int) -> Packing | None:
        """The program of these devices, with columns that its prices ask for; None: no columns."""
        for _ in range(most_rounds):
            fitting = self._fitting(stock)
            if not fitting:
                return None
            packing = _program(fitting, stock)
            more = self._made.priced(packing.prices, stock)
            if not more:
                return packing
            self.columns += more
        return _program(self._fitting(stock), stock)

    def _fitting(self, stock: Sequence[int]) -> list[Column]:
        return [
            each
            for each in self.columns
            if all(use <= n for use, n in zip(each.uses, stock, strict=True))
        ]

    def _rounded(self, inventory: Inventory) -> list[Choice]:
        """Whole replicas of the program of what is free; at least one, as long as one fits."""
        stock = inventory.stock()
        packing = self._packed(stock, _MOST_LEFT_ROUNDS)
        if packing is None:
            return []
        columns = self._fitting(stock)
        choices: list[Choice] = []
        for column, count in zip(columns, packing.counts, strict=True):
            for _ in range(int(count + _WHOLE)):
                choice = self._made.taken(column, inventory)
                choices += [choice] if choice is not None else []
        if choices:
            return choices

        def worth(index: int) -> tuple[float, float]:
            uses, own = columns[index].uses, columns[index].rate_per_s
            price = sum(n * each for n, each in zip(uses, packing.prices, strict=True))
            return packing.counts[index], own / price if price else float("inf")

        for index in sorted(range(len(columns)), key=worth, reverse=True):
            choice = self._made.taken(columns[index], inventory)
            if choice is not None:
                return [choice]
        return []

    def _completed(self, left: float, inventory: Inventory) -> list[Choice]:
        """The cheapest for a rate, as far as one can see ahead: one that is enough, or else the one
        with the best price."""
        choices: list[Choice] = []
        priced = sorted(self.columns, key=lambda each: self._price(each) / each.rate_per_s)
        while left > _WHOLE:
            enough = sorted((c for c in priced if c.rate_per_s >= left), key=self._price)
            more = None
            for column in (*enough, *priced):
                more = self._made.taken(column, inventory)
                if more is not None:
                    break
            if more is None:
                break
            choices.append(more)
            left -= more.rate_per_s
        return choices

    def _price(self, column: Column) -> float:
        chain = column.choice.chain
        groups = (group for segment in chain.segments for group in segment.groups)
        return sum(self.problem.goal.price(each) for group in groups for each in group.devices)

    def _leftover(self, devices: Sequence[Device]) -> list[Choice]:
        """Replicas of what is left: all ways if it is little, else a pipeline of single devices."""
        if not devices:
            return []
        names = [each.name for each in devices]
        bench = Bench(self.problem, devices)
        if len(names) <= MOST_DEVICES:
            # Beside replicas for whole requests, so are these.
            alike = replace(self.problem, goal=replace(self.problem.goal, may_specialise=False))
            return list(SmallSearch(alike, bench, names).most_goodput())
        groups = [bench.group([name]) for name in names]
        usable = [Segment((each,)) for each in groups if each.variants]
        if not usable or len(usable) > min(self.problem.spec.num_layers, MOST_STAGES):
            return []
        chain = Chain(self.problem, usable, thorough=False)
        found = peak(chain)
        return [] if found is None else [Choice(chain, found)]


def _program(columns: Sequence[Column], stock: Sequence[int]) -> Packing:
    return pack([c.rate_per_s for c in columns], [c.uses for c in columns], stock)
