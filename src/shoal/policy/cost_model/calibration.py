"""Constants from Steps that were timed: of a device by itself, or of a running replica's.

    alone       Steps of random weights (`worker/calibrate.py`): all constants of the device
    running     Steps of each instance as it served them; what lies between two Steps is in them,
                and what its neighbours on the machine took from it

Of many Steps that are alike the mean counts. Ranks of an instance wait for each other, so its
times say by which factors its devices' constants are off, not which device is to blame. Knows
nothing of where times come from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import lru_cache

from shoal.core.cluster import Cluster, Constants, Device, Host
from shoal.core.errors import ConfigError
from shoal.core.model_spec import ModelSpec
from shoal.core.plan import ReplicaPlan
from shoal.core.split import Range, whole
from shoal.core.step_times import InstanceStep, StepTaken
from shoal.policy.cost_model.constants import constants_for
from shoal.policy.cost_model.fit import NUM_ALL, Observation, fit
from shoal.policy.cost_model.loads import StepLoad, windows_of
from shoal.policy.cost_model.numbers import Numbers
from shoal.policy.cost_model.times import InstanceCost, ReplicaCost, StepTime, part_of

_MOST_ALIKE = 64
"""More Steps of a kind say no more."""

_MOST_KEPT = 64
"""The same constants are asked for once for each Step."""

_USUAL_STEP_S, _USUAL_ROW_S, _USUAL_EXPOSED = 1e-4, 1e-5, 0.5

_GRANULE = 64
"""Columns of half a layer are a whole number of these, so that every precision packs them."""

Predict = Callable[[Range, StepLoad, Constants], StepTime]
"""Of these layers."""


def narrow(spec: ModelSpec) -> ModelSpec:
    """The same with half as wide layers, as a rank of two has them.

    In Steps of one width, what a layer reads can't be told from what it costs besides.
    """
    num_kv_heads = max(spec.num_kv_heads // 2, 1)
    ffn_size = max(spec.ffn_size // 2 // _GRANULE * _GRANULE, _GRANULE)
    experts = spec.experts
    if experts is not None and experts.num_groups == 1:
        experts = replace(experts, num_experts=max(experts.num_experts // 2, experts.num_active))
    return replace(
        spec,
        num_heads=num_kv_heads * (spec.num_heads // spec.num_kv_heads),
        num_kv_heads=num_kv_heads,
        ffn_size=min(ffn_size, spec.ffn_size),
        experts=experts,
    )


def device_constants(
    device: Device,
    numbers: Numbers,
    runs: Iterable[tuple[ModelSpec, Iterable[StepTaken]]],
    *,
    source: str,
    engine: str = "shoal",
) -> Constants:
    """What Steps of whole layers on one device say of it.

    Args:
        runs: of what ran, and its Steps; better of more than one width.

    Raises:
        ConfigError: fewer different Steps than constants.
    """
    cluster = Cluster(hosts=(Host(name=device.host),), devices=(device,))
    observations = [
        each
        for spec, taken in runs
        for each in _of_device(spec, device, cluster, numbers, taken, engine)
    ]
    start = _start(cluster, device, engine, numbers, source)
    return fit(observations, start, every=True)


def _of_device(
    spec: ModelSpec,
    device: Device,
    cluster: Cluster,
    numbers: Numbers,
    taken: Iterable[StepTaken],
    engine: str,
) -> list[Observation]:

    @lru_cache(_MOST_KEPT)
    def cost(layers: Range) -> InstanceCost:
        shard = part_of(whole(spec), layers)
        return InstanceCost(spec, [shard], [device], cluster, numbers, engine=engine)

    @lru_cache(_MOST_KEPT)
    def under(layers: Range, constants: Constants) -> InstanceCost:
        return cost(layers).under(constants)

    def predict(layers: Range, load: StepLoad, constants: Constants) -> StepTime:
        return under(layers, constants).time(load)

    return _observations(spec, taken, predict)


def running_constants(
    spec: ModelSpec,
    plan: ReplicaPlan,
    cluster: Cluster,
    numbers: Numbers,
    steps: Sequence[InstanceStep],
    *,
    source: str,
    engine: str = "shoal",
) -> tuple[Constants, ...]:
    """Of the devices of every instance that has served enough different Steps.

    Args:
        numbers: where the plan says nothing else.
    """
    cost = ReplicaCost(spec, plan, cluster, numbers, engine=engine)
    found: list[Constants] = []
    for instance, devices in enumerate(cost.devices):
        hops = {
            hop.layers: each
            for route, named in enumerate(plan.routes)
            for hop, each in zip(named, cost.hops(route), strict=True)
            if hop.instance == instance
        }
        taken = [each.taken for each in steps if each.instance == instance]
        own_numbers = cost.numbers[instance]
        own = [_start(cluster, device, engine, own_numbers, source) for device in devices]
        found += _instance_constants(spec, hops, own, taken)
    return tuple(found)


def _instance_constants(
    spec: ModelSpec,
    hops: dict[Range, InstanceCost],
    own: Sequence[Constants],
    taken: Sequence[StepTaken],
) -> list[Constants]:
    """Each device's own, with what the first one's have changed by; none: too few Steps."""

    @lru_cache(_MOST_KEPT)
    def under(layers: Range, constants: Constants) -> InstanceCost:
        return hops[layers].under(*_changed(own, constants))

    def predict(layers: Range, load: StepLoad, constants: Constants) -> StepTime:
        return under(layers, constants).time(load)

    known = (each for each in taken if each.layers in hops)
    observations = _observations(spec, known, predict)
    if len(observations) < NUM_ALL:
        return []
    try:
        fitted = fit(observations, own[0], every=True)
    except ConfigError:
        return []
    return [replace(each, error=fitted.error) for each in _changed(own, fitted)]


def _changed(own: Sequence[Constants], first: Constants) -> list[Constants]:
    """All by the factors that took the first one's to `first`."""
    was = own[0]
    assert was.attention and first.attention, "they are complete"
    return [
        replace(
            each,
            eta=each.eta * first.eta / was.eta,
            layer_s=each.layer_s * first.layer_s / was.layer_s,
            mfu=each.mfu * first.mfu / was.mfu,
            step_s=each.step_s * first.step_s / was.step_s,
            row_s=each.row_s * first.row_s / was.row_s,
            attention=(each.attention or was.attention) * first.attention / was.attention,
            exposed=min(each.exposed * first.exposed / was.exposed, 1.0),
        )
        for each in own
    ]


