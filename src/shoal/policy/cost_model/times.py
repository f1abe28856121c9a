"""Seconds of a Step: on one instance, and on the stages of a replica.

    instance   sum over kernels of max(bytes / (eta x bandwidth), flops / (mfu x flops/s))
               + exposed x the shorter of the two
               + layers x c + what a Step and a row that samples cost, of the slowest rank
               + (2 x layers + 1) all-reduces      of hidden states, tokens x hidden x bytes
    hop        hidden states from one stage to the next

The terms and what validates them are in docs/cost_model.md. A single request waits for the sum of
stages and hops; many in flight are held up by the slowest stage only. Knows nothing of queues.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace

from shoal.core.cluster import Cluster, Constants, Device
from shoal.core.errors import ConfigError
from shoal.core.model_spec import ModelSpec
from shoal.core.plan import Hop, InstancePlan, ReplicaPlan
from shoal.core.split import Range, Shard
from shoal.policy.cost_model.constants import constants_for
from shoal.policy.cost_model.layers import MeasuredLayers, measured_layers
from shoal.policy.cost_model.loads import StepLoad
from shoal.policy.cost_model.memory import kv_token_bytes, weight_bytes
from shoal.policy.cost_model.numbers import Numbers, computed_in
from shoal.policy.cost_model.transport import GroupLinks, message_s
from shoal.policy.cost_model.work import ShardWork, shard_work

_DRAW_BYTES = 64
"""What ranks tell each other to draw one token (model/vocab_parallel.py), about."""


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds, by what they are spent on; they add up.

    Attributes:
        memory_s, compute_s: in kernels that wait for memory, and for arithmetic.
        overhead_s: whatever a layer computes.
        communication_s: between ranks, inside the stage.
    """

    memory_s: float = 0.0
    compute_s: float = 0.0
    overhead_s: float = 0.0
    communication_s: float = 0.0

    @property
    def total_s(self) -> float:
        return self.memory_s + self.compute_s + self.overhead_s + self.communication_s

    def __add__(self, other: StepTime) -> StepTime:
        return StepTime(
            self.memory_s + other.memory_s,
            self.compute_s + other.compute_s,
            self.overhead_s + other.overhead_s,
            self.communication_s + other.communication_s,
        )

    def times(self, factor: float) -> StepTime:
        return StepTime(
            self.memory_s * factor,
            self.compute_s * factor,
            self.overhead_s * factor,
            self.communication_s * factor,
        )


@dataclass(frozen=True, slots=True)
class Rates:
    """What a device gives a shard's kernels; attention's products are made in activations."""

    bytes_per_s: float
    flops_per_s: float
    layer_s: float
    attention_flops_per_s: float
    step_s: float
    row_s: float
    exposed: float

    @classmethod
    def of(cls, device: Device, constants: Constants, numbers: Numbers) -> Rates:
        speed, flops_per_s = device.speed, device.flops_per_s(numbers.products)
        attention = flops_per_s * constants.mfu
        if constants.attention is not None:
            attention = device.flops_per_s(numbers.activations) * constants.attention
        return cls(
            device.bandwidth_bytes_per_s * constants.eta * speed,
            flops_per_s * constants.mfu * speed,
            constants.layer_s / speed,
            attention * speed,
            constants.step_s / speed,
            constants.row_s / speed,
            constants.exposed,
        )


def rank_time(work: ShardWork, rates: Rates, load: StepLoad) -> StepTime:
    """Of one rank by itself."""
    memory = compute = 0.0
    for part in work.parts(load):
        flops_per_s = rates.attention_flops_per_s if part.is_attention else rates.flops_per_s
        read, multiply = part.size_bytes / rates.bytes_per_s, part.flops / flops_per_s
        if read >= multiply:
            memory += read
            compute += rates.exposed * multiply
        else:
            compute += multiply
            memory += rates.exposed * read
    overhead = work.num_layers * rates.layer_s + rates.step_s
    if work.head_bytes:
        overhead += load.num_sampled * rates.row_s
    return StepTime(memory, compute, overhead, 0.0)


