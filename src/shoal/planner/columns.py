"""Replicas that a large cluster could have many of: pipelines of groups, by what groups are made
of.

    column     stages in order, each so many alike groups of one form (its instances)
    at first   pipelines of one form, and of two, just large enough for the model
    priced     stages of any forms that are thought to bring more than their devices' prices
               (`pricing.py`), worked out closely
    roles      some of those at first for prompts only, and single stages for decoding only, nowhere
               where KV gets to slowly (`kv_links.py`). Not pipelines: each request that gets there
               is a Step of its own at first, one more in flight than stages (simulated: 69 ms a
               token instead of 40)

Groups are made once for each form and moved to the devices they are taken from, anew where those
are joined otherwise. Knows nothing of how many of a column there will be.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass

from shoal.core.cluster import Device
from shoal.core.plan import Role
from shoal.planner.choice import Choice
from shoal.planner.inventory import Form, Inventory
from shoal.planner.joins import joined
from shoal.planner.kv_links import KvLinks
from shoal.planner.pipeline import Chain, Segment
from shoal.planner.pricing import Offer, Pricing, Stages
from shoal.planner.profiles import Group, Problem, Variant
from shoal.planner.prompts import kv_bytes
from shoal.planner.service import peak

_MOST_COLUMNS = 1000
_FORMS_OF_A_SORT = 3
_MOST_FORMS = 48
_SPARE_STAGES = 2
"""Pipelines of one form: so many stages more than the fewest that hold the model."""
MOST_STAGES = 32
_MOST_INSTANCES = 2
_MOST_PRICED = 40
"""New columns at a time."""
_WORTH = 1e-3


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

    @property
    def role(self) -> Role:
        return self.choice.chain.role


class Columns:
    """
    Args:
        poor: hosts to which KV gets slowly: none has a role, and none is taken for the like of
            others.

    Attributes:
        stock: what there is of each resource (`inventory.py`); the first `num_sorts` are devices.
    """

    def __init__(self, problem: Problem, poor: frozenset[str] = frozenset()) -> None:
        self.problem, self._poor = problem, poor
        self._scratch = self.inventory()
        self.stock = self._scratch.stock()
        self.num_sorts = len(self._scratch.sorts)
        self._groups: dict[Form, Group] = {}
        self._joined: dict[tuple[Form, Hashable], Group] = {}
        self._known: dict[tuple[Stages, Role], Column | None] = {}
        self._kv_links = KvLinks(problem.cluster, poor)
        self.forms = tuple(each for each in self._scratch.forms() if self._group(each).variants)

    def inventory(self) -> Inventory:
        """All devices, free."""
        return Inventory(self.problem.cluster, self._poor)

    def example(self, sort: int) -> Device:
        """Of a sort."""
        return self._scratch.example(sort)

    def uses(self, form: Form) -> tuple[tuple[int, int], ...]:
        """What a group takes of each resource."""
        return self._scratch.uses(form)

    def column(self, stages: Stages, role: Role = "any") -> Column | None:
        """None: there are not enough devices, or it keeps no SLO."""
        if (stages, role) not in self._known:
            self._known[stages, role] = self._made(stages, role)
        return self._known[stages, role]

    def taken(self, column: Column, inventory: Inventory) -> Choice | None:
        """One more replica of a column, with the links that its devices have; None: there are not
        enough devices, or over their links it keeps no SLO."""
        taken = inventory.take([form for form, n in column.stages for _ in range(n)])
        if taken is None:
            return None
        example = column.choice
        chain = self._acting(self._chain(column.stages, taken, self._on), column.role)
        stages = zip(chain.segments, example.chain.segments, strict=True)
        is_like = all(a.group.variants is b.group.variants for a, b in stages)
        if is_like and chain.moved_s == example.chain.moved_s:
            return Choice(chain, example.operation)
        found = peak(chain)
        if found is None:
            inventory.give_back([device for group in taken for device in group])
            return None
        return Choice(chain, found)

    def at_first(self, role: Role = "any") -> list[Column]:
        forms = self._forms_for(role)
        pure = [each for form in forms for each in self._pure(form, role)]
        chosen = self._best_forms(forms, pure)
        pairs = [
            (slack, forms)
            for first, second in itertools.combinations(chosen, 2)
            for slack, forms in self._pairs(first, second)
        ]
        pairs.sort(key=lambda each: each[0])  # stable: ties stay in the order of forms
        most = max(_MOST_COLUMNS - len(pure), 0)
        mixed = (self.column(_single(forms), role) for _, forms in pairs[:most])
        return [*pure, *(each for each in mixed if each is not None)]

    def priced(self, prices: Sequence[float], stock: Sequence[int]) -> list[Column]:
        """New columns that bring more than the prices of their devices, of what is in stock."""
        offers = list(self._offers(prices, stock))
        if not offers:
            return []
        ranked = sorted(
            Pricing(self.problem, offers, stock).pipelines().items(), key=lambda each: -each[1]
        )
        found = []
        for stages, _ in ranked:
            if (stages, "any") in self._known:
                continue
            column = self.column(stages)
            if column is not None and column.rate_per_s > _price(column, prices) * (1 + _WORTH):
                found.append(column)
            if len(found) == _MOST_PRICED:
                break
        return found

    def _offers(self, prices: Sequence[float], stock: Sequence[int]) -> Iterator[Offer]:
        for form in self.forms:
            uses, variants = self.uses(form), self.variants(form)
            copies = min(stock[each] // count for each, count in uses)
            price = sum(prices[each] * count for each, count in uses)
            for n in range(1, min(_MOST_INSTANCES, copies) + 1):
                yield Offer(form, n, uses, copies // n, price * n, variants)

    def _forms_for(self, role: Role) -> Sequence[Form]:
        if role == "any" or not self._poor:
            return self.forms
        return [
            form
            for form in self.forms
            if not any(self.example(sort).host in self._poor for sort, _ in form.counts)
        ]

    def _made(self, stages: Stages, role: Role) -> Column | None:
        most = 1 if role == "decode" else min(self.problem.spec.num_layers, MOST_STAGES)
        if len(stages) > most:
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
        chain = self._acting(self._chain(stages, taken, self._like), role)
        found = peak(chain)
        return None if found is None else Column(stages, tuple(uses), Choice(chain, found))

    def _acting(self, chain: Chain, role: Role) -> Chain:
        if role != "decode":
            return chain if role == "any" else chain.acting(role)
        devices = [d for each in chain.segments for group in each.groups for d in group.devices]
        size_bytes = kv_bytes(self.problem, devices)
        hosts = {each.host for each in devices}
        return chain.acting(role, self._kv_links.slowest_s(hosts, size_bytes))

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

    def _pure(self, form: Form, role: Role) -> Iterator[Column]:
        fewest = -(-self.problem.spec.num_layers // max(self._room(form), 1))
        for count in range(fewest, fewest + _SPARE_STAGES + 1):
            column = self.column(_single((form,) * count), role)
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

    def _best_forms(self, forms: Sequence[Form], pure: Sequence[Column]) -> list[Form]:
        """Of each sort, those whose own pipelines give most for a device; mixed ones besides."""
        density = dict.fromkeys(forms, 0.0)
        for column in pure:
            form = column.stages[0][0]
            density[form] = max(density[form], column.rate_per_s / column.num_devices)
        best: list[Form] = []
        for sort in range(self.num_sorts):
            own_forms = [each for each in forms if [s for s, _ in each.counts] == [sort]]
            # Those that hold no model by themselves: the largest first.
            own_forms.sort(key=lambda each: (-density[each], -each.num_devices))
            best += own_forms[:_FORMS_OF_A_SORT]
        best += [each for each in forms if len(each.counts) > 1]
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


def _single(forms: Sequence[Form]) -> Stages:
    return tuple((form, 1) for form in forms)


def _price(column: Column, prices: Sequence[float]) -> float:
    return sum(n * each for n, each in zip(column.uses, prices, strict=True))


def _strength(group: Group) -> float:
    return sum(each.bandwidth_bytes_per_s * each.speed for each in group.devices)
