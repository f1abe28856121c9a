"""Other plans beside the one that was found, and what was left out.

    without X          the cluster without a device
    X at 50%           a device at half its speed
    one more           of each kind, on a host of its own kind
    left out           what a device that is not in the plan would add, and cost
    runner-ups         what other wishes would have led to

Knows nothing of files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from shoal.core.cluster import Cluster, Device, Precision
from shoal.core.errors import ConfigError
from shoal.core.latency import Slo
from shoal.planner.chains import Bench
from shoal.planner.choice import Choice
from shoal.planner.formats import numbers_for
from shoal.planner.goal import Goal
from shoal.planner.inventory import rough_kind
from shoal.planner.pipeline import Chain, Operation, Segment
from shoal.planner.profiles import Problem
from shoal.planner.search import Outcome, find_plan
from shoal.planner.service import peak
from shoal.planner.small import MOST_DEVICES

_FEWER_BITS: tuple[Precision, ...] = ("int8", "int4")


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Devices that are alike and not in the plan."""

    names: tuple[str, ...]
    kind: str
    reason: str


@dataclass(frozen=True, slots=True)
class RunnerUp:
    """What another wish would have led to."""

    wish: str
    outcome: Outcome


def changed(cluster: Cluster, change: str) -> Cluster:
    """A cluster as "without a.0" or "a.0 at 50%" says.

    Raises:
        ConfigError: it says neither, or names no device.
    """
    if found := re.fullmatch(r"without\s+(\S+(?:[,\s]+\S+)*)", change.strip()):
        names = re.split(r"[,\s]+", found[1])
        gone = _devices(cluster, names)
        if len(set(gone)) == len(cluster.devices):
            raise ConfigError(f"--what-if {change!r} leaves no device; take fewer away")
        return cluster.without(gone)
    if found := re.fullmatch(r"(\S+)\s+at\s+([0-9.]{1,8})\s*%", change.strip()):
        share = float(found[2]) / 100 if re.fullmatch(r"[0-9]*\.?[0-9]+", found[2]) else 0.0
        if not 0 < share <= 1:
            raise ConfigError(f"--what-if says {found[2]}%; it must be more than 0 and at most 100")
        for name in _devices(cluster, [found[1]]):
            cluster = cluster.slowed(name, share * cluster.device(name).speed)
        return cluster
    raise ConfigError(
        f"--what-if is {change!r}; write 'without a.0' or 'a.0 at 50%', with a device or a host"
    )


def _devices(cluster: Cluster, names: list[str]) -> list[str]:
    """Devices by name; a host stands for all of its own."""
    hosts = {each.name for each in cluster.hosts}
    found = []
    for name in names:
        if name in hosts:
            found += [each.name for each in cluster.devices if each.host == name]
        else:
            found.append(cluster.device(name).name)
    return found


def left_out(outcome: Outcome) -> Iterator[LeftOut]:
    """Why devices are in no replica, those that are alike together."""
    cluster = outcome.problem.cluster
    alike: dict[object, list[Device]] = {}
    for name in outcome.left_out:
        device = cluster.device(name)
        alike.setdefault(rough_kind(device), []).append(device)
    for devices in alike.values():
        names = tuple(each.name for each in devices)
        yield LeftOut(names, devices[0].kind, _reason(outcome, devices[0]))


def _reason(outcome: Outcome, device: Device) -> str:
    problem, goal = outcome.problem, outcome.problem.goal
    if not any(numbers_for([device], each, goal.kv_precision) for each in goal.precisions):
        return f"it has no kernels for weights in {', '.join(goal.precisions)}"
    if goal.objective == "cost":
        return f"the others carry {goal.rate_per_s:g} requests/s without it"
    best: tuple[float, Choice, Operation] | None = None
    for choice in outcome.choices:
        if choice.chain.role == "prefill":
            continue  # more of them would start more than the others can go on with
        found = _with_one_more(problem, choice, device)
        if found is not None and (best is None or found.rate_per_s > best[0]):
            best = found.rate_per_s, choice, found
    if best is None:
        return "as one more stage it lets no batch keep the SLO, or holds no layer"
    _, choice, found = best
    own = choice.operation
    rate = found.rate_per_s / own.rate_per_s - 1
    at_same = _at_load(problem, choice, device, own)
    tpot = (at_same.tpot_s if at_same else found.tpot_s) / own.tpot_s - 1
    gives = f"adds {rate:.0%} capacity" if rate > 0.005 else "adds no capacity"
    costs = f"costs {tpot:.0%} TPOT" if tpot > 0.005 else "leaves TPOT as it is"
    return f"as one more stage it {gives} and {costs}"


