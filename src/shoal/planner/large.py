"""A good plan of many devices, and a bound on any better one of the same kind.

    columns    replicas worth having (`columns.py`), and those that the program's prices ask for
    program    how many of each, in fractions, from what there is: a linear program; its optimum is
               the bound
    rounding   whole replicas of the program's; with what is left the same again, columns for the
               new prices among them, one replica where no whole one is in it; then what is over
    roles      the same with columns that only start requests, and others that go on with them, in
               the program (`mix.py`); all that keep KV alike

The bound holds for all mixtures of the columns that were looked at (Gilmore and Gomory, 1961),
however devices would be put together; other replicas than those are not in it. The least latency is
in `spread.py`. Knows nothing of reasons.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from shoal.core.cluster import Device
from shoal.core.plan import Role
from shoal.planner.chains import Bench
from shoal.planner.choice import Choice, carried
from shoal.planner.columns import MOST_STAGES, Column, Columns
from shoal.planner.inventory import Inventory
from shoal.planner.kv_links import poorly_joined
from shoal.planner.mix import Mix, Spare, Wanted, mixed, spare_of
from shoal.planner.pipeline import Chain, Operation, Segment
from shoal.planner.profiles import Problem
from shoal.planner.service import peak, quickest
from shoal.planner.small import MOST_DEVICES, SmallSearch
from shoal.planner.spread import Spread
from shoal.policy.cost_model.numbers import Numbers

_MOST_ROUNDS = 12
"""Of columns for the program's prices; and of those for what is left over."""
_MOST_LEFT_ROUNDS = 3
_MOST_WORTHS = 16
"""Of a request, each eight times the one before."""
_MOST_FIRST = 6
_NEAR = 0.02
"""Of the bound: plans with roles that are so near to it are not looked at again."""
_WHOLE = 1e-6


@dataclass(frozen=True, slots=True)
class Found:
    """Replicas; no mixture of columns gives more than the bound (latency, cost: less).

    Attributes:
        prices: of goodput: requests per second that one more device of a kind would bring.
    """

    choices: tuple[Choice, ...]
    bound: float
    num_columns: int
    prices: tuple[tuple[str, float], ...] = ()


