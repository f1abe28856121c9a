"""Checks of a plan on a cluster: fast links, transports, memory, precisions, balance.

The times are the cost model's: of a decode step of some sequences. Knows nothing of files.
"""

from __future__ import annotations

import itertools
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from shoal.core.cluster import Cluster, Device, Precision
from shoal.core.model_spec import ModelSpec
from shoal.core.options import MAX_NUM_SEQS
from shoal.core.plan import Plan, ReplicaPlan
from shoal.doctor.finding import Check, Verdict, fail, gigabytes, ok, skipped, warn
from shoal.planner.formats import numbers_for
from shoal.policy.cost_model import (
    InstanceCost,
    ReplicaCost,
    StepLoad,
    activation_bytes,
    weight_bytes,
    windows_of,
)

_SEQUENCES, _CONTEXT = 8, 1024
"""Of the decode step whose times are judged."""

_STEP_TOKENS = 2048
_MOST_SUMS, _MOST_SUMS_APART = 0.5, 0.25
"""Of a step's time: inside a host, and between hosts."""

_UNEVEN, _SLOWER_LINK = 1.2, 0.5
_LEAST_KV_SHARE = 0.1
_NO_GROUP = "no layers are shared by several devices"


@dataclass(frozen=True, slots=True)
class Placed:
    """A plan on its cluster; `costs` of each replica, None: its devices lack the precision."""

    plan: Plan
    cluster: Cluster
    spec: ModelSpec
    costs: tuple[ReplicaCost | None, ...]


@dataclass(frozen=True, slots=True)
class _Group:
    """An instance of several ranks."""

    name: str
    devices: Sequence[Device]
    cost: InstanceCost


def place(
    plan: Plan, cluster: Cluster, spec: ModelSpec, precision: Precision, kv: Precision
) -> Placed:
    """
    Args:
        precision, kv: where the plan says nothing.

    Raises:
        ConfigError: devices that the cluster does not have.
    """
    return Placed(
        plan,
        cluster,
        spec,
        tuple(_cost(replica, cluster, spec, precision, kv) for replica in plan.replicas),
    )


def _cost(
    replica: ReplicaPlan, cluster: Cluster, spec: ModelSpec, precision: Precision, kv: Precision
) -> ReplicaCost | None:
    devices = [cluster.at(x.host, x.device) for each in replica.instances for x in each.ranks]
    numbers = numbers_for(devices, precision, kv)
    return None if numbers is None else ReplicaCost(spec, replica, cluster, numbers)


def _precisions(placed: Placed) -> Iterator[Verdict]:
    complaints = list(_lacking(placed))
    yield from complaints
    if not complaints:
        yield ok("every device has kernels for what it is given")


def _lacking(placed: Placed) -> Iterator[Verdict]:
    for number, (replica, cost) in enumerate(zip(placed.plan.replicas, placed.costs, strict=True)):
        if cost is None:
            yield fail(
                f"replica {number}: its devices have no precision in common",
                "name one for each instance: quantize: int8, or dtype: float16",
            )
            continue
        for index in range(len(replica.instances)):
            wanted = cost.numbers[index].precision
            lacking = [x for x in cost.devices[index] if wanted not in x.precisions]
            for device in lacking:
                yield fail(
                    f"replica {number}, instance {index}: {device.name} ({device.kind}) has no "
                    f"kernels for {wanted}",
                    f"give it one of {', '.join(device.precisions)}",
                )


def _memory(placed: Placed) -> Iterator[Verdict]:
    """Devices that serve several ranks are shared out evenly among them."""
    shared = Counter(
        device.name
        for cost in placed.costs
        if cost is not None
        for devices in cost.devices
        for device in devices
    )
    num_sampled = placed.plan.max_num_seqs or MAX_NUM_SEQS
    tightest, tight = 1.0, False
    for number, cost in enumerate(placed.costs):
        for where, device, budget, left in _rooms(placed.spec, cost, shared, num_sampled):
            share = left / budget
            tightest = min(tightest, share)
            if share < _LEAST_KV_SHARE:
                tight = True
                complain = fail if left < 0 else warn
                words = f"{gigabytes(-left)} too little" if left < 0 else f"{share:.0%} left for KV"
                yield complain(
                    f"replica {number}, {where} on {device.name}: {words} of {gigabytes(budget)}",
                    "give it fewer layers or columns, or a lower precision",
                )
    if not tight and shared:
        yield ok(f"every device has {tightest:.0%} or more of its part left for KV")


def _rooms(
    spec: ModelSpec, cost: ReplicaCost | None, shared: Counter[str], num_sampled: int
) -> Iterator[tuple[str, Device, float, float]]:
    """Worker, device, its part of the device's memory, and what weights and a Step leave of it."""
    if cost is None:
        return
    for index, instance in enumerate(cost.plan.instances):
        numbers = cost.numbers[index]
        pairs = zip(cost.plan.shards(index), cost.devices[index], strict=True)
        for rank, (shard, device) in enumerate(pairs):
            budget = device.memory_bytes / shared[device.name]
            taken = min(
                weight_bytes(spec, shard, numbers), instance.weights_memory_bytes or 1 << 62
            )
            taken += activation_bytes(
                spec, shard, numbers, num_tokens=_STEP_TOKENS, num_sampled=num_sampled
            )
            left = budget - taken
            if instance.kv_cache_memory_bytes is not None and left > 0:
                fits = instance.kv_cache_memory_bytes <= left
                left = budget if fits else left - instance.kv_cache_memory_bytes
            yield cost.plan.worker_name(index, rank), device, budget, left


