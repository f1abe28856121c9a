"""Plans from flags: a model in even parts over the devices of this machine, and its threads.

    --tensor-parallel-size 2 --pipeline-parallel-size 3     6 devices for each replica

Nothing need divide: 9 heads on 2 ranks are 5 and 4. Knows nothing of files.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

from shoal.core.errors import ConfigError
from shoal.core.model_spec import ModelSpec
from shoal.core.plan import (
    InstancePlan,
    RankPlan,
    ReplicaPlan,
    StagePlan,
    check,
    default_routes,
)
from shoal.core.split import KVSplit, cut, split_by_weights
from shoal.plan_file.drafts import MAX_RANKS
from shoal.plan_file.resolve import FFN_GRANULE


def even_replicas(
    spec: ModelSpec,
    *,
    tensor_parallel_size: int,
    pipeline_parallel_size: int,
    kv_split: KVSplit,
    data_parallel_size: int,
    device: str,
    num_cuda: int,
) -> tuple[ReplicaPlan, ...]:
    """Replicas of even parts.

    Args:
        device: as --device: "auto" takes GPUs if there are enough for a replica.
        num_cuda: GPUs that this machine has.

    Raises:
        ConfigError: sizes that this model or machine has no use for.
    """
    if tensor_parallel_size > MAX_RANKS:
        raise ConfigError(
            f"--tensor-parallel-size is {tensor_parallel_size}; at most {MAX_RANKS} ranks share a "
            "layer: lower it"
        )
    if pipeline_parallel_size > spec.num_layers:
        raise ConfigError(
            f"--pipeline-parallel-size is {pipeline_parallel_size}; this model has "
            f"{spec.num_layers} layers: lower it"
        )
    num_ranks = tensor_parallel_size * pipeline_parallel_size
    devices = itertools.cycle(_devices(num_ranks, device, num_cuda))
    layers = cut(spec.num_layers, [1.0] * pipeline_parallel_size)
    split = replace(
        split_by_weights(spec, [1.0] * tensor_parallel_size, granule=FFN_GRANULE), kv=kv_split
    )
    replicas: list[ReplicaPlan] = []
    for _ in range(data_parallel_size):
        stages = tuple(
            StagePlan(
                instances=(
                    InstancePlan(
                        layers=each,
                        ranks=tuple(RankPlan(device=next(devices)) for _ in split.heads),
                        split=split,
                    ),
                )
            )
            for each in layers
        )
        replicas.append(ReplicaPlan(stages=stages, routes=default_routes(stages)))
    check(replicas[0], spec)
    return tuple(replicas)


def share_threads(
    replicas: Sequence[ReplicaPlan],
    num_cpus: int,
    num_threads: int | None = None,
    *,
    only_here: bool = False,
) -> tuple[ReplicaPlan, ...]:
    """The same replicas, each CPU rank with its number of threads.

    Ranks that name a number keep it; the others share what is left of their replica's part.

    Args:
        num_cpus: of this machine, shared by the replicas.
        num_threads: of each replica (--num-threads); None: an even part of `num_cpus`.
        only_here: ranks that name a host are left alone: they run on another machine.
    """
    each = num_threads or max(num_cpus // len(replicas), 1)
    return tuple(_share_in(replica, each, only_here) for replica in replicas)


def device_share(replicas: Sequence[ReplicaPlan]) -> float:
    """The part of a device that one replica may fill, where several use the same one."""
    used = [
        rank_device
        for replica in replicas
        for rank_device in {rank.device for each in replica.instances for rank in each.ranks}
    ]
    return 1.0 / max(used.count(device) for device in used)


def require_device(device: str, num_cuda: int) -> None:
    """Whether this machine has a device that a plan names.

    Raises:
        ConfigError: a GPU that is not there.
    """
    kind, _, index = device.partition(":")
    if kind == "cuda" and int(index or 0) >= num_cuda:
        raise ConfigError(f"device {device} is not there; {_gpus(num_cuda)}: use another, or cpu")


def _devices(num_ranks: int, device: str, num_cuda: int) -> list[str]:
    if device == "cpu" or (device == "auto" and num_cuda < num_ranks):
        return ["cpu"]
    if device not in ("auto", "cuda"):
        raise ConfigError(
            f"--device {device} is one device for {num_ranks} ranks; use --device cuda or cpu, or "
            "name each rank's in a plan (--plan)"
        )
    if num_cuda < num_ranks:
        raise ConfigError(
            f"{num_ranks} ranks need {num_ranks} GPUs; {_gpus(num_cuda)}: lower "
            "--tensor-parallel-size or --pipeline-parallel-size, or use --device cpu"
        )
    return [f"cuda:{index}" for index in range(num_cuda)]


def _gpus(num_cuda: int) -> str:
    if not num_cuda:
        return "this machine has no usable NVIDIA GPU"
    last = f" to cuda:{num_cuda - 1}" if num_cuda > 1 else ""
    return f"this machine has cuda:0{last}"


def _share_in(replica: ReplicaPlan, num_threads: int, only_here: bool) -> ReplicaPlan:
    ranks = [
        rank
        for instance in replica.instances
        for rank in instance.ranks
        if rank.host is None or not only_here
    ]
    unnamed = sum(rank.device == "cpu" and rank.num_threads is None for rank in ranks)
    named = sum(rank.num_threads or 0 for rank in ranks)
    parts = iter(cut(max(num_threads - named, unnamed), [1.0] * unnamed) if unnamed else ())

    def settle(rank: RankPlan) -> RankPlan:
        is_away = only_here and rank.host is not None
        if rank.device != "cpu" or rank.num_threads is not None or is_away:
            return rank
        return replace(rank, num_threads=len(next(parts)))

    stages = tuple(
        StagePlan(
            instances=tuple(
                replace(each, ranks=tuple(settle(rank) for rank in each.ranks))
                for each in stage.instances
            )
        )
        for stage in replica.stages
    )
    return ReplicaPlan(stages=stages, routes=replica.routes, role=replica.role)