class LargeSearch:
    """
    Args:
        kept: replicas may have roles, and all keep KV and weights like that; None: they have none.
    """

    def __init__(self, problem: Problem, kept: Numbers | None = None) -> None:
        self.problem, self._kept = problem, kept
        roles = kept is not None
        self._roles: tuple[Role, ...] = ("any", "prefill", "decode") if roles else ("any",)
        poor = poorly_joined(problem.cluster) if roles else frozenset[str]()
        self._made = Columns(problem, poor)
        self.stock = self._made.stock
        found = (each for role in self._roles for each in self._made.at_first(role))
        self.columns = [each for each in found if self._is_alike(each.choice)]

    def most_goodput(self) -> Found:
        """The most requests per second within the SLO."""
        mix = self._mixed(self.stock, _MOST_ROUNDS)
        if mix is None:
            return Found((), 0.0, 0)
        choices = self._whole(())
        for first in self._first_ones(mix):
            if carried(choices) < mix.bound * (1 - _NEAR):
                choices = max(choices, self._whole([first]), key=carried)
        kinds = (self._made.example(sort).kind for sort in range(self._made.num_sorts))
        return Found(
            tuple(choices),
            max(mix.bound, carried(choices)),
            len(self.columns),
            tuple(zip(kinds, mix.prices, strict=False)),
        )

    def _whole(self, first: Sequence[Column]) -> list[Choice]:
        """Whole replicas of the program, these among them."""
        inventory = self._made.inventory()
        taken = (self._made.taken(each, inventory) for each in first)
        choices = [each for each in taken if each is not None]
        while more := self._rounded(inventory, choices):
            choices += more
        choices = self._needed(choices, inventory)
        return choices + self._leftover(list(inventory.free()))

    def _first_ones(self, mix: Mix) -> list[Column]:
        """With roles, both of which must come out even: what may be taken before all others."""
        if self._kept is None:
            return []
        fitting = zip(self._fitting(self.stock), mix.counts, strict=False)
        some = [(count, column) for column, count in fitting if count > _WHOLE]
        return [column for _, column in sorted(some, key=lambda each: -each[0])][:_MOST_FIRST]

    def cheapest(self) -> Found:
        """The least price that carries the goal's rate."""
        goal = self.problem.goal
        assert goal.rate_per_s is not None
        mix = self._mixed(self.stock, _MOST_ROUNDS)
        if mix is None or mix.bound < goal.rate_per_s:
            return Found((), math.inf, len(self.columns))
        mix, least = self._least_price(goal.rate_per_s)
        inventory, choices = self._made.inventory(), list[Choice]()
        for column, count in zip(self.columns, mix.counts, strict=True):
            for _ in range(int(count + _WHOLE)):
                choice = self._made.taken(column, inventory)
                if choice is not None:
                    choices.append(choice)
        choices = self._completed(choices, inventory)
        if self._kept is not None:
            choices = self._cheaper(choices, self._reduced(self._whole(())))
        least = max(least, min(map(self._price, self.columns)))  # one whole replica at least
        if carried(choices) < goal.rate_per_s:
            return Found((), least, len(self.columns))
        return Found(tuple(choices), least, len(self.columns))

    def _reduced(self, choices: Sequence[Choice]) -> list[Choice]:
        """Without those that the rate does not need, the dearest first."""
        kept = list(choices)
        for each in sorted(choices, key=lambda each: -self._paid([each])):
            others = [other for other in kept if other is not each]
            if carried(others) >= (self.problem.goal.rate_per_s or 0.0):
                kept = others
        return kept

    def _cheaper(self, first: list[Choice], second: list[Choice]) -> list[Choice]:
        """Of what carries the rate."""
        rate_per_s = self.problem.goal.rate_per_s or 0.0
        enough = [each for each in (first, second) if carried(each) >= rate_per_s]
        return min(enough, key=self._paid, default=first)

    def _paid(self, choices: Sequence[Choice]) -> float:
        devices = (self.problem.cluster.device(name) for each in choices for name in each.names)
        return sum(map(self.problem.goal.price, devices))

    def _least_price(self, rate_per_s: float) -> tuple[Mix, float]:
        """How many of each column carry a rate, in fractions, and what that costs: the least there
        is. A request is worth so much that all are carried."""
        dearest = max(map(self._price, self.columns)) or 1.0
        rates = [each.rate_per_s / rate_per_s for each in self.columns]
        prices = [self._price(each) / dearest for each in self.columns]
        worths = [2 / min(rates) * 8**index for index in range(_MOST_WORTHS)]
        for worth in worths:
            mix = mixed(self.columns, self.stock, wanted=Wanted(rate_per_s, worth, prices))
            if mix.carried >= 1 - _WHOLE or worth == worths[-1]:
                return mix, max(worth - mix.bound, 0.0) * dearest
        raise AssertionError("the last one is taken as it is")

    def quickest(self) -> Found:
        """The least mean latency at the goal's rate."""
        if self._mixed(self.stock, _MOST_ROUNDS) is None:
            return Found((), 0.0, 0)
        spread = Spread(self.problem, self.columns, self.stock)
        inventory, choices = self._made.inventory(), list[Choice]()
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
        return quickest(choice.chain, rate_per_s, within_slo=True) or choice.operation

    def _mixed(
        self, stock: Sequence[int], most_rounds: int, spare: Spare = (0.0, 0.0)
    ) -> Mix | None:
        """The program of these devices, with columns that its prices ask for; None: no columns."""
        for _ in range(most_rounds):
            fitting = self._fitting(stock)
            if not fitting:
                return None
            mix = mixed(fitting, stock, spare)
            priced = self._made.priced(mix.prices, stock)
            more = [each for each in priced if self._is_alike(each.choice)]
            if not more:
                return mix
            self.columns += more
        return mixed(self._fitting(stock), stock, spare)

    def _fitting(self, stock: Sequence[int]) -> list[Column]:
        return [
            each
            for each in self.columns
            if all(use <= n for use, n in zip(each.uses, stock, strict=True))
        ]

    def _is_alike(self, choice: Choice) -> bool:
        """Whether it may be in one plan with replicas that have roles; if there are any."""
        return self._kept is None or choice.keeps == {self._kept}

    def _rounded(self, inventory: Inventory, before: Sequence[Choice]) -> list[Choice]:
        """Whole replicas of the program of what is free; at least one, as long as one fits."""
        stock = inventory.stock()
        mix = self._mixed(stock, _MOST_LEFT_ROUNDS, spare_of(before))
        if mix is None:
            return []
        columns = self._fitting(stock)
        choices: list[Choice] = []
        for column, count in zip(columns, mix.counts, strict=True):
            for _ in range(int(count + _WHOLE)):
                choice = self._made.taken(column, inventory)
                choices += [choice] if choice is not None else []
        if choices:
            return choices

        def worth(index: int) -> tuple[float, float]:
            uses, own = columns[index].uses, columns[index].rate_per_s
            price = sum(n * each for n, each in zip(uses, mix.prices, strict=True))
            return mix.counts[index], own / price if price else float("inf")

        for index in sorted(range(len(columns)), key=worth, reverse=True):
            if columns[index].role != "any" and not mix.counts[index]:
                continue  # without others for the rest of each request it brings nothing
            choice = self._made.taken(columns[index], inventory)
            if choice is not None:
                return [choice]
        return []

    def _needed(self, choices: Sequence[Choice], inventory: Inventory) -> list[Choice]:
        """Those without which less is carried; what the others had is free again."""
        kept = list(choices)
        for each in sorted(choices, key=lambda each: each.rate_per_s):
            others = [other for other in kept if other is not each]
            if each.chain.role != "any" and carried(others) >= carried(kept):
                kept = others
                inventory.give_back(
                    [d for s in each.chain.segments for group in s.groups for d in group.devices]
                )
        return kept

    def _completed(self, taken: Sequence[Choice], inventory: Inventory) -> list[Choice]:
        """With the cheapest for what is left of the rate, as far as one can see ahead: one that is
        enough, or else the one with the best price."""
        choices, rate_per_s = list(taken), self.problem.goal.rate_per_s
        assert rate_per_s is not None, "asked for by price only"
        priced = sorted(self.columns, key=lambda each: self._price(each) / each.rate_per_s)
        priced = [each for each in priced if each.role == "any"]
        while (left := rate_per_s - carried(choices)) > _WHOLE * rate_per_s:
            enough = sorted((c for c in priced if c.rate_per_s >= left), key=self._price)
            more = None
            for column in (*enough, *priced):
                more = self._made.taken(column, inventory)
                if more is not None:
                    break
            if more is None:
                break
            choices.append(more)
        return choices

    def _price(self, column: Column) -> float:
        return self._paid([column.choice])

    def _leftover(self, devices: Sequence[Device]) -> list[Choice]:
        """Replicas of what is left: all ways if it is little, else a pipeline of single devices."""
        if not devices:
            return []
        names = [each.name for each in devices]
        bench = Bench(self.problem, devices)
        if len(names) <= MOST_DEVICES:
            # Beside replicas for whole requests, so are these.
            alike = replace(self.problem, goal=replace(self.problem.goal, may_specialise=False))
            return [
                each
                for each in SmallSearch(alike, bench, names).most_goodput()
                if self._is_alike(each)
            ]
        groups = [bench.group([name]) for name in names]
        usable = [Segment((each,)) for each in groups if each.variants]
        if not usable or len(usable) > min(self.problem.spec.num_layers, MOST_STAGES):
            return []
        chain = Chain(self.problem, usable, thorough=False)
        found = peak(chain)
        if found is None or not self._is_alike(choice := Choice(chain, found)):
            return []
        return [choice]
