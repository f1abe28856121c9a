"""A replica from layers that were given to single devices, overlapping as they may.

    A  0-4 ──── B  4-9 ──┬── D  9-12        a route is a chain of parts: each device that it comes
      └── C  3-7 (4-7) ──┴── B (7-9) ...    to runs what is left of its layers, to their end

Of all chains those are taken that carry most together, by a linear program over what devices can
do; of equal ones the shorter. Knows nothing of how layers were given.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

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
_MOST_CHAINS = 4096
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
    """Chains through all layers that together carry most, the widest first.

    Args:
        rates: layers per second of each instance.

    Raises:
        ConfigError: there is none.
    """
    chains = list(itertools.islice(_chains(ranges, 0, num_layers), _MOST_CHAINS))
    if not chains:
        raise ConfigError(
            f"no chain of devices covers layers 0-{num_layers}; place the layers that are missing"
        )
    uses = [_layers_on(chain, len(ranges)) for chain in chains]
    values = [1 - _HOP_COST * len(chain) for chain in chains]
    carried = pack(values, uses, rates).counts
    order = sorted(range(len(chains)), key=lambda index: -carried[index])
    least = _LEAST_SHARE * sum(carried)
    return [chains[index] for index in order if carried[index] > least]


def _chains(ranges: Sequence[Range], start: int, num_layers: int) -> Iterator[Route]:
    """Every chain from a layer on; who has the first layer comes first or not at all."""
    if start == num_layers:
        yield ()
        return
    for number, own in enumerate(ranges):
        if own.start <= start < own.stop and (start == 0 or own.start > 0):
            for rest in _chains(ranges, own.stop, num_layers):
                yield (Hop(number, Range(start, own.stop)), *rest)


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
