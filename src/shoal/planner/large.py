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
from shoal.planner.pipeline import Chain, Operation, Segment
from shoal.planner.profiles import Problem
from shoal.planner.program import Packing, pack
from shoal.planner.service import peak, quickest
from shoal.planner.small import MOST_DEVICES, SmallSearch
from shoal.planner.spread import Spread

_MOST_ROUNDS = 12
"""Of columns for the program's prices; and of those for what is left over."""
_MOST_LEFT_ROUNDS = 3
_MOST_WORTHS = 16
"""Of a request, each eight times the one before."""
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
        prices: of one more of each resource of the stock, in requests/s; once goodput was looked
            for.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self._made = Columns(problem)
        self.stock, self.num_sorts = self._made.stock, self._made.num_sorts
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
        program, least = self._least_price(goal.rate_per_s)
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

    def _least_price(self, rate_per_s: float) -> tuple[Packing, float]:
        """How many of each column carry a rate, in fractions, and what that costs: the least there
        is. A request is worth so much that all are carried."""
        dearest = max(map(self._price, self.columns)) or 1.0
        rates = [each.rate_per_s / rate_per_s for each in self.columns]
        prices = [self._price(each) / dearest for each in self.columns]
        uses = [(*each.uses, own) for each, own in zip(self.columns, rates, strict=True)]
        worths = [2 / min(rates) * 8**index for index in range(_MOST_WORTHS)]
        for worth in worths:
            values = [worth * own - price for own, price in zip(rates, prices, strict=True)]
            program = pack(values, uses, (*self.stock, 1.0))
            carried = sum(n * own for n, own in zip(program.counts, rates, strict=True))
            if carried >= 1 - _WHOLE or worth == worths[-1]:
                return program, max(worth - program.bound, 0.0) * dearest
        raise AssertionError("the last one is taken as it is")

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
                is_like = choice.operation is column.choice.operation
                served = operation if is_like else self._served(choice, share)
                choices.append(replace(choice, operation=served, share=share))
        shared = sum(each.share or 0.0 for each in choices)
        if shared < 1 - _WHOLE:  # not all of them could be taken: the others do their part
            choices = [replace(each, share=(each.share or 0.0) / shared) for each in choices]
        return Found(tuple(choices), spread.bound_s, len(self.columns))

    def _served(self, choice: Choice, share: float) -> Operation:
        """At its share of the rate, over the links that it has."""
        rate_per_s = (self.problem.goal.rate_per_s or 0.0) * share
        return quickest(choice.chain, rate_per_s) or choice.operation

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
        assert self.problem.goal.rate_per_s is not None, "asked for by price only"
        while left > _WHOLE * self.problem.goal.rate_per_s:
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
