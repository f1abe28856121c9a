"""Replicas that a large cluster could have many of: pipelines of groups, by what groups are made
of.

    column     stages in order, each so many alike groups of one form (its instances)
    at first   pipelines of one form, and of two, just large enough for the model
    priced     stages of any forms that bring more than their devices' prices, found by dynamic
               programming: for a batch, a number of stages S and the time of the slowest,

                   cost[s, l] = min over forms f, instances k of
                                k price_f + cost[s - 1, l - layers of f in that time]

               and the cheapest that hold all layers are worked out closely

Groups are made once for each form and moved to the devices they are taken from, anew where those
are joined otherwise. Knows nothing of how many of a column there will be.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shoal.core.cluster import Device
from shoal.planner.choice import Choice
from shoal.planner.inventory import Form, Inventory
from shoal.planner.joins import joined
from shoal.planner.pipeline import Chain, Segment
from shoal.planner.profiles import Group, Problem, Variant
from shoal.planner.service import peak

_MOST_COLUMNS = 1000
_FORMS_OF_A_SORT = 3
_MOST_FORMS = 48
_SPARE_STAGES = 2
"""Pipelines of one form: so many stages more than the fewest that hold the model."""
MOST_STAGES = 32
_DEPTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32)
"""Stages of pipelines that prices are asked for."""
_BATCHES = (1, 4, 8, 16, 24, 32, 48, 64, 96, 128, 256)
_SLACKS = (1.0, 0.7, 0.5)
"""Of the time that the SLO leaves for a step of the slowest stage."""
_PACES = (1.1, 1.4, 2.0, 3.0)
"""Without a SLO: of the time that a stage of the quickest form takes for its part."""
_MOST_INSTANCES = 2
_MOST_PRICED = 40
"""New columns at a time."""
_WORTH = 1e-3

Stages = tuple[tuple[Form, int], ...]
"""Of each stage its form and how many groups of it are its instances."""


@dataclass(frozen=True, slots=True)
class Column:
    """A replica that could be had often, and one made of the first devices.

    `uses`: of each resource of the stock.
    """

    stages: Stages
    uses: tuple[int, ...]
    choice: Choice

    @property
    def num_devices(self) -> int:
        return sum(form.num_devices * instances for form, instances in self.stages)

    @property
    def rate_per_s(self) -> float:
        return self.choice.rate_per_s


class Columns:
    """
    Attributes:
        stock: what there is of each resource (`inventory.py`); the first `num_sorts` are devices.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self._scratch = Inventory(problem.cluster)
        self.stock = self._scratch.stock()
        self.num_sorts = len(self._scratch.sorts)
        self._groups: dict[Form, Group] = {}
        self._joined: dict[tuple[Form, Hashable], Group] = {}
        self._known: dict[Stages, Column | None] = {}
        self.forms = tuple(each for each in self._scratch.forms() if self._group(each).variants)
        self._tables = int(problem.spec.num_layers * 0.05) + 1

    def example(self, sort: int) -> str:
        """Name of a device of a sort."""
        return self._scratch.example(sort).name

    def uses(self, form: Form) -> tuple[tuple[int, int], ...]:
        """What a group takes of each resource."""
        return self._scratch.uses(form)

    def column(self, stages: Stages) -> Column | None:
        """None: there are not enough devices, or it keeps no SLO."""
        if stages not in self._known:
            self._known[stages] = self._made(stages)
        return self._known[stages]

    def taken(self, column: Column, inventory: Inventory) -> Choice | None:
        """One more replica of a column, with the links that its devices have; None: there are not
        enough devices, or over their links it keeps no SLO."""
        taken = inventory.take([form for form, n in column.stages for _ in range(n)])
        if taken is None:
            return None
        chain, example = self._chain(column.stages, taken, self._on), column.choice
        stages = zip(chain.segments, example.chain.segments, strict=True)
        if all(a.group.variants is b.group.variants for a, b in stages):
            return Choice(chain, example.operation)
        found = peak(chain)
        if found is None:
            inventory.give_back([device for group in taken for device in group])
            return None
        return Choice(chain, found)

    def at_first(self) -> list[Column]:
        pure = [each for form in self.forms for each in self._pure(form)]
        chosen = self._best_forms(pure)
        pairs = [
            (slack, forms)
            for first, second in itertools.combinations(chosen, 2)
            for slack, forms in self._pairs(first, second)
        ]
        pairs.sort(key=lambda each: each[0])  # stable: ties stay in the order of forms
        mixed = (self.column(_single(forms)) for _, forms in pairs[: _MOST_COLUMNS - len(pure)])
        return [*pure, *(each for each in mixed if each is not None)]

    def priced(self, prices: Sequence[float], stock: Sequence[int]) -> list[Column]:
        """New columns that bring more than the prices of their devices, of what is in stock."""
        asked = _Pricing(self, prices, stock)
        ranked = sorted(asked.pipelines().items(), key=lambda each: -each[1])
        found = []
        for stages, _ in ranked:
            if stages in self._known:
                continue
            column = self.column(stages)
            if column is not None and column.rate_per_s > _price(column, prices) * (1 + _WORTH):
                found.append(column)
            if len(found) == _MOST_PRICED:
                break
        return found

    def _made(self, stages: Stages) -> Column | None:
        if len(stages) > min(self.problem.spec.num_layers, MOST_STAGES):
            return None
        uses = [0] * len(self.stock)
        for form, instances in stages:
            for resource, count in self.uses(form):
                uses[resource] += count * instances
        if any(use > n for use, n in zip(uses, self.stock, strict=True)):
            return None
        taken = self._scratch.peek([form for form, n in stages for _ in range(n)])
        if taken is None:
            return None
        chain = self._chain(stages, taken, self._like)
        found = peak(chain)
        return None if found is None else Column(stages, tuple(uses), Choice(chain, found))

    def _chain(
        self,
        stages: Stages,
        taken: Sequence[Sequence[Device]],
        made: Callable[[Form, Sequence[Device]], Group],
    ) -> Chain:
        """The weaker stages first: the head is on the last. Of instances the slowest counts."""
        spare, segments = iter(taken), []
        for form, instances in stages:
            groups = [made(form, next(spare)) for _ in range(instances)]
            groups.sort(key=lambda each: -each.variants[0].layer_s(1))
            segments.append(Segment(tuple(groups)))
        segments.sort(key=lambda each: _strength(each.group))
        return Chain(self.problem, segments, thorough=False)

    def _pure(self, form: Form) -> Iterator[Column]:
        fewest = -(-self.problem.spec.num_layers // max(self._room(form), 1))
        for count in range(fewest, fewest + _SPARE_STAGES + 1):
            column = self.column(_single((form,) * count))
            if column is not None:
                yield column

    def _pairs(self, first: Form, second: Form) -> Iterator[tuple[float, tuple[Form, ...]]]:
        """As few of the second as hold what so many of the first leave; by how much is spare."""
        layers, rooms = self.problem.spec.num_layers, (self._room(first), self._room(second))
        if not all(rooms):
            return
        for count in range(1, min(-(-layers // rooms[0]), MOST_STAGES) + 1):
            left = max(layers - count * rooms[0], 1)
            others = -(-left // rooms[1])
            for spare in (0, 1):
                num = others + spare
                yield (
                    (count * rooms[0] + num * rooms[1]) / layers,
                    (first,) * count + (second,) * num,
                )

    def _best_forms(self, pure: Sequence[Column]) -> list[Form]:
        """Of each sort, those whose own pipelines give most for a device; mixed ones besides."""
        density = dict.fromkeys(self.forms, 0.0)
        for column in pure:
            form = column.stages[0][0]
            density[form] = max(density[form], column.rate_per_s / column.num_devices)
        best: list[Form] = []
        for sort in range(self.num_sorts):
            own_forms = [each for each in self.forms if [s for s, _ in each.counts] == [sort]]
            # Those that hold no model by themselves: the largest first.
            own_forms.sort(key=lambda each: (-density[each], -each.num_devices))
            best += own_forms[:_FORMS_OF_A_SORT]
        best += [each for each in self.forms if len(each.counts) > 1]
        return sorted(best, key=lambda each: -density[each])[:_MOST_FORMS]

    def _group(self, form: Form) -> Group:
        if form not in self._groups:
            group = Group(self.problem, self._scratch.typical(form))
            self._groups[form] = self._joined[form, self._links(group.devices)] = group
        return self._groups[form]

    def _like(self, form: Form, devices: Sequence[Device]) -> Group:
        """Devices as if they were joined as is typical of the form."""
        return self._group(form).on(devices)

    def _on(self, form: Form, devices: Sequence[Device]) -> Group:
        """Devices as they are joined."""
        self._group(form)
        key = form, self._links(devices)
        if key not in self._joined:
            self._joined[key] = Group(self.problem, devices)
        return self._joined[key].on(devices)

    def _links(self, devices: Sequence[Device]) -> Hashable:
        return joined(self.problem.cluster, devices)

    def variants(self, form: Form) -> Sequence[Variant]:
        return self._group(form).variants

    def _room(self, form: Form) -> int:
        """Layers that fit beside the KV of one sequence."""
        variants = self.variants(form)
        return max((each.most_layers(1, False, False) for each in variants), default=0)


class _Pricing:
    """One question: which pipelines bring more than their devices' prices."""

    def __init__(self, columns: Columns, prices: Sequence[float], stock: Sequence[int]) -> None:
        self.columns, self.stock = columns, stock
        self.goal, self.num_layers = columns.problem.goal, columns.problem.spec.num_layers
        # Embedding and head take the place of layers.
        self.most_layers = self.num_layers + self.num_layers // 16 + 1
        self.items: list[tuple[Form, int, int, float]] = []
        for form in columns.forms:
            uses = columns.uses(form)
            copies = min(stock[each] // count for each, count in uses)
            for instances in range(1, min(_MOST_INSTANCES, copies) + 1):
                price = sum(prices[each] * count for each, count in uses) * instances
                self.items.append((form, instances, copies // instances, price))

    def pipelines(self) -> dict[Stages, float]:
        """With what they are thought to bring for what they cost."""
        found: dict[Stages, float] = {}
        for batch in (each for each in _BATCHES if each <= self.goal.max_concurrency):
            for depth in (each for each in _DEPTHS if each <= self.num_layers):
                if batch * depth > self.goal.max_concurrency:
                    break
                for pace_s in self._paces(batch, depth):
                    rate = batch / (self.goal.output_tokens * pace_s)
                    for price, stages in self._cheapest(batch, depth, pace_s):
                        worth = rate / max(price, 1e-12)
                        if worth > found.get(stages, 0.0):
                            found[stages] = worth
        return found

    def _paces(self, batch: int, depth: int) -> list[float]:
        """Seconds of the slowest stage."""
        if self.goal.slo.tpot_s is not None:
            return [self.goal.slo.tpot_s / depth * each for each in _SLACKS]
        quickest_s = min(
            self.num_layers / depth * self._layer_s(each, batch) + each.step_s
            for form in self.columns.forms
            for each in self.columns.variants(form)
        )
        return [quickest_s * each for each in _PACES]

    def _layer_s(self, variant: Variant, batch: int) -> float:
        return variant.layer_s(batch) + batch / self.goal.output_tokens * variant.prompt_layer_s

    def _cheapest(self, batch: int, depth: int, pace_s: float) -> Iterator[tuple[float, Stages]]:
        """Of so many stages, none of which takes longer: those that just hold all layers, and those
        that hold embedding and head besides."""
        items = []
        for form, instances, copies, price in self.items:
            layers = self._held(form, instances, batch, depth, pace_s)
            if layers:
                items.append((form, instances, min(copies, depth), price, layers))
        if not items:
            return
        cost, taken = _packed_stages(
            [(price, layers, copies) for _, _, copies, price, layers in items],
            depth,
            self.most_layers,
        )
        for layers in {self.num_layers, self.most_layers}:
            if np.isfinite(cost[depth, layers]):
                counts = _traced(taken, [each[4] for each in items], depth, layers)
                stages = tuple(
                    (form, instances)
                    for (form, instances, *_), count in zip(items, counts, strict=True)
                    for _ in range(count)
                )
                if self._is_in_stock(stages):
                    yield float(cost[depth, layers]), stages

    def _held(self, form: Form, instances: int, batch: int, depth: int, pace_s: float) -> int:
        """Layers that a stage runs in time and has room for."""
        sequences, most = -(-depth * batch // instances), 0
        for each in self.columns.variants(form):
            in_time = (pace_s * instances - each.step_s) / self._layer_s(each, batch)
            if in_time >= 1:
                most = max(most, min(int(in_time), each.most_layers(sequences, False, False)))
        return min(most, self.num_layers)

    def _is_in_stock(self, stages: Stages) -> bool:
        left = list(self.stock)
        for form, instances in stages:
            for resource, count in self.columns.uses(form):
                left[resource] -= count * instances
        return min(left) >= 0


def _packed_stages(
    items: Sequence[tuple[float, int, int]], depth: int, num_layers: int
) -> tuple[npt.NDArray[np.float64], list[npt.NDArray[np.int8]]]:
    """The least price of exactly s stages that hold at least l layers, and of each item how often
    it is taken there.

    Args:
        items: price, layers, and how often there may be one.
    """
    cost = np.full((depth + 1, num_layers + 1), np.inf)
    cost[0, 0] = 0.0
    taken = []
    for price, layers, copies in items:
        best, often = cost.copy(), np.zeros(cost.shape, dtype=np.int8)
        for count in range(1, min(copies, depth) + 1):
            held = np.maximum(np.arange(num_layers + 1) - count * layers, 0)
            other = cost[: depth + 1 - count][:, held] + count * price
            better = other < best[count:]
            best[count:][better] = other[better]
            often[count:][better] = count
        cost = best
        taken.append(often)
    return cost, taken


def _traced(
    taken: Sequence[npt.NDArray[np.int8]], layers: Sequence[int], depth: int, num_layers: int
) -> list[int]:
    counts = []
    for often, own in zip(reversed(taken), reversed(layers), strict=True):
        count = int(often[depth, num_layers])
        counts.append(count)
        depth, num_layers = depth - count, max(num_layers - count * own, 0)
    return counts[::-1]


def _single(forms: Sequence[Form]) -> Stages:
    return tuple((form, 1) for form in forms)


def _price(column: Column, prices: Sequence[float]) -> float:
    return sum(n * each for n, each in zip(column.uses, prices, strict=True))


def _strength(group: Group) -> float:
    return sum(each.bandwidth_bytes_per_s * each.speed for each in group.devices)
