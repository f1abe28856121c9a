"""The Plan: which devices run which part of a model. Readable, comparable, complete.

    replica   one copy of the model
    stage     a step of its pipeline; its instances stand in for each other
    instance  one tensor-parallel group: a layer range, and a split of it over its ranks
    route     a request's chain of (instance, layer range) through all layers

                 ┌ instance 1: layers 10-20 on cuda:1 ┐
    instance 0 ──┤                                    ├── instance 3: layers 20-30
    layers 0-10  └ instance 2: layers 10-20 on cpu    ┘           two routes

The first stage embeds tokens, the last one makes logits; either may have no layers at all, and a
device may serve several stages. Knows nothing of files, measurement or how a plan is found.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

from shoal.core.errors import ConfigError
from shoal.core.model_spec import ModelSpec
from shoal.core.split import WHOLE_SHARE, Dealing, Range, Shard, Split, shards


@dataclass(frozen=True, slots=True, kw_only=True)
class RankPlan:
    """Where one rank runs.

    Attributes:
        device: "cpu", "cuda" or "cuda:N".
        host: name of a lab's host (a network namespace); None: this one.
        num_threads: of a CPU; None: this machine's, shared out evenly.
        speed: of a lab's device: its measured compute is stretched to this share of itself.
    """

    device: str = "cpu"
    host: str | None = None
    num_threads: int | None = None
    speed: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class InstancePlan:
    """One tensor-parallel group.

    Attributes:
        layers: that it holds; a route may use a part of them.
        kv_cache_memory_bytes: of each rank; None: what it has to spare.
        weights_memory_bytes: of each rank; layers beyond it stay on disk, or in the memory of a
            GPU's host. None: what is free.
        quantize, dtype: None: as the engine's options say.
    """

    layers: Range
    ranks: tuple[RankPlan, ...]
    split: Split
    kv_cache_memory_bytes: int | None = None
    weights_memory_bytes: int | None = None
    quantize: str | None = None
    dtype: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePlan:
    instances: tuple[InstancePlan, ...]


@dataclass(frozen=True, slots=True)
class Hop:
    """A part of a route: some layers of an instance (an index into `ReplicaPlan.instances`)."""

    instance: int
    layers: Range


Route = tuple[Hop, ...]


Role = Literal["any", "prefill", "decode"]
"""What a replica is for: all of a request, its start (to the first token), or the rest of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaPlan:
    """One copy of the model.

    Raises:
        ConfigError: routes that leave layers out, or name what is not there.
    """

    stages: tuple[StagePlan, ...]
    routes: tuple[Route, ...]
    role: Role = "any"

    @property
    def instances(self) -> tuple[InstancePlan, ...]:
        """Of all stages, in order."""
        return tuple(instance for stage in self.stages for instance in stage.instances)

    def stage_of(self, instance: int) -> int:
        """The stage that an instance belongs to."""
        first = 0
        for index, stage in enumerate(self.stages):
            first += len(stage.instances)
            if instance < first:
                return index
        raise ConfigError(f"there is no instance {instance}; the plan has {first}")

    def worker_name(self, instance: int, rank: int) -> str:
        """Of a worker, unique in its replica: for messages, logs and labs."""
        return f"s{self.stage_of(instance)}.i{instance}.r{rank}"

    def worker_names(self, instance: int) -> tuple[str, ...]:
        """Of an instance's ranks."""
        num_ranks = len(self.instances[instance].ranks)
        return tuple(self.worker_name(instance, rank) for rank in range(num_ranks))

    def shards(self, instance: int) -> tuple[Shard, ...]:
        """What each rank of an instance holds."""
        plan, stage = self.instances[instance], self.stage_of(instance)
        return shards(
            plan.split,
            plan.layers,
            has_embedding=stage == 0,
            has_head=stage == len(self.stages) - 1,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What `serve` runs.

    Attributes:
        model: as it is named on the command line; None: any.
        max_num_seqs: requests that each replica takes at once; None: as the engine's options say.
    """

    replicas: tuple[ReplicaPlan, ...]
    model: str | None = None
    max_num_seqs: int | None = None


def default_routes(stages: tuple[StagePlan, ...]) -> tuple[Route, ...]:
    """Every chain of instances; where two overlap, the earlier one runs all of its layers.

    Raises:
        ConfigError: neighbours that leave layers out between them.
    """
    chains: list[tuple[int, ...]] = [()]
    first = 0
    for stage in stages:
        numbers = range(first, first + len(stage.instances))
        chains = [(*chain, number) for chain in chains for number in numbers]
        first += len(stage.instances)
    instances = [instance for stage in stages for instance in stage.instances]
    return tuple(_route(chain, instances) for chain in chains)


def _route(chain: tuple[int, ...], instances: list[InstancePlan]) -> Route:
    hops: list[Hop] = []
    done = 0
    for number in chain:
        layers = instances[number].layers
        if layers.start > done or layers.stop < done:
            raise ConfigError(
                f"instance {number} holds layers {layers.start}-{layers.stop}, and those before "
                f"it end at {done}: make it start at {done} or earlier, and not end before"
            )
        hops.append(Hop(number, Range(done, layers.stop)))
        done = layers.stop
    return tuple(hops)


def check(replica: ReplicaPlan, spec: ModelSpec) -> None:
    """Whether a replica's splits and routes cover the model, each part once.

    Raises:
        ConfigError: what does not, and what it should be.
    """
    instances = replica.instances
    for number, instance in enumerate(instances):
        where = f"instance {number}"
        if not instance.ranks:
            raise ConfigError(f"{where} has no ranks; name at least one device")
        if instance.layers.stop > spec.num_layers:
            raise ConfigError(
                f"{where} holds layers {instance.layers.start}-{instance.layers.stop}; this model "
                f"has layers 0-{spec.num_layers}"
            )
        totals = (("heads", spec.num_heads), ("ffn", spec.ffn_size), ("vocab", spec.vocab_size))
        for name, total in totals:
            _check_cover(f"{where}: {name}", getattr(instance.split, name), instance.ranks, total)
        _check_experts(where, instance, spec)
    if not replica.routes:
        raise ConfigError("a replica has no route; leave routes out, or name at least one")
    for number, route in enumerate(replica.routes):
        _check_route(f"route {number}", route, replica, spec.num_layers)


def _check_cover(
    where: str, ranges: tuple[Range, ...], ranks: tuple[RankPlan, ...], total: int
) -> None:
    if len(ranges) != len(ranks):
        raise ConfigError(
            f"{where} are split over {len(ranges)} ranks, but {len(ranks)} devices are named; "
            "give one range for each"
        )
    done = 0
    for rank, each in enumerate(ranges):
        if each.start != done:
            raise ConfigError(
                f"{where} of rank {rank} start at {each.start}; the ranks before it end at {done}: "
                f"make it start there"
            )
        done = each.stop
    if done != total:
        raise ConfigError(
            f"{where} of all ranks end at {done}; this model has {total}: make the last one end "
            "there"
        )


def _check_experts(where: str, instance: InstancePlan, spec: ModelSpec) -> None:
    dealings, layers = instance.split.experts, instance.layers
    if spec.experts is None:
        if dealings:
            raise ConfigError(f"{where} deals experts, but this model has none; leave them out")
        return
    if 0 not in instance.split.streams:
        raise ConfigError(
            f"{where}: rank 0 has experts only, but it is rank 0 that gives results; name a device "
            "that has heads first"
        )
    if len(dealings) not in (1, len(layers)):
        raise ConfigError(
            f"{where} has {len(dealings)} dealings of experts for {len(layers)} layers; give one "
            "for all, or one for each"
        )
    for local, dealing in enumerate(dealings):
        number = layers.start + local
        if len(dealings) == 1 or spec.layers[number].has_experts:
            _check_dealing(f"{where}, layer {number}", dealing, instance, spec.experts.num_experts)


def _check_dealing(where: str, dealing: Dealing, instance: InstancePlan, num_experts: int) -> None:
    if len(dealing) != len(instance.ranks):
        raise ConfigError(
            f"{where}: experts are dealt to {len(dealing)} ranks, but {len(instance.ranks)} "
            "devices are named; give a list for each, which may be empty"
        )
    done = [0] * num_experts
    for share in (share for rank in dealing for share in rank):  # in the order of ranks
        if share.expert >= num_experts:
            raise ConfigError(f"{where}: there is no expert {share.expert}; it has {num_experts}")
        if share.start != done[share.expert] or share.stop <= share.start:
            raise ConfigError(
                f"{where}: a share of expert {share.expert} goes from {share.start} to "
                f"{share.stop}; those before it end at {done[share.expert]}: make it start there"
            )
        done[share.expert] = share.stop
    for expert, stop in enumerate(done):
        if stop != WHOLE_SHARE:
            raise ConfigError(
                f"{where}: expert {expert} is given to nobody for {WHOLE_SHARE - stop} of "
                f"{WHOLE_SHARE} parts of its tokens; give it to a rank"
            )


def _check_route(where: str, route: Route, replica: ReplicaPlan, num_layers: int) -> None:
    instances = replica.instances
    stages, done = [], 0
    for hop in route:
        if not 0 <= hop.instance < len(instances):
            raise ConfigError(
                f"{where} names instance {hop.instance}; the plan has 0-{len(instances) - 1}"
            )
        if hop.layers.start != done or not instances[hop.instance].layers.holds(hop.layers):
            held = instances[hop.instance].layers
            raise ConfigError(
                f"{where} runs layers {hop.layers.start}-{hop.layers.stop} on instance "
                f"{hop.instance}, which holds {held.start}-{held.stop}; needed is a part of them "
                f"that starts at {done}"
            )
        done = hop.layers.stop
        stages.append(replica.stage_of(hop.instance))
    if done != num_layers:
        raise ConfigError(f"{where} ends at layer {done}; this model has {num_layers}")
    rising = all(a < b for a, b in itertools.pairwise(stages))
    if not rising or (stages[0], stages[-1]) != (0, len(replica.stages) - 1):
        raise ConfigError(
            f"{where} goes through stages {stages}; needed is one instance of each, from the first "
            "to the last: stages between may be left out where those before hold their layers"
        )
