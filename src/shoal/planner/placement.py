"""A replica from layers that were given to single devices, overlapping as they may.

    A  0-4 ──── B  4-9 ──┬── D  9-12        a route is a chain of parts: each device that it comes
      └── C  3-7 (4-7) ──┴── B (7-9) ...    to runs what is left of its layers, to their end

Those chains are taken that carry most together, by a linear program over what devices can do; of
equal ones the shorter. Of all the chains there are, it gets to know those that its prices ask for:
the cheapest through each device, by dynamic programming over layers. Knows nothing of how layers
were given.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

from shoal.core.cluster import Device
from shoal.core.errors import ConfigError
from shoal.core.plan import Hop, InstancePlan, RankPlan, ReplicaPlan, Route, StagePlan, check
from shoal.core.split import Range
from shoal.planner.profiles import Group, Problem, Variant
from shoal.planner.program import pack

_LEAST_SHARE = 0.05
"""Of all that is carried, for a route to be worth having."""
_HOP_COST = 1e-3
"""Of a chain's worth, for each hop."""
_WORTH = 1e-7
"""Of a chain, for which it is taken in."""
_BATCH = 16
"""Sequences in a Step, at which devices are compared."""


def placed_replica(parts: Sequence[tuple[Device, Range]], problem: Problem) -> ReplicaPlan:
    """
    Raises:
        ConfigError: layers that no chain of devices covers, or that a device has no kernels for.
    """
    num_layers = problem.spec.num_layers
    stages = _staged(parts, num_layers)
    placed = [part for stage in stages for part in stage]
    variants = [_variant(device, problem) for device, _ in placed]
    rates = [1 / _layer_s(each, problem) for each in variants]
    routes = routes_of([layers for _, layers in placed], rates, num_layers)
    names_host = len(problem.cluster.hosts) > 1
    numbered = iter(zip(placed, variants, strict=True))
    replica = ReplicaPlan(
        stages=tuple(
            StagePlan(
                instances=tuple(_instance(*next(numbered), names_host=names_host) for _ in stage)
            )
            for stage in stages
        ),
        routes=tuple(routes),
    )
    check(replica, problem.spec)
    return replica


def routes_of(ranges: Sequence[Range], rates: Sequence[float], num_layers: int) -> list[Route]:
    """Chains through all layers that together carry most, the widest first. Few, as Steps are made
    for each: narrow ones only if an instance of theirs has none else.

    Args:
        rates: layers per second of each instance.

    Raises:
        ConfigError: there is none.
    """
    paths = Paths(ranges, num_layers)
    chains = list(dict.fromkeys(paths.through_each([0.0] * len(ranges))))
    while True:
        uses = [_layers_on(chain, len(ranges)) for chain in chains]
        packing = pack([_worth(each) for each in chains], uses, rates)
        known = set(chains)
        better = [
            chain
            for chain in dict.fromkeys(paths.through_each(packing.prices))
            if chain not in known and _gain(chain, packing.prices) > _WORTH
        ]
        if not better:
            break
        chains += better
    order = sorted(range(len(chains)), key=lambda index: -packing.counts[index])
    least = _LEAST_SHARE * sum(packing.counts)
    routes = [chains[index] for index in order if packing.counts[index] > least]
    rest = [chains[index] for index in order if 0 < packing.counts[index] <= least]
    used = {hop.instance for route in routes for hop in route}
    for route in rest:
        if not used.issuperset(hop.instance for hop in route):
            routes.append(route)
            used |= {hop.instance for hop in route}
    return routes


