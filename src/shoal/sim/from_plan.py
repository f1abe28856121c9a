"""Replicas to simulate from a plan: the room its devices have, and their cost by the cost model.

    KV of a rank      its device's memory, shared out evenly among the ranks it serves, less weights
                      and activations; or as the plan says
    of an instance    the fewest blocks of its ranks; all of them together by token ranges

Knows nothing of files.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import cast, get_args

from shoal.core.cluster import Cluster, Device, Precision
from shoal.core.errors import ConfigError
from shoal.core.model_spec import ModelSpec
from shoal.core.options import MAX_NUM_SEQS, Batching
from shoal.core.plan import Plan, ReplicaPlan
from shoal.core.split import Shard
from shoal.core.step import BLOCK_SIZE
from shoal.engine.config import EngineConfig
from shoal.planner.formats import numbers_for
from shoal.policy.batching import step_tokens
from shoal.policy.cost_model.memory import activation_bytes, kv_blocks, weight_bytes
from shoal.policy.cost_model.numbers import Numbers
from shoal.policy.cost_model.times import ReplicaCost
from shoal.sim.cost import ModelledCost
from shoal.sim.kv_links import PlannedLinks
from shoal.sim.setup import ReplicaSetup


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What `shoal serve` would be told of every engine; None as there.

    Attributes:
        precision, kv_precision: where the plan says nothing.
        engine: whose constants the cost model takes.
    """

    max_num_seqs: int = MAX_NUM_SEQS
    max_num_batched_tokens: int | None = None
    max_model_len: int | None = None
    max_waiting: int = 256
    max_steps_in_flight: int = 2
    batching: Batching = "even"
    tpot_target_s: float | None = None
    prefix_caching: bool = True
    precision: Precision = "bfloat16"
    kv_precision: Precision = "bfloat16"
    engine: str = "shoal"


def precision_of(name: str) -> Precision:
    """
    Raises:
        ConfigError: no precision that there is.
    """
    for each in get_args(Precision):
        if each == name:
            return cast(Precision, each)
    raise ConfigError(f"precision is {name!r}; it must be one of {', '.join(get_args(Precision))}")


def replica_setups(
    plan: Plan, spec: ModelSpec, cluster: Cluster, limits: Limits
) -> tuple[ReplicaSetup, ...]:
    """
    Raises:
        ConfigError: devices that the cluster does not have, or on which the plan does not fit.
    """
    shared = Counter(
        cluster.at(rank.host, rank.device).name
        for replica in plan.replicas
        for instance in replica.instances
        for rank in instance.ranks
    )
    return tuple(
        _setup(f"replica-{index}", replica, spec, cluster, limits, shared)
        for index, replica in enumerate(plan.replicas)
    )


def _setup(
    name: str,
    replica: ReplicaPlan,
    spec: ModelSpec,
    cluster: Cluster,
    limits: Limits,
    shared: Counter[str],
) -> ReplicaSetup:
    cost = _cost(name, replica, spec, cluster, limits)
    devices = [device for each in cost.devices for device in each]
    is_cuda = all(each.device != "cpu" for each in devices)
    num_tokens = limits.max_num_batched_tokens or step_tokens(
        is_cuda=is_cuda, num_stages=len(replica.stages), max_num_seqs=limits.max_num_seqs
    )
    blocks = _instance_blocks(name, cost, limits, num_tokens, shared)
    room = max(min(blocks[hop.instance] for hop in route) * BLOCK_SIZE for route in replica.routes)
    config = EngineConfig(
        instance_blocks=blocks,
        max_model_len=limits.max_model_len or min(spec.max_positions, room),
        vocab_size=spec.vocab_size,
        routes=replica.routes,
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=num_tokens,
        max_waiting=limits.max_waiting,
        max_steps_in_flight=limits.max_steps_in_flight,
        batching=limits.batching,
        tpot_target_s=limits.tpot_target_s,
        prefix_caching=limits.prefix_caching,
        # KV is exchanged by those that keep it alike.
        model_digest=" ".join(sorted({f"{each.weights}/{each.kv}" for each in cost.numbers})),
    )
    token_bytes = sum(sum(each.kv_token_bytes()) for each in cost.hops())
    return ReplicaSetup(
        name=name,
        config=config,
        cost=ModelledCost(cost, cluster),
        role=replica.role,
        kv_block_bytes=token_bytes * BLOCK_SIZE,
    )


def planned_links(plan: Plan, spec: ModelSpec, cluster: Cluster, limits: Limits) -> PlannedLinks:
    """Over which KV gets from one replica to another.

    Raises:
        ConfigError: as `replica_setups`.
    """
    costs = {
        f"replica-{index}": _cost(f"replica-{index}", replica, spec, cluster, limits)
        for index, replica in enumerate(plan.replicas)
    }
    return PlannedLinks(costs, cluster)


def _cost(
    name: str, replica: ReplicaPlan, spec: ModelSpec, cluster: Cluster, limits: Limits
) -> ReplicaCost:
    devices = [
        cluster.at(rank.host, rank.device) for each in replica.instances for rank in each.ranks
    ]
    numbers = numbers_for(devices, limits.precision, limits.kv_precision)
    if numbers is None:
        kinds = ", ".join(sorted({each.kind for each in devices}))
        raise ConfigError(
            f"{name}: not all of {kinds} have kernels for {limits.precision} weights; choose "
            "another --precision, or name one for each instance in the plan"
        )
    return ReplicaCost(spec, replica, cluster, numbers, engine=limits.engine)


def _instance_blocks(
    name: str, cost: ReplicaCost, limits: Limits, num_tokens: int, shared: Counter[str]
) -> tuple[int, ...]:
    found: list[int | None] = []
    for index, instance in enumerate(cost.plan.instances):
        shards, devices = cost.plan.shards(index), cost.devices[index]
        rooms = [
            _rank_blocks(
                f"{name}, {cost.plan.worker_name(index, rank)}",
                cost.spec,
                shard,
                device,
                cost.numbers[index],
                budget_bytes=device.memory_bytes // shared[device.name],
                kv_bytes=instance.kv_cache_memory_bytes,
                num_tokens=num_tokens,
                num_sampled=limits.max_num_seqs,
            )
            for rank, (shard, device) in enumerate(zip(shards, devices, strict=True))
        ]
        keeping = [each for each in rooms if each is not None]
        by_tokens = instance.split.kv == "tokens"
        found.append((sum(keeping) if by_tokens else min(keeping)) if keeping else None)
    # One that keeps no KV never binds.
    unbounded = max((each for each in found if each is not None), default=1)
    return tuple(unbounded if each is None else each for each in found)


def _rank_blocks(
    where: str,
    spec: ModelSpec,
    shard: Shard,
    device: Device,
    numbers: Numbers,
    *,
    budget_bytes: int,
    kv_bytes: int | None,
    num_tokens: int,
    num_sampled: int,
) -> int | None:
    weights = weight_bytes(spec, shard, numbers)
    activations = activation_bytes(
        spec, shard, numbers, num_tokens=num_tokens, num_sampled=num_sampled
    )
    free_bytes = budget_bytes - weights - activations
    wanted = free_bytes if kv_bytes is None else kv_bytes
    blocks = kv_blocks(spec, shard, numbers, max(min(wanted, free_bytes), 0))
    if free_bytes < 0 or blocks == 0:
        raise ConfigError(
            f"{where}: weights of {weights / 1e9:.2f} GB and activations of "
            f"{activations / 1e9:.2f} GB leave no room for KV in the {budget_bytes / 1e9:.2f} GB "
            f"it has of {device.name}; give it fewer layers, or a lower precision"
        )
    return blocks