def _start(
    cluster: Cluster, device: Device, engine: str, numbers: Numbers, source: str
) -> Constants:
    """The device's constants so far, with all that are fitted."""
    known = constants_for(cluster, device, engine, numbers.precision)
    attention = known.attention
    if attention is None:
        ratio = device.flops_per_s(numbers.products) / device.flops_per_s(numbers.activations)
        attention = known.mfu * ratio
    return replace(
        known,
        kind=device.kind,
        engine=engine,
        precision=numbers.precision,
        bandwidth_bytes_per_s=device.bandwidth_bytes_per_s,
        flops_per_s=device.flops_per_s("bfloat16"),
        device=device.name,
        source=source,
        step_s=known.step_s or _USUAL_STEP_S,
        row_s=known.row_s or _USUAL_ROW_S,
        attention=attention,
        exposed=known.exposed or _USUAL_EXPOSED,
    )


def _observations(
    spec: ModelSpec, taken: Iterable[StepTaken], predict: Predict
) -> list[Observation]:
    """Of Steps that are alike their mean: a load's latency is the sum of its Steps."""
    windows = windows_of(spec)
    alike: dict[tuple[Range, int, int, int], list[tuple[float, StepLoad]]] = {}
    for each in taken:
        load = StepLoad.of(each.rows, windows)
        # Of about the same context: within an eighth.
        key = each.layers, load.num_tokens, load.num_sampled, round(6 * _log2(load.kv_tokens[0]))
        alike.setdefault(key, []).append((each.seconds, load))
    found = []
    for (layers, *_), steps in alike.items():
        seconds = [each for each, _ in steps]
        load = steps[len(steps) // 2][1]

        def at(constants: Constants, layers: Range = layers, load: StepLoad = load) -> StepTime:
            return predict(layers, load, constants)

        weight = float(min(len(steps), _MOST_ALIKE))
        found.append(Observation(sum(seconds) / len(seconds), at, weight))
    return found


def _log2(count: int) -> float:
    return math.log2(max(count, 1))
