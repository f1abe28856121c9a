"""What each rank of a plan is given of this machine: options, threads, memory.

Knows nothing of processes or of what a model computes.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import cast

from shoal.core.options import DType, EngineOptions, Quantization
from shoal.core.plan import RankPlan, ReplicaPlan


def rank_options(
    options: EngineOptions,
    replica: ReplicaPlan,
    instance: int,
    rank: int,
    num_cpus: int | None = None,
) -> EngineOptions:
    """The engine's options with what the plan says of one rank put in.

    CPU ranks share the machine's cores evenly unless the plan says otherwise, and ranks of one
    device its memory; a lab's hosts are all this machine.

    Args:
        num_cpus: of the rank's machine, a cluster's node; None: it is this one.
    """
    plan = replica.instances[instance]
    place = plan.ranks[rank]
    everyone = [each for other in replica.instances for each in other.ranks]
    if num_cpus is not None:
        everyone = [each for each in everyone if each.host == place.host]
    return replace(
        options,
        device=place.device,
        dtype=cast(DType, plan.dtype or options.dtype),
        quantize=cast(Quantization, plan.quantize or options.quantize),
        kv_cache_memory_bytes=plan.kv_cache_memory_bytes or options.kv_cache_memory_bytes,
        weights_memory_bytes=plan.weights_memory_bytes or options.weights_memory_bytes,
        num_threads=_num_threads(place, options, everyone, num_cpus),
        device_share=options.device_share / sum(each.device == place.device for each in everyone),
    )


def _num_threads(
    place: RankPlan, options: EngineOptions, everyone: list[RankPlan], num_cpus: int | None
) -> int:
    if place.num_threads is not None:
        return place.num_threads
    on_cpu = [each for each in everyone if each.device == "cpu"]
    all_threads = options.num_threads or num_cpus or len(os.sched_getaffinity(0))
    return max(1, all_threads // max(1, len(on_cpu)))