def _with_one_more(problem: Problem, choice: Choice, device: Device) -> Operation | None:
    chain = _longer(problem, choice, device)
    return None if chain is None else peak(chain)


def _at_load(problem: Problem, choice: Choice, device: Device, own: Operation) -> Operation | None:
    chain = _longer(problem, choice, device)
    return None if chain is None else chain.fastest(own.num_micro_batches, own.batch)


def _longer(problem: Problem, choice: Choice, device: Device) -> Chain | None:
    """The replica's pipeline with the device as its first stage."""
    group = Bench(problem, [device]).group([device.name])
    segments = choice.chain.segments
    if not group.variants or len(segments) >= problem.spec.num_layers:
        return None
    longer = Chain(problem, (Segment((group,)), *segments), thorough=False)
    return longer.acting(choice.chain.role, choice.chain.moved_s)


def one_more(outcome: Outcome) -> Iterator[tuple[str, float]]:
    """Requests per second that one more device of each kind would bring.

    Of few devices by planning anew; of many, the price that the linear program gives it. Only for
    goodput, which is what more devices are bought for.
    """
    problem = outcome.problem
    if outcome.prices:
        best: dict[str, float] = {}
        for kind, price in outcome.prices:
            best[kind] = max(best.get(kind, 0.0), price)
        yield from best.items()
        return
    cluster = problem.cluster
    if len(cluster.devices) >= MOST_DEVICES:
        return
    goal = replace(problem.goal, objective="goodput", rate_per_s=None)
    now = outcome if goal == problem.goal else find_plan(replace(problem, goal=goal))
    for device in {each.kind: each for each in reversed(cluster.devices)}.values():
        grown = _grown(cluster, device)
        if grown is not None:
            found = find_plan(replace(problem, cluster=grown, goal=goal))
            yield device.kind, found.capacity_per_s - now.capacity_per_s


def _grown(cluster: Cluster, device: Device) -> Cluster | None:
    """With one more such device: beside it, or on a new host where it is alone on its own.

    None: how the new one would be linked is not known.
    """
    if any({each.a, each.b} & {device.name, device.host} for each in cluster.links):
        return None
    host = cluster.host(device.host)
    name = f"{device.name}+1"
    if host.link is None:
        if cluster.network is None:
            return None
        new_host = replace(host, name=f"{host.name}+1")
        new = replace(device, name=name, host=new_host.name)
        return replace(cluster, hosts=(*cluster.hosts, new_host), devices=(*cluster.devices, new))
    number = sum(each.host == device.host for each in cluster.devices)
    kind = device.device.partition(":")[0]
    new = replace(device, name=name, device=f"{kind}:{number}")
    return replace(cluster, devices=(*cluster.devices, new))


def runner_ups(outcome: Outcome) -> Iterator[RunnerUp]:
    """Plans for other wishes, where they differ from this one."""
    problem, goal = outcome.problem, outcome.problem.goal
    wishes = (
        (
            "lowest latency of one request",
            replace(goal, objective="latency", rate_per_s=None, slo=Slo()),
        ),
        ("most requests per second, no SLO", replace(goal, objective="goodput", slo=Slo())),
        ("most requests per second", replace(goal, objective="goodput")),
        ("replicas for prompts only (--roles)", replace(goal, may_specialise=True)),
        *_other_bits(goal),
    )
    seen = {_shape(outcome)}
    for wish, other in wishes:
        if other == goal or (other.may_specialise and goal.objective == "latency"):
            continue
        try:
            found = find_plan(replace(problem, goal=other))
        except ConfigError:
            continue  # there is no room for so many bits
        if _shape(found) not in seen:
            seen.add(_shape(found))
            yield RunnerUp(wish, found)


def _other_bits(goal: Goal) -> Iterator[tuple[str, Goal]]:
    """The most bits of those that are allowed; and fewer than are, to see what they would bring."""
    most = goal.precisions[:1]
    if len(goal.precisions) > 1:
        yield f"all weights in {most[0]}", replace(goal, precisions=most, max_quality_loss=None)
    fewer = tuple(each for each in _FEWER_BITS if each not in goal.precisions)
    if fewer:
        wish = replace(goal, precisions=(*goal.precisions, *fewer), max_quality_loss=None)
        yield f"with --precision {','.join(wish.precisions)}", wish


def _shape(outcome: Outcome) -> tuple[object, ...]:
    return tuple(
        (
            each.chain.role,
            each.operation.layers,
            tuple(s.group.names for s in each.chain.segments),
            each.log_loss,
        )
        for each in outcome.choices
    )
