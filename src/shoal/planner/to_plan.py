"""What was found as a Plan, which `shoal serve --plan` runs.

Devices are named as on their hosts; hosts only where there are several. KV gets what weights and
activations leave, where all ranks of an instance keep as much of it. Knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Sequence

from shoal.core.cluster import Cluster, Device
from shoal.core.plan import (
    InstancePlan,
    Plan,
    RankPlan,
    ReplicaPlan,
    StagePlan,
    check,
    default_routes,
)
from shoal.core.split import Range, stacked
from shoal.planner.choice import Choice
from shoal.planner.profiles import Group, Variant

_KV_SHARE = 0.95
"""Of what is left for KV: the rest is the driver's and what libraries take."""


def to_plan(choices: Sequence[Choice], cluster: Cluster, model: str | None) -> Plan:
    """With as many requests at once as each replica was planned for.

    Raises:
        ConfigError: a plan that does not cover the model (a mistake of the search's).
    """
    return Plan(
        replicas=tuple(replica_plan(each, cluster) for each in choices),
        model=model,
        max_num_seqs=max((each.chain.goal.max_concurrency for each in choices), default=None),
    )


def replica_plan(choice: Choice, cluster: Cluster) -> ReplicaPlan:
    """One replica."""
    chain, operation = choice.chain, choice.operation
    names_host = len(cluster.hosts) > 1
    stages = []
    parts = zip(
        chain.segments, stacked(operation.layers), operation.variants, chain.ends, strict=True
    )
    for segment, layers, number, ends in parts:
        variant = segment.group.variants[number]
        stages.append(
            StagePlan(
                instances=tuple(
                    _instance(group, variant, layers, ends, names_host) for group in segment.groups
                )
            )
        )
    routes = default_routes(tuple(stages))
    replica = ReplicaPlan(stages=tuple(stages), routes=routes, role=chain.role)
    check(replica, chain.spec)
    return replica


def _instance(
    group: Group, variant: Variant, layers: Range, ends: tuple[bool, bool], names_host: bool
) -> InstancePlan:
    numbers = variant.numbers
    kept = numbers.precision
    kv_bytes = variant.kv_budgets(len(layers), *ends)
    return InstancePlan(
        layers=layers,
        ranks=tuple(_rank(device, names_host) for device in group.devices),
        split=variant.split,
        kv_cache_memory_bytes=_whole_mib(kv_bytes) if variant.has_even_kv else None,
        quantize=kept if kept in ("int8", "int4", "fp8") else None,
        dtype=numbers.activations,
    )


def _rank(device: Device, names_host: bool) -> RankPlan:
    return RankPlan(device=device.device, host=device.host if names_host else None)


def _whole_mib(budgets: Sequence[int]) -> int:
    return max(int(min(budgets) * _KV_SHARE) >> 20, 1) << 20
