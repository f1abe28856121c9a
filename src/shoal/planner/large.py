"""A good plan of many devices, and a bound on any better one of the same kind.

    columns    replicas worth having: pipelines of groups of one or two forms, just large enough
    program    how many of each, in fractions, from what there is: a linear program; its optimum is
               the bound
    rounding   whole replicas of the program's, then the densest columns that still fit, then
               pipelines of what is left over

The bound holds for all mixtures of the columns that were looked at (Gilmore and Gomory, 1961),
however devices would be put together; other replicas than those are not in it. A stage has one
instance here. Knows nothing of reasons.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from shoal.core.cluster import Device
from shoal.planner.chains import Bench
from shoal.planner.choice import Choice
from shoal.planner.inventory import Form, Inventory
from shoal.planner.pipeline import Chain, Segment
from shoal.planner.profiles import Group, Problem
from shoal.planner.program import pack
from shoal.planner.service import peak, quickest
from shoal.planner.small import MOST_DEVICES, SmallSearch

_MOST_COLUMNS = 1000
_FORMS_OF_A_SORT = 3
_MOST_FORMS = 48
_QUICK_COLUMNS = 40
"""Those of the least latency, and as many of the most goodput, that compete at a rate."""
_SPARE_STAGES = 2
"""Pipelines of one form: so many stages more than the fewest that hold the model."""
_MOST_STAGES = 32


_WORTH = 1e-3
"""More replicas, for less gain in latency than that, are not worth it."""


@dataclass(frozen=True, slots=True)
class Column:
    """A replica that could be had often: its groups' forms, and one made of the first devices.

    `uses`: devices of each sort.
    """

    forms: tuple[Form, ...]
    uses: tuple[int, ...]
    choice: Choice

    @property
    def rate_per_s(self) -> float:
        return self.choice.rate_per_s


@dataclass(frozen=True, slots=True)
class Found:
    """Replicas; no mixture of columns gives more than the bound (latency, cost: less)."""

    choices: tuple[Choice, ...]
    bound: float
    num_columns: int


class LargeSearch:
    """Groups are made once for each form and moved to the devices they are taken from.

    Attributes:
        prices: of one more device of each sort, in requests/s; once goodput was looked for.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self._scratch = Inventory(problem.cluster)
        self.stock = self._scratch.stock()
        self._groups: dict[Form, Group] = {}
        self.columns = tuple(self._columns())
        self.prices: tuple[float, ...] = ()

    def most_goodput(self) -> Found:
        """The most requests per second within the SLO."""
        columns = self.columns
        if not columns:
            return Found((), 0.0, 0)
        packing = pack([c.rate_per_s for c in columns], [c.uses for c in columns], self.stock)
        self.prices = packing.prices
        inventory, choices = Inventory(self.problem.cluster), []
        for column, count in zip(columns, packing.counts, strict=True):
            for _ in range(int(count + 1e-9)):
                choices += self._taken(column, inventory)

        def density(column: Column) -> float:
            price = sum(n * each for n, each in zip(column.uses, packing.prices, strict=True))
            return column.rate_per_s / price if price else float("inf")

        for column in sorted(columns, key=density, reverse=True):
            while more := self._taken(column, inventory):
                choices += more
        choices += self._leftover(list(inventory.free()))
        rate = sum(each.rate_per_s for each in choices)
        return Found(tuple(choices), max(packing.bound, rate), len(columns))

    def cheapest(self) -> Found:
        """The least price that carries the goal's rate."""
        goal = self.problem.goal
        assert goal.rate_per_s is not None
        inventory, choices = Inventory(self.problem.cluster), []
        priced = sorted(self.columns, key=lambda each: self._price(each) / each.rate_per_s)
        left = goal.rate_per_s
        for column in priced:
            while left > 0:
                enough = [each for each in priced if each.rate_per_s >= left]
                last = min(enough, key=self._price, default=column)
                more = self._taken(last, inventory) or self._taken(column, inventory)
                if not more:
                    break
                choices += more
                left -= sum(each.rate_per_s for each in more)
        if left > 0:
            return Found((), 0.0, len(self.columns))
        densest = self._price(priced[0]) / priced[0].rate_per_s * goal.rate_per_s
        least = max(densest, min(map(self._price, priced)))  # one whole replica at least
        return Found(tuple(choices), least, len(self.columns))

    def quickest(self) -> Found:
        """The least mean latency at the goal's rate: so many replicas of one column."""
        goal = self.problem.goal
        rate = goal.rate_per_s or 0.0
        best: tuple[float, Column, int, Choice] | None = None
        alone = self._alone()
        dense = sorted(self.columns, key=lambda each: -each.rate_per_s / sum(each.uses))
        for column in dict.fromkeys(
            [*(each for _, each in alone[:_QUICK_COLUMNS]), *dense[:_QUICK_COLUMNS]]
        ):
            most = min(n // use for n, use in zip(self.stock, column.uses, strict=True) if use)
            for count in _counts(most if rate else 1):
                found = quickest(column.choice.chain, rate / count)
                if found is None:
                    continue
                latency_s = found.latency_s(goal.output_tokens)
                if best is None or latency_s < best[0] * (1 - _WORTH):
                    best = latency_s, column, count, Choice(column.choice.chain, found)
        if best is None:
            return Found((), 0.0, len(self.columns))
        _, column, count, choice = best
        inventory, choices = Inventory(self.problem.cluster), []
        for _ in range(count):
            choices += self._taken(Column(column.forms, column.uses, choice), inventory)
        return Found(tuple(choices), alone[0][0], len(self.columns))

    def _alone(self) -> list[tuple[float, Column]]:
        """Columns by the latency of a request that is alone, the least first."""
        tokens = self.problem.goal.output_tokens
        found = ((quickest(each.choice.chain, 0.0), each) for each in self.columns)
        timed = [(op.latency_s(tokens), each) for op, each in found if op is not None]
        return sorted(timed, key=lambda each: each[0])

    def example(self, sort: int) -> str:
        """Name of a device of a sort."""
        return self._scratch.example(sort).name

    def _price(self, column: Column) -> float:
        groups = (s.group for s in column.choice.chain.segments)
        return sum(self.problem.goal.price(each) for group in groups for each in group.devices)

    def _columns(self) -> Iterator[Column]:
        forms = [form for form in self._scratch.forms() if self._group(form).variants]
        pure = [each for form in forms for each in self._pure(form)]
        yield from pure
        chosen = self._best_forms(forms, pure)
        pairs = [
            (slack, forms)
            for index, first in enumerate(chosen)
            for second in chosen[index + 1 :]
            for slack, forms in self._pairs(first, second)
        ]
        pairs.sort(key=lambda each: each[0])  # stable: ties stay in the order of forms
        for _, pair in pairs[: max(_MOST_COLUMNS - len(pure), 0)]:
            yield from self._column(pair)

    def _pure(self, form: Form) -> Iterator[Column]:
        fewest = -(-self.problem.spec.num_layers // max(self._room(form), 1))
        for count in range(fewest, fewest + _SPARE_STAGES + 1):
            yield from self._column((form,) * count)

    def _pairs(self, first: Form, second: Form) -> Iterator[tuple[float, tuple[Form, ...]]]:
        """As few of the second as hold what so many of the first leave; by how much is spare."""
        layers, rooms = self.problem.spec.num_layers, (self._room(first), self._room(second))
        if not all(rooms):
            return
        for count in range(1, min(-(-layers // rooms[0]), _MOST_STAGES) + 1):
            left = max(layers - count * rooms[0], 1)
            others = -(-left // rooms[1])
            for spare in (0, 1):
                num = others + spare
                yield (
                    (count * rooms[0] + num * rooms[1]) / layers,
                    (first,) * count + (second,) * num,
                )

    def _best_forms(self, forms: Sequence[Form], pure: Sequence[Column]) -> list[Form]:
        """Of each sort, those whose own pipelines give most for a device; mixed ones besides."""
        density = dict.fromkeys(forms, 0.0)
        for column in pure:
            own = column.rate_per_s / sum(column.uses)
            density[column.forms[0]] = max(density[column.forms[0]], own)
        best: list[Form] = []
        for sort in range(len(self.stock)):
            own_forms = [each for each in forms if [s for s, _ in each.counts] == [sort]]
            # Those that hold no model by themselves: the largest first.
            own_forms.sort(key=lambda each: (-density[each], -each.num_devices))
            best += own_forms[:_FORMS_OF_A_SORT]
        best += [each for each in forms if len(each.counts) > 1]
        return sorted(best, key=lambda each: -density[each])[:_MOST_FORMS]

    def _column(self, forms: tuple[Form, ...]) -> Iterator[Column]:
        if len(forms) > min(self.problem.spec.num_layers, _MOST_STAGES):
            return
        uses = [0] * len(self.stock)
        for form in forms:
            for sort, count in form.counts:
                uses[sort] += count
        if any(use > n for use, n in zip(uses, self.stock, strict=True)):
            return
        taken = self._scratch.peek(forms)
        if taken is None:
            return
        chain = self._chain(forms, taken)
        found = peak(chain)
        if found is not None:
            yield Column(forms, tuple(uses), Choice(chain, found))

    def _chain(self, forms: Sequence[Form], taken: Sequence[Sequence[Device]]) -> Chain:
        """The first form's stages first: the head is on the last, so the stronger ones are."""
        groups = [self._group(form).on(devices) for form, devices in zip(forms, taken, strict=True)]
        strength = {
            form: sum(each.bandwidth_bytes_per_s * each.speed for each in group.devices)
            for form, group in zip(forms, groups, strict=True)
        }
        order = sorted(range(len(forms)), key=lambda index: strength[forms[index]])
        return Chain(self.problem, [Segment((groups[index],)) for index in order], thorough=False)

    def _group(self, form: Form) -> Group:
        if form not in self._groups:
            taken = self._scratch.peek([form])
            assert taken is not None, "a form is of devices that there are"
            self._groups[form] = Group(self.problem, taken[0])
        return self._groups[form]

    def _room(self, form: Form) -> int:
        """Layers that fit beside the KV of one sequence."""
        variants = self._group(form).variants
        return max((each.most_layers(1, False, False) for each in variants), default=0)

    def _taken(self, column: Column, inventory: Inventory) -> list[Choice]:
        """One more replica of a column; empty: there are not enough devices."""
        taken = inventory.take(column.forms)
        if taken is None:
            return []
        return [Choice(self._chain(column.forms, taken), column.choice.operation)]

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
        if not usable or len(usable) > min(self.problem.spec.num_layers, _MOST_STAGES):
            return []
        chain = Chain(self.problem, usable, thorough=False)
        found = peak(chain)
        return [] if found is None else [Choice(chain, found)]


def _counts(most: int) -> list[int]:
    """1, 2, 3, ... with growing steps, and the most."""
    found, each = [], 1
    while each < most:
        found.append(each)
        each += max(each // 4, 1)
    return [*found, most]
