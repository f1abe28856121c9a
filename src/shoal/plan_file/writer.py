"""A Plan as a plan file: complete (every range is written out), and read back as the same Plan."""

from __future__ import annotations

from typing import Any

import yaml

from shoal.core.plan import InstancePlan, Plan, RankPlan, ReplicaPlan, Route, default_routes
from shoal.core.split import Range
from shoal.plan_file.experts import dump_experts

_UNITS = (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10))


def dump_plan(plan: Plan) -> str:
    """YAML that `read_plan` makes the same Plan of."""
    named = {"model": plan.model, "max_num_seqs": plan.max_num_seqs}
    content: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
    replicas = [_replica(replica) for replica in plan.replicas]
    content |= replicas[0] if len(replicas) == 1 else {"replicas": replicas}
    return yaml.safe_dump(
        content, sort_keys=False, default_flow_style=None, width=100, allow_unicode=True
    )


def _replica(replica: ReplicaPlan) -> dict[str, Any]:
    stages = [
        _instance(stage.instances[0])
        if len(stage.instances) == 1
        else {"instances": [_instance(each) for each in stage.instances]}
        for stage in replica.stages
    ]
    content: dict[str, Any] = {"stages": stages}
    if replica.role != "any":
        content["role"] = replica.role
    if replica.routes != default_routes(replica.stages):
        content["routes"] = [_route(route) for route in replica.routes]
    return content


def _instance(instance: InstancePlan) -> dict[str, Any]:
    content: dict[str, Any] = {
        "layers": _layers(instance.layers),
        "devices": [_rank(rank) for rank in instance.ranks],
    }
    if len(instance.ranks) > 1:
        split = instance.split
        ranges = {"heads": split.heads, "ffn": split.ffn, "vocab": split.vocab}
        content["split"] = {name: [len(each) for each in own] for name, own in ranges.items()}
        if split.experts:
            content["split"]["experts"] = dump_experts(split.experts, instance.layers)
    if instance.split.kv != "heads":
        content.setdefault("split", {})["kv"] = instance.split.kv
    if instance.kv_cache_memory_bytes is not None:
        content["kv_cache_memory"] = _size(instance.kv_cache_memory_bytes)
    if instance.weights_memory_bytes is not None:
        content["weights_memory"] = _size(instance.weights_memory_bytes)
    optional = {"quantize": instance.quantize, "dtype": instance.dtype}
    return content | {name: value for name, value in optional.items() if value is not None}


def _rank(rank: RankPlan) -> str | dict[str, Any]:
    optional = {
        "host": rank.host,
        "threads": rank.num_threads,
        "speed": rank.speed if rank.speed != 1.0 else None,
    }
    named = {name: value for name, value in optional.items() if value is not None}
    return {"device": rank.device, **named} if named else rank.device


def _route(route: Route) -> list[dict[str, Any]]:
    return [{"instance": hop.instance, "layers": _layers(hop.layers)} for hop in route]


def _layers(layers: Range) -> str:
    return f"{layers.start}-{layers.stop}"


def _size(size_bytes: int) -> str | int:
    for unit, unit_bytes in _UNITS:
        if size_bytes % unit_bytes == 0:
            return f"{size_bytes // unit_bytes}{unit}"
    return size_bytes