def _fast_links(placed: Placed) -> Iterator[Verdict]:
    groups = list(_groups(placed))
    if not groups:
        yield skipped(_NO_GROUP)
    for group in groups:
        pairs = itertools.combinations(group.devices, 2)
        slowest = min(
            pairs, key=lambda pair: placed.cluster.link(pair[0].name, pair[1].name).bytes_per_s
        )
        inside = placed.cluster.link(slowest[0].name, slowest[1].name)
        found = (
            f"{group.name}: {slowest[0].name} and {slowest[1].name} exchange "
            f"{gigabytes(inside.bytes_per_s)}/s"
        )
        better = _faster_elsewhere(placed.cluster, group.devices, slowest)
        if better is None:
            yield ok(found)
        else:
            end, other, rate = better
            yield warn(
                f"{found}; {end.name} and {other.name} {gigabytes(rate)}/s",
                f"let {end.name} share layers with {other.name}",
            )


def _faster_elsewhere(
    cluster: Cluster, group: Sequence[Device], ends: tuple[Device, Device]
) -> tuple[Device, Device, float] | None:
    """One of two ends, a device outside the group to which it is joined twice as fast, how fast."""
    rate = cluster.link(ends[0].name, ends[1].name).bytes_per_s
    kinds = {end.kind for end in ends}
    others = [
        (end, other, cluster.link(end.name, other.name).bytes_per_s)
        for end in ends
        for other in cluster.devices
        if other not in group and other.kind in kinds
    ]
    best = max(others, key=lambda each: each[2], default=None)
    return best if best is not None and rate < _SLOWER_LINK * best[2] else None


def _sums(placed: Placed) -> Iterator[Verdict]:
    load = _load(placed.spec)
    groups = list(_groups(placed))
    if not groups:
        yield skipped(_NO_GROUP)
    for group in groups:
        time = group.cost.time(load)
        share = time.communication_s / time.total_s if time.total_s else 0.0
        apart = len({each.host for each in group.devices}) > 1
        found = f"{group.name}: sums take {share:.0%} of a step" + (
            ", between hosts" if apart else ""
        )
        if share > (_MOST_SUMS_APART if apart else _MOST_SUMS):
            yield warn(found, "make its devices stages of their own, or groups of fewer devices")
        else:
            yield ok(found)


def _transports(placed: Placed) -> Iterator[Verdict]:
    groups = list(_groups(placed))
    if not groups:
        yield skipped(_NO_GROUP)
    for group in groups:
        apart = len({each.host for each in group.devices}) > 1
        cpus = [each for each in group.devices if each.device == "cpu"]
        if cpus and len(cpus) < len(group.devices):
            yield fail(
                f"{group.name} has both CPUs and GPUs",
                "give the CPUs layers of their own: a group sums on devices of one sort",
            )
        elif cpus and apart:
            yield warn(
                f"{group.name} sums over gloo, between hosts", "give each host layers of its own"
            )
        elif cpus:
            yield ok(f"{group.name} sums in shared memory")
        else:
            yield ok(f"{group.name} sums over NCCL" + (", between hosts" if apart else ""))


def _stages(placed: Placed) -> Iterator[Verdict]:
    load, judged = _load(placed.spec), 0
    for number, cost in enumerate(placed.costs):
        if cost is None or len(cost.plan.stages) < 2:
            continue
        judged += 1
        times = [each.total_s for each in cost.step_times(load)]
        mean, slowest = statistics.mean(times), max(range(len(times)), key=times.__getitem__)
        said = ", ".join(f"{time * 1e3:.1f}" for time in times)
        if times[slowest] > _UNEVEN * mean:
            yield warn(
                f"replica {number}: stages take {said} ms; the others wait for stage {slowest}",
                "move layers away from it; `shoal plan` shares them out by speed",
            )
        else:
            yield ok(f"replica {number}: stages take {said} ms")
    if not judged:
        yield skipped("no replica has several stages")


def _ranks(placed: Placed) -> Iterator[Verdict]:
    load = _load(placed.spec)
    groups = list(_groups(placed))
    if not groups:
        yield skipped(_NO_GROUP)
    for group in groups:
        times = [each.total_s for each in group.cost.rank_times(load)]
        said = ", ".join(f"{time * 1e3:.1f}" for time in times)
        if max(times) > _UNEVEN * statistics.mean(times):
            slow = group.devices[max(range(len(times)), key=times.__getitem__)]
            yield warn(
                f"{group.name}: its ranks compute for {said} ms; the others wait for {slow.name}",
                f"give {slow.name} a smaller part: split: [weights by speed]",
            )
        else:
            yield ok(f"{group.name}: its ranks compute for {said} ms")


def _groups(placed: Placed) -> Iterator[_Group]:
    for number, cost in enumerate(placed.costs):
        if cost is None:
            continue
        for route, hops in enumerate(cost.plan.routes):
            for hop, instance in zip(hops, cost.hops(route), strict=True):
                first = next(x for x, y in enumerate(cost.plan.routes) if hop in y)
                if len(instance.devices) > 1 and first == route:
                    name = f"replica {number}, instance {hop.instance}"
                    yield _Group(name, instance.devices, instance)


def _load(spec: ModelSpec) -> StepLoad:
    return StepLoad.of([(_CONTEXT, 1, True)] * _SEQUENCES, windows_of(spec))


PLAN_CHECKS: tuple[Check[Placed], ...] = (
    Check(
        "plan precisions", "kernels that are missing are refused when the plan starts", _precisions
    ),
    Check("plan memory", "what does not fit is refused, or read from disk in every step", _memory),
    Check("fast links", "two sums of every layer cross the slowest link of a group", _fast_links),
    Check("sums", "what sums take, no device computes", _sums),
    Check("transports", "a group is joined by what its devices have in common", _transports),
    Check("stages", "a pipeline is as fast as its slowest stage", _stages),
    Check("ranks", "at each sum a group waits for its slowest rank", _ranks),
)
