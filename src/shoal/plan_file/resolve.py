"""A plan file together with a model: ranges for every rank, routes, and whether all of it fits.

Knows nothing of YAML, nor of the machine it will run on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

from shoal.core.errors import ConfigError
from shoal.core.model_spec import ModelSpec
from shoal.core.plan import (
    Hop,
    InstancePlan,
    ReplicaPlan,
    Route,
    StagePlan,
    check,
    default_routes,
)
from shoal.core.split import Range, Split, cut, split_by_weights
from shoal.plan_file.drafts import (
    MAX_ROUTES,
    InstanceDraft,
    ReplicaDraft,
    RouteDraft,
    Sizes,
)
from shoal.plan_file.experts import resolve_experts
from shoal.plan_file.fields import Field

FFN_GRANULE = 32
"""FFN columns are cut in groups of so many: those of quantised weights."""


def resolve_replica(draft: ReplicaDraft, spec: ModelSpec) -> ReplicaPlan:
    """What a replica of the file means for a model.

    Raises:
        ConfigError: with file and line: what doesn't fit the model.
    """
    layers = _even_layers(draft, spec)
    stages = tuple(
        StagePlan(instances=tuple(_instance(each, spec, layers[index]) for each in stage.instances))
        for index, stage in enumerate(draft.stages)
    )
    if draft.routes is None:
        routes = _all_routes(draft, stages)
    else:
        routes = tuple(_route(each, stages) for each in draft.routes)
    for index, route in enumerate(routes):
        place = draft.stages[-1].place if draft.routes is None else draft.routes[index].place
        with _at(place):
            check(ReplicaPlan(stages=stages, routes=(route,)), spec)
    return ReplicaPlan(stages=stages, routes=routes, role=draft.role)


@contextmanager
def _at(place: Field) -> Iterator[None]:
    """Errors of the plan itself, with the line they come from."""
    try:
        yield
    except ConfigError as error:
        raise place.error(str(error)) from error


def _even_layers(draft: ReplicaDraft, spec: ModelSpec) -> tuple[Range, ...]:
    """Layers for stages that name none; either all of them do, or none."""
    without = [
        stage for stage in draft.stages if any(each.layers is None for each in stage.instances)
    ]
    any_named = any(each.layers is not None for stage in draft.stages for each in stage.instances)
    if without and any_named:
        raise without[0].place.error(
            "this stage names no layers, others do; add them (layers: 4-21), or remove them "
            "everywhere to share the layers out evenly"
        )
    return cut(spec.num_layers, [1.0] * len(draft.stages))


def _instance(draft: InstanceDraft, spec: ModelSpec, layers: Range) -> InstancePlan:
    layers = layers if draft.layers is None else draft.layers  # which may be an empty range
    if layers.stop > spec.num_layers:
        raise draft.place.error(
            f"layers are {layers.start}-{layers.stop}; this model has 0-{spec.num_layers}: "
            f"end at {spec.num_layers} or before"
        )
    return InstancePlan(
        layers=layers,
        ranks=draft.ranks,
        split=_split(draft, spec, layers),
        kv_cache_memory_bytes=draft.kv_cache_memory_bytes,
        weights_memory_bytes=draft.weights_memory_bytes,
        quantize=draft.quantize,
        dtype=draft.dtype,
    )


def _split(draft: InstanceDraft, spec: ModelSpec, layers: Range) -> Split:
    num_ranks = len(draft.ranks)
    for name, sizes in draft.sizes.items():
        if len(sizes.values) != num_ranks:
            raise sizes.place.error(
                f"{name} has {len(sizes.values)} numbers, but {num_ranks} devices are named; give "
                "one for each"
            )
    weights = draft.sizes["weights"].values if "weights" in draft.sizes else (1.0,) * num_ranks
    by_weight = split_by_weights(spec, weights, granule=FFN_GRANULE)
    return Split(
        heads=_ranges(draft.sizes.get("heads"), by_weight.heads, spec.num_heads, "query heads"),
        ffn=_ranges(
            draft.sizes.get("ffn"), by_weight.ffn, spec.ffn_size, "FFN columns", FFN_GRANULE
        ),
        vocab=_ranges(draft.sizes.get("vocab"), by_weight.vocab, spec.vocab_size, "token ids"),
        experts=resolve_experts(draft.experts, by_weight.experts, num_ranks, spec, layers),
        kv=draft.kv,
    )


def _ranges(
    sizes: Sizes | None, default: tuple[Range, ...], total: int, what: str, granule: int = 1
) -> tuple[Range, ...]:
    if sizes is None:
        return default
    if sum(sizes.values) != total:
        raise sizes.place.error(
            f"{sizes.place.name} are {_shown(sizes)}, {sum(sizes.values):.0f} in all; this model "
            f"has {total} {what}: make them add up to that"
        )
    ranges: list[Range] = []
    start = 0
    for rank, value in enumerate(sizes.values):
        stop = start + int(value)
        if stop % granule and stop != total:
            nearest = round(stop / granule) * granule - start
            raise sizes.place.error(
                f"{sizes.place.name} are {_shown(sizes)}; a rank must end at a multiple of "
                f"{granule} {what}: give rank {rank} {max(nearest, 0)}"
            )
        ranges.append(Range(start, stop))
        start = stop
    return tuple(ranges)


def _shown(sizes: Sizes) -> str:
    return "[" + ", ".join(f"{value:.0f}" for value in sizes.values) + "]"


def _all_routes(draft: ReplicaDraft, stages: tuple[StagePlan, ...]) -> tuple[Route, ...]:
    num_routes = math.prod(len(stage.instances) for stage in stages)
    if num_routes > MAX_ROUTES:
        raise draft.place.error(
            f"these stages have {num_routes} chains of instances; {MAX_ROUTES} at most: name "
            "those you want under routes"
        )
    for num_stages, stage in enumerate(draft.stages, start=1):
        with _at(stage.place):
            default_routes(stages[:num_stages])
    return default_routes(stages)


def _route(draft: RouteDraft, stages: tuple[StagePlan, ...]) -> Route:
    """A route as named; hops without layers run all of theirs that are left."""
    instances = [instance for stage in stages for instance in stage.instances]
    hops: list[Hop] = []
    done = 0
    for hop in draft.hops:
        if hop.instance >= len(instances):
            raise hop.place.error(
                f"a route names instance {hop.instance}; the plan has 0-{len(instances) - 1}, "
                "counted over all stages"
            )
        own = instances[hop.instance].layers
        if hop.layers is None and not own.start <= done <= own.stop:
            raise hop.place.error(
                f"instance {hop.instance} holds layers {own.start}-{own.stop}, and those before "
                f"it end at {done}; name another instance there"
            )
        layers = Range(done, own.stop) if hop.layers is None else hop.layers
        hops.append(Hop(hop.instance, layers))
        done = layers.stop
    return tuple(hops)
