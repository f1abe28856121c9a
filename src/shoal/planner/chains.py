"""Every pipeline that a few devices could form, and the best one of a set of them.

    devices     {a0 a1 b0}
    groups      all partitions: {a0 a1} {b0}, {a0 b0} {a1}, ...
    stages      groups in order; those that are alike may also share one stage as its instances

Devices that are alike (same kind, host and links) are not told apart; instances of a stage may be
on different hosts. Of the orders of stages, those with the shortest hops are tried with each group
at the end, where the head is. Knows nothing of goals.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence

from shoal.core.cluster import Cluster, Device
from shoal.planner.inventory import device_kind
from shoal.planner.joins import sums_among
from shoal.planner.pipeline import Chain, Segment
from shoal.planner.profiles import Group, Problem

Names = tuple[str, ...]

_MOST_PERMUTED = 4


class Bench:
    """Groups of devices, made once each.

    Args:
        devices: that there are; groups are made of these.
    """

    def __init__(self, problem: Problem, devices: Sequence[Device]) -> None:
        self.problem = problem
        self.devices = {each.name: each for each in devices}
        linked = _linked(problem.cluster)
        crowd = Counter(each.host for each in problem.cluster.devices)
        self._kinds = {each.name: _kind(each, linked, crowd[each.host]) for each in devices}
        self._groups: dict[Names, Group] = {}
        self._alike: dict[Hashable, Group] = {}

    def key(self, names: Sequence[str]) -> Hashable:
        """The same for sets of devices that are alike, one by one."""
        return tuple(sorted(map(repr, (self._kinds[each] for each in names))))

    def _likeness(self, names: Sequence[str]) -> Hashable:
        """The same for groups that take as long, wherever they are: devices and their links."""
        cluster, devices = self.problem.cluster, [self.devices[each] for each in names]
        kinds = sorted(repr(device_kind(each)) for each in devices)
        links = sorted(repr(cluster.link(a, b)) for a, b in itertools.combinations(names, 2))
        return tuple(kinds), tuple(links), tuple(sums_among(cluster, devices))

    def group(self, names: Sequence[str]) -> Group:
        own = tuple(sorted(names))
        if own not in self._groups:
            devices = [self.devices[each] for each in own]
            key = self.key(own)
            if key not in self._alike:
                self._alike[key] = Group(self.problem, devices)
            self._groups[own] = self._alike[key].on(devices)
        return self._groups[own]

    def chains(self, names: Sequence[str]) -> Iterator[Chain]:
        """All pipelines that use every one of these devices."""
        seen: set[Hashable] = set()
        for blocks in partitions(tuple(names)):
            key = tuple(sorted(map(repr, (self.key(block) for block in blocks))))
            if key in seen:
                continue
            seen.add(key)
            groups = [self.group(block) for block in blocks]
            if all(each.variants for each in groups):
                for stages in self._stagings(groups):
                    yield from self._orders(stages)

    def _stagings(self, groups: Sequence[Group]) -> Iterator[tuple[Segment, ...]]:
        """Each group a stage; and groups that are alike as instances of one."""
        by_key: dict[Hashable, list[Group]] = {}
        for each in groups:
            by_key.setdefault(self._likeness(each.names), []).append(each)
        ways: list[list[tuple[Segment, ...]]] = []
        for alike in by_key.values():
            own = [tuple(Segment((each,)) for each in alike)]
            if len(alike) > 1:
                own.append((Segment(tuple(alike)),))
            ways.append(own)
        for choice in itertools.product(*ways):
            yield tuple(itertools.chain.from_iterable(choice))

    def _orders(self, stages: tuple[Segment, ...]) -> Iterator[Chain]:
        seen: set[tuple[Hashable, ...]] = set()
        for last in stages:
            others = [each for each in stages if each is not last]
            chain = Chain(self.problem, (*self._shortest(others, last), last))
            key = tuple(self.key(each.group.names) for each in chain.segments)
            if key not in seen:
                seen.add(key)
                yield chain

    def _shortest(self, others: Sequence[Segment], last: Segment) -> Sequence[Segment]:
        """The order with the shortest hops; with many stages, always the nearest before."""
        if len(others) <= 1:
            return others
        if len(others) <= _MOST_PERMUTED - 1:
            return min(itertools.permutations(others), key=lambda each: self._hops_s(each, last))
        left, order = list(others), [last]
        while left:
            nearest = min(left, key=lambda each: self._hops_s([each], order[0]))
            left.remove(nearest)
            order.insert(0, nearest)
        return order[:-1]

    def _hops_s(self, stages: Sequence[Segment], last: Segment) -> tuple[float, float]:
        chain = Chain(self.problem, (*stages, last))
        # The largest memory first, where the embedding is.
        return chain.hops.step_s(1), -sum(d.memory_bytes for d in stages[0].group.devices)


def partitions(names: Names) -> Iterator[tuple[Names, ...]]:
    """All ways to put devices into groups."""
    if not names:
        yield ()
        return
    first, rest = names[0], names[1:]
    for count in range(len(rest) + 1):
        for others in itertools.combinations(rest, count):
            left = tuple(each for each in rest if each not in others)
            for blocks in partitions(left):
                yield ((first, *others), *blocks)


def _linked(cluster: Cluster) -> set[str]:
    """Hosts and devices with links or sums that others do not have."""
    found = {end for each in cluster.links for end in (each.a, each.b)}
    for table in cluster.all_reduce:
        if len(table.hosts) < len(cluster.hosts):
            found |= set(table.hosts)
    return found


def _kind(device: Device, linked: set[str], num_on_host: int) -> Hashable:
    """What devices have in common that are alike; hosts of a single device are."""
    own = device.name if {device.name, device.host} & linked else ""
    host = device.host if num_on_host > 1 else ""
    return own, host, device_kind(device)
