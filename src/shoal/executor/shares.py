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
    options: EngineOptions, replica: ReplicaPlan, instance: int, rank: int
) -> EngineOptions:
    """The engine's options with what the plan says of one rank put in.

    CPU ranks share the machine's cores evenly unless the plan says otherwise, and ranks of one
    device its memory; a lab's hosts are all this machine.
    """
    plan = replica.instances[instance]
    place = plan.ranks[rank]
    everyone = [each for other in replica.instances for each in other.ranks]
    return replace(
        options,
        device=place.device,
        dtype=cast(DType, plan.dtype or options.dtype),
        quantize=cast(Quantization, plan.quantize or options.quantize),
        kv_cache_memory_bytes=plan.kv_cache_memory_bytes or options.kv_cache_memory_bytes,
        num_threads=_num_threads(place, options, everyone),
        device_share=options.device_share / sum(each.device == place.device for each in everyone),
    )


def _num_threads(place: RankPlan, options: EngineOptions, everyone: list[RankPlan]) -> int:
    if place.num_threads is not None:
        return place.num_threads
    on_cpu = [each for each in everyone if each.device == "cpu"]
    all_threads = options.num_threads or len(os.sched_getaffinity(0))
    return max(1, all_threads // max(1, len(on_cpu)))