class Paths:
    """Chains of instances from the first layer to the last, each as cheap as can be.

    Who has the first layer comes first or not at all.

    Raises:
        ConfigError: there is none.
    """

    def __init__(self, ranges: Sequence[Range], num_layers: int) -> None:
        self._ranges, self._num_layers = ranges, num_layers
        self._starts = sorted({0, *(each.stop for each in ranges)})
        self._from = {start: self._holding(start) for start in self._starts}
        reached = {0}
        for start in self._starts:
            if start in reached:
                reached |= {ranges[number].stop for number in self._from[start]}
        if num_layers not in reached:
            raise ConfigError(self._gap(max(reached)))

    def through_each(self, prices: Sequence[float]) -> Iterator[Route]:
        """The cheapest chain through each instance that any goes through.

        Args:
            prices: of a layer on each instance.
        """
        ahead, behind = self._ahead(prices), self._behind(prices)
        best: dict[int, tuple[float, int]] = {}
        for start in self._starts:
            for number in self._from[start]:
                stop = self._ranges[number].stop
                if start not in ahead or stop not in behind:
                    continue
                cost = ahead[start][0] + prices[number] * (stop - start) + behind[stop][0]
                if number not in best or cost < best[number][0]:
                    best[number] = cost, start
        for number in sorted(best):
            start, stop = best[number][1], self._ranges[number].stop
            before = self._traced_back(ahead, start)
            yield (*before, Hop(number, Range(start, stop)), *self._traced_on(behind, stop))

    def _holding(self, start: int) -> list[int]:
        """Who may go on from a layer."""
        return [
            number
            for number, own in enumerate(self._ranges)
            if own.start <= start < own.stop and (start == 0 or own.start > 0)
        ]

    def _ahead(self, prices: Sequence[float]) -> dict[int, tuple[float, int, int]]:
        """Of each layer that can be come to: the price of those before it, who runs the last of
        them, and from where on."""
        found = {0: (0.0, -1, 0)}
        for start in self._starts:
            for number in self._from[start] if start in found else ():
                stop = self._ranges[number].stop
                cost = found[start][0] + _HOP_COST + prices[number] * (stop - start)
                if stop not in found or cost < found[stop][0]:
                    found[stop] = cost, number, start
        return found

    def _behind(self, prices: Sequence[float]) -> dict[int, tuple[float, int]]:
        """Of each layer from which the last one can be come to: the price, and who goes on."""
        found = {self._num_layers: (0.0, -1)}
        for start in reversed(self._starts):
            for number in self._from[start]:
                stop = self._ranges[number].stop
                if stop not in found:
                    continue
                cost = found[stop][0] + _HOP_COST + prices[number] * (stop - start)
                if start not in found or cost < found[start][0]:
                    found[start] = cost, number
        return found

    def _traced_back(self, ahead: Mapping[int, tuple[float, int, int]], stop: int) -> Route:
        hops: list[Hop] = []
        while stop:
            _, number, start = ahead[stop]
            hops.insert(0, Hop(number, Range(start, stop)))
            stop = start
        return tuple(hops)

    def _traced_on(self, behind: Mapping[int, tuple[float, int]], start: int) -> Route:
        hops: list[Hop] = []
        while start < self._num_layers:
            number = behind[start][1]
            stop = self._ranges[number].stop
            hops.append(Hop(number, Range(start, stop)))
            start = stop
        return tuple(hops)

    def _gap(self, reached: int) -> str:
        whole = f"no chain of devices covers layers 0-{self._num_layers}"
        held = {layer for each in self._ranges for layer in range(each.start, each.stop)}
        missing = [each for each in range(self._num_layers) if each not in held]
        if missing:
            last = next(n for n in itertools.count(missing[0]) if n + 1 not in missing)
            return f"{whole}: nobody has {missing[0]}-{last + 1}; place the layers that are missing"
        return (
            f"{whole}: the furthest ends before layer {reached}, and nobody goes on from there "
            "(whoever has layer 0 comes first or not at all); place the layers from there on"
        )


def _worth(chain: Route) -> float:
    return 1 - _HOP_COST * len(chain)


def _gain(chain: Route, prices: Sequence[float]) -> float:
    """What a chain brings beyond the prices of its layers."""
    return _worth(chain) - sum(prices[hop.instance] * len(hop.layers) for hop in chain)


def _layers_on(chain: Route, num_instances: int) -> tuple[int, ...]:
    used = [0] * num_instances
    for hop in chain:
        used[hop.instance] = len(hop.layers)
    return tuple(used)


def _staged(
    parts: Sequence[tuple[Device, Range]], num_layers: int
) -> list[list[tuple[Device, Range]]]:
    """Parts by where they end: a route only ever goes on to one that ends later."""
    by_end: dict[int, list[tuple[Device, Range]]] = {}
    for device, layers in parts:
        if layers.stop > num_layers:
            raise ConfigError(
                f"{device.name} is given layers {layers.start}-{layers.stop}; this model has "
                f"{num_layers}"
            )
        by_end.setdefault(layers.stop if layers.start else 0, []).append((device, layers))
    return [sorted(by_end[end], key=lambda each: each[1].start) for end in sorted(by_end)]


def _variant(device: Device, problem: Problem) -> Variant:
    variants = Group(problem, [device]).variants
    if not variants:
        precisions = ", ".join(problem.goal.precisions)
        raise ConfigError(f"{device.name} has no kernels for weights in {precisions}")
    return variants[0]


def _layer_s(variant: Variant, problem: Problem) -> float:
    """Of a layer for each request: its prompt, and its part of every Step that decodes."""
    return variant.prompt_layer_s + problem.goal.output_tokens * variant.layer_s(_BATCH) / _BATCH


def _instance(part: tuple[Device, Range], variant: Variant, *, names_host: bool) -> InstancePlan:
    device, layers = part
    kept = variant.numbers.precision
    return InstancePlan(
        layers=layers,
        ranks=(RankPlan(device=device.device, host=device.host if names_host else None),),
        split=variant.split,
        quantize=kept if kept in ("int8", "int4", "fp8") else None,
        dtype=variant.numbers.activations,
    )