class InstanceCost:
    """One tensor-parallel group: its shards, on their devices.

    Args:
        shards, devices: in the order of ranks.
        engine: whose constants count: "shoal", "vllm", ...

    Raises:
        ConfigError: not one device for each shard.
    """

    def __init__(
        self,
        spec: ModelSpec,
        shards: Sequence[Shard],
        devices: Sequence[Device],
        cluster: Cluster,
        numbers: Numbers,
        *,
        engine: str = "shoal",
    ) -> None:
        if len(shards) != len(devices) or not shards:
            raise ConfigError(
                f"{len(shards)} shards are to run on {len(devices)} devices; name one for each"
            )
        self.spec, self.shards, self.devices = spec, tuple(shards), tuple(devices)
        self.numbers = numbers
        streams = [devices[rank] for rank in shards[0].streams]
        self._sums = GroupLinks(cluster, streams, engine=engine)
        self._exchange = GroupLinks(cluster, devices, engine=engine)
        self.work = tuple(shard_work(spec, shard, numbers) for shard in shards)
        self._measured = _measured(cluster, spec, shards, devices, numbers)
        if self._measured is not None:
            self.work = (shard_work(spec, _without_layers(shards[0]), numbers),)
        self._settle(
            [constants_for(cluster, device, engine, numbers.precision) for device in devices]
        )

    def under(self, *constants: Constants) -> InstanceCost:
        """The same under other constants: of each device, or of all of them."""
        other = copy(self)
        other._settle(constants * len(self.devices) if len(constants) == 1 else constants)
        return other

    @property
    def error(self) -> float:
        """Relative, of its times: that of its least sure constants."""
        if self._measured is not None:
            return self._measured.error
        return max(each.error for each in self.constants)

    @property
    def exposed(self) -> tuple[float, ...]:
        """Of each rank's constants."""
        return tuple(each.exposed for each in self._rates)

    @property
    def step_s(self) -> float:
        """What any Step takes, however few layers it goes through."""
        return max(each.step_s for each in self._rates)

    def rank_times(self, load: StepLoad) -> tuple[StepTime, ...]:
        """Of each rank by itself, without communication."""
        pairs = zip(self.work, self._rates, strict=True)
        found = tuple(rank_time(work, rates, load) for work, rates in pairs)
        if self._measured is None:
            return found
        return (found[0] + self._layers_time(self._measured, load),)

    def time(self, load: StepLoad) -> StepTime:
        """Of a Step: ranks wait for the slowest at every sum."""
        each = (rank_time(work, rates, load) for work, rates in self._different)
        slowest = max(each, key=_total)
        if self._measured is not None:
            slowest = slowest + self._layers_time(self._measured, load)
        return replace(slowest, communication_s=self.communication_s(load))

    def _layers_time(self, measured: MeasuredLayers, load: StepLoad) -> StepTime:
        """What was not measured is in `work`."""
        num_layers = len(self.shards[0].layers)
        decode_s, prompt_s = measured.seconds(load)
        return StepTime(memory_s=num_layers * decode_s, compute_s=num_layers * prompt_s)

    def communication_s(self, load: StepLoad) -> float:
        """Sums among ranks that keep hidden states, and exchanges with the others."""
        if len(self.shards) == 1 or not load.num_tokens:
            return 0.0
        shard, spec = self.shards[0], self.spec
        row = spec.hidden_size * self.numbers.activation_bytes
        sums = 2 * len(shard.layers) + shard.has_embedding
        total = sums * self._sums.all_reduce_s(load.num_tokens * row)
        if shard.has_token_ranges:
            total += len(shard.layers) * self._token_ranges_s(load.num_tokens)
        if shard.has_head and load.num_sampled:
            total += self._sums.all_reduce_s(load.num_sampled * _DRAW_BYTES)
        return total + self._exchange_s(load.num_tokens * row)

    def weight_bytes(self) -> tuple[int, ...]:
        """Of each rank."""
        return tuple(weight_bytes(self.spec, shard, self.numbers) for shard in self.shards)

    def kv_token_bytes(self) -> tuple[int, ...]:
        """Of each rank, for one token."""
        return tuple(kv_token_bytes(self.spec, shard, self.numbers) for shard in self.shards)

    def _settle(self, constants: Sequence[Constants]) -> None:
        self.constants = tuple(constants)
        self._rates = tuple(
            Rates.of(device, each, self.numbers)
            for device, each in zip(self.devices, constants, strict=True)
        )
        # Ranks that are alike take as long.
        self._different = tuple(dict.fromkeys(zip(self.work, self._rates, strict=True)))

    def _token_ranges_s(self, num_tokens: int) -> float:
        """Queries, keys and values to all ranks, then parts of attention: sums both."""
        spec = self.spec
        qkv = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
        parts = spec.num_heads * (spec.value_dim + 1) * 4
        size = self.numbers.activation_bytes
        return self._sums.all_reduce_s(num_tokens * qkv * size) + self._sums.all_reduce_s(
            num_tokens * parts
        )

    def _exchange_s(self, hidden_bytes: float) -> float:
        """Dispatch to ranks with experts only, and back."""
        guests = [
            work.expert_share
            for shard, work in zip(self.shards, self.work, strict=True)
            if not shard.has_stream
        ]
        if not guests or self.spec.experts is None:
            return 0.0
        layers = range(self.shards[0].layers.start, self.shards[0].layers.stop)
        num_mixed = sum(self.spec.layers[layer].has_experts for layer in layers)
        if not num_mixed:
            return 0.0
        most = max(guests) / num_mixed * self.spec.experts.num_active * hidden_bytes
        return 2 * num_mixed * self._exchange.all_to_all_s(most)


