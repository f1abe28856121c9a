"""Exhaustive search of plans of up to six devices, written apart from the planner.

    replicas    every set of disjoint sets of devices
    pipelines   every sequence of stages: tensor-parallel groups, and groups that are alike as the
                instances of one stage
    layers      every composition, at least one for each stage
    splits      every composition of heads, and of FFN columns in sixteenths, in every precision
    batches     every count of micro-batches up to one for each instance, every batch

The last three are in brute_force_pipelines.py and brute_force_groups.py.

Devices are told apart by class: two that are alike on the same host stand in for each other.
Of a rate each replica takes some sixteenths (`least_latency`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache

import numpy as np
from brute_force_groups import Array, Group
from brute_force_pipelines import Pipelines, Role, Stage

from shoal.core.cluster import Device
from shoal.planner.profiles import Problem
from shoal.planner.prompts import moved_s

Counts = tuple[int, ...]
"""Devices of each class."""

SHARES = 16
"""Of a rate."""


class BruteForce:
    def __init__(self, problem: Problem) -> None:
        self.problem, self.goal = problem, problem.goal
        self.classes = _classes(problem)
        self._groups: dict[str, Group] = {}
        self.group = cache(self._group)
        self.worked = Pipelines(problem, self.group)
        self.pipelines = cache(lambda counts: tuple(self._pipelines(counts)))
        self.alike = cache(self._alike)
        self.peak = cache(lambda counts: self._best(counts, self._most))
        self.latencies = cache(self._latencies)
        self.carries = cache(self._carries)

    @property
    def all(self) -> Counts:
        return tuple(len(each) for each in self.classes)

    def towards(self, problem: Problem) -> BruteForce:
        """The same devices and model for another goal of the same lengths."""
        other = BruteForce(problem)
        other._groups, other.peak, other.carries = self._groups, self.peak, self.carries
        return other

    def least(self) -> float:
        """Of latency or price, as the goal says."""
        return self.least_price() if self.goal.objective == "cost" else self.least_latency()

    def most_goodput(self) -> float:
        """Requests per second of the best replicas."""
        return self.carries(self.all)

    def least_price(self) -> float:
        """Of devices that carry the goal's rate."""
        goal = self.goal
        assert goal.rate_per_s is not None
        prices = [goal.price(self.problem.cluster.device(each[0])) for each in self.classes]
        return min(
            (
                sum(n * price for n, price in zip(own, prices, strict=True))
                for own in _up_to(self.all)
                if self.carries(own) >= goal.rate_per_s
            ),
            default=math.inf,
        )

    def least_latency(self) -> float:
        """Mean seconds of a request at the goal's rate, of one that is alone without a rate; within
        the SLO. Infinite: nothing carries it so in sixteenths.

        At first sets of devices count with one split for steps and another for prompts, which is
        less than can be had; those that the best plan is made of are looked at with one for both,
        and there is a new best plan, until all of it was looked at.
        """
        rate = self.goal.rate_per_s or 0.0
        known: dict[tuple[Counts, int], float] = {}

        def costs(own: Counts) -> Array:
            floors = self.latencies(own)
            return np.array([known.get((own, n + 1), floors[n]) for n in range(SHARES)])

        every = _collections(self.all) if rate else [(own,) for own in _up_to(self.all)]
        while True:
            table = {own: costs(own) for own in _up_to(self.all)}
            means = [_least_mean([table[own] for own in each]) for each in every]
            number = min(range(len(every)), key=lambda n: means[n][0])
            mean_s, units = means[number]
            asked = set(zip(every[number], units, strict=True)) - known.keys()
            if not asked or math.isinf(mean_s):
                return mean_s
            for own, count in asked:
                known[own, count] = self._paired(own, count / SHARES * rate)

    def _paired(self, counts: Counts, rate: float) -> float:
        worked, best = self.worked, math.inf
        every = [
            (float(worked.latencies_s(each, [rate])[0]), each) for each in self.pipelines(counts)
        ]
        for floor_s, stages in sorted(every, key=lambda each: each[0]):
            if floor_s >= best:
                break
            best = min(best, worked.paired_latency_s(stages, rate))
        return best

    def most_goodput_with_roles(self) -> float:
        """The same where some devices only start requests, and others only go on with them."""
        starting = cache(lambda counts: self._best(counts, self.worked.started))
        decoding = cache(lambda counts: self._best(counts, self._decoded))
        best = 0.0
        for own in _up_to(self.all):
            others = tuple(n - each for n, each in zip(self.all, own, strict=True))
            if any(others):
                started, decoded = _packed(own, starting), _packed(others, decoding)
                best = max(best, min(started, decoded))
        return best

    def _carries(self, counts: Counts) -> float:
        return _packed(counts, self.peak)

    def _best(self, counts: Counts, rate_of: Callable[[tuple[Stage, ...]], float]) -> float:
        return max(map(rate_of, self.pipelines(counts)), default=0.0)

    def _most(self, stages: tuple[Stage, ...]) -> float:
        return self.worked.peak(stages, Role())

    def _decoded(self, stages: tuple[Stage, ...]) -> float:
        names = {name for stage in stages for own in stage for name in own}
        return self.worked.peak(stages, Role(False, moved_s(self.problem, names)))

    def _latencies(self, counts: Counts) -> Array:
        """At 1, 2, ... sixteenths of the rate."""
        rate = self.goal.rate_per_s or 0.0
        rates = [units / SHARES * rate for units in range(1, SHARES + 1)]
        skipped = len(rates) - 1 if not rate or counts == self.all else 0
        every = self.pipelines(counts)
        found = [self.worked.latencies_s(each, rates[skipped:]) for each in every]
        least = np.min(found, axis=0, initial=np.inf) if found else [math.inf]
        return np.array([*(skipped * [math.inf]), *least])

    def _group(self, names: tuple[str, ...]) -> Group:
        """The same for devices that take as long."""
        key = repr(self._likeness(names))
        if key not in self._groups:
            devices = [self.problem.cluster.device(each) for each in names]
            self._groups[key] = Group(self.problem, devices)
        return self._groups[key]

    def _pipelines(self, left: Counts) -> Iterator[tuple[Stage, ...]]:
        """Of exactly these devices; groups without kernels in common are in none."""
        if not any(left):
            yield ()
            return
        for own in self._stages(left):
            stage = self._named(own, left)
            if not self.group(stage[0]).ways:
                continue
            for others in self._pipelines(_without(left, own)):
                if len(others) < self.problem.spec.num_layers:
                    yield (stage, *others)

    def _stages(self, left: Counts) -> Iterator[tuple[Counts, ...]]:
        """A group, and more that are like it."""
        for first in _up_to(left):
            yield from self._instances((first,), left)

    def _instances(self, own: tuple[Counts, ...], left: Counts) -> Iterator[tuple[Counts, ...]]:
        yield own
        for other in _up_to(_without(left, own)):
            if other >= own[-1] and self.alike(other) == self.alike(own[0]):
                yield from self._instances((*own, other), left)

    def _alike(self, counts: Counts) -> str:
        pairs = zip(self.classes, counts, strict=True)
        return repr(self._likeness([name for own, n in pairs for name in own[:n]]))

    def _likeness(self, names: Sequence[str]) -> object:
        """What groups have in common that take as long: devices, and what joins them."""
        cluster = self.problem.cluster
        links = sorted(repr(cluster.link(a, b)) for a, b in itertools.combinations(names, 2))
        return sorted(_nameless(cluster.device(each)) for each in names), links

    def _named(self, stage: Sequence[Counts], left: Counts) -> Stage:
        """The last that are left of each class."""
        start = list(left)
        groups = []
        for own in stage:
            names: list[str] = []
            for index, count in enumerate(own):
                names += self.classes[index][start[index] - count : start[index]]
                start[index] -= count
            groups.append(tuple(names))
        return tuple(groups)