class ReplicaCost:
    """A plan's replica on a cluster.

    Args:
        numbers: where an instance says nothing else.
        engine: whose constants count.

    Raises:
        ConfigError: devices that the cluster does not have.
    """

    def __init__(
        self,
        spec: ModelSpec,
        plan: ReplicaPlan,
        cluster: Cluster,
        numbers: Numbers,
        *,
        engine: str = "shoal",
    ) -> None:
        self.spec, self.plan, self._cluster = spec, plan, cluster
        self.devices = tuple(
            tuple(cluster.at(rank.host, rank.device) for rank in instance.ranks)
            for instance in plan.instances
        )
        self.numbers = tuple(numbers_of(instance, numbers) for instance in plan.instances)
        parts: dict[Hop, InstanceCost] = {}
        for hop in dict.fromkeys(hop for route in plan.routes for hop in route):
            parts[hop] = InstanceCost(
                spec,
                [part_of(shard, hop.layers) for shard in plan.shards(hop.instance)],
                self.devices[hop.instance],
                cluster,
                self.numbers[hop.instance],
                engine=engine,
            )
        self._parts: Mapping[Hop, InstanceCost] = parts

    def under(self, constants: Constants) -> ReplicaCost:
        """The same under other constants, on every device: for a fit."""
        other = copy(self)
        other._parts = {hop: each.under(constants) for hop, each in self._parts.items()}
        return other

    @property
    def error(self) -> float:
        return max(each.error for each in self._parts.values())

    def hops(self, route: int = 0) -> tuple[InstanceCost, ...]:
        """The stages of a route."""
        return tuple(self._parts[hop] for hop in self.plan.routes[route])

    def step_times(self, load: StepLoad, route: int = 0) -> tuple[StepTime, ...]:
        """Of each stage of a route."""
        return tuple(each.time(load) for each in self.hops(route))

    def hop_times(self, num_tokens: int, route: int = 0) -> tuple[float, ...]:
        """Seconds of hidden states from each stage of a route to the next."""
        stages = self.hops(route)
        return tuple(
            max(
                message_s(
                    self._cluster.link(sender.devices[0].name, device.name),
                    num_tokens * self.spec.hidden_size * sender.numbers.activation_bytes,
                )
                for device in receiver.devices
            )
            for sender, receiver in itertools.pairwise(stages)
        )

    def latency_s(self, load: StepLoad, route: int = 0) -> float:
        """Of a Step by itself: all stages and hops."""
        steps = sum(each.total_s for each in self.step_times(load, route))
        return steps + sum(self.hop_times(load.num_tokens, route))

    def loading_s(self) -> float:
        """Until all weights are in: ranks of a host share its disk, then each fills its device."""
        by_host: dict[str, int] = {}
        slowest = 0.0
        for number in range(len(self.plan.instances)):
            for shard, device in zip(self.plan.shards(number), self.devices[number], strict=True):
                size = weight_bytes(self.spec, shard, self.numbers[number])
                by_host[device.host] = by_host.get(device.host, 0) + size
                slowest = max(slowest, size / device.host_bytes_per_s)
        disks = (size / self._cluster.host(host).disk_bytes_per_s for host, size in by_host.items())
        return max(slowest, *disks)


def numbers_of(instance: InstancePlan, default: Numbers) -> Numbers:
    """What an instance's `dtype` and `quantize` make of an engine's."""
    numbers = default
    match instance.dtype:
        case "float32" | "bfloat16" | "float16" as floats:
            kv = numbers.kv if numbers.kv in ("int8", "fp8") else floats
            numbers = replace(
                numbers, weights=floats, tables=None, activations=floats, kv=kv, compute=None
            )
    match instance.quantize:
        case "int8" | "int4" | "fp8" as kept:
            compute = computed_in(kept, packed=numbers.packed)
            return replace(numbers, weights=kept, tables=None, compute=compute)
        case "none":
            return replace(numbers, weights=numbers.activations, tables=None, compute=None)
    return numbers


def _measured(
    cluster: Cluster,
    spec: ModelSpec,
    shards: Sequence[Shard],
    devices: Sequence[Device],
    numbers: Numbers,
) -> MeasuredLayers | None:
    """Of one rank that has whole layers; times of parts of layers were not measured."""
    if len(shards) > 1 or not len(shards[0].layers):
        return None
    return measured_layers(cluster, spec, devices[0], numbers)


def _without_layers(shard: Shard) -> Shard:
    """Embedding and head alone."""
    end = shard.layers.stop
    return replace(shard, layers=Range(end, end), experts=(), dealings=())


def part_of(shard: Shard, layers: Range) -> Shard:
    """Some of a shard's layers."""
    if layers == shard.layers:
        return shard
    first, last = layers.start - shard.layers.start, layers.stop - shard.layers.start
    return replace(
        shard,
        layers=layers,
        experts=shard.experts[first:last],
        dealings=shard.dealings[first:last],
    )


def _total(time: StepTime) -> float:
    return time.total_s