def _least_mean(costs: Iterable[Array]) -> tuple[float, tuple[int, ...]]:
    """Over replicas by what they take at 1, 2, ... sixteenths of the rate; and their sixteenths."""
    least = np.array([0.0, *(SHARES * [math.inf])])
    taken: list[Array] = []
    for each in costs:
        grown, own = np.full(SHARES + 1, np.inf), np.zeros(SHARES + 1, dtype=int)
        for units in range(1, SHARES + 1):
            added = least[: SHARES + 1 - units] + units / SHARES * each[units - 1]
            own[units:] = np.where(added < grown[units:], units, own[units:])
            grown[units:] = np.minimum(grown[units:], added)
        least = grown
        taken.append(own)
    left, units_of = SHARES, []
    for own in reversed(taken):
        units_of.append(int(own[left]))
        left -= units_of[-1]
    return float(least[SHARES]), tuple(reversed(units_of))


def _packed(counts: Counts, rate_of: Callable[[Counts], float]) -> float:
    """The most that disjoint sets of these devices carry."""
    best = max((sum(map(rate_of, blocks)) for blocks in _collections(counts)), default=0.0)
    return float(best)


@cache
def _collections(counts: Counts) -> tuple[tuple[Counts, ...], ...]:
    """All ways to form one or more sets of some of the devices."""

    def grown(left: Counts, least: Counts) -> Iterator[tuple[Counts, ...]]:
        for own in _up_to(left):
            if own >= least:
                yield (own,)
                for others in grown(_without(left, (own,)), own):
                    yield (own, *others)

    return tuple(grown(counts, (0,) * len(counts)))


def _without(counts: Counts, taken: Sequence[Counts]) -> Counts:
    return tuple(n - sum(each) for n, each in zip(counts, zip(*taken, strict=True), strict=True))


def _up_to(counts: Counts) -> Iterator[Counts]:
    """All but nothing."""
    for own in itertools.product(*(range(n + 1) for n in counts)):
        if any(own):
            yield own


def _classes(problem: Problem) -> tuple[tuple[str, ...], ...]:
    """Names of devices that stand in for each other."""
    cluster = problem.cluster
    linked = {end for each in cluster.links for end in (each.a, each.b)}
    found: dict[object, list[str]] = {}
    for each in cluster.devices:
        own = each.name if each.name in linked else ""
        found.setdefault((own, each.host, _nameless(each)), []).append(each.name)
    return tuple(tuple(names) for names in found.values())


def _nameless(device: Device) -> str:
    return repr(replace(device, name="d", host="h", device="cuda:0"))
