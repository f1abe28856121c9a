"""What joins devices: how long sums among them take, and which groups are joined alike.

Hosts that have links or measured sums of their own stand out; between all others it is the network.
Knows nothing of models.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Iterator, Sequence

from shoal.core.cluster import AllReduceTable, Cluster, Device, Link
from shoal.policy.cost_model.transport import GroupLinks

_SIZES = (1 << 14, 1 << 20)
"""Bytes of a sum: of a step that decodes, and of a prompt."""
_CLASS = math.log(1.25)
_STEP = math.log(1.05)


def rough(value: float) -> int:
    """The same for what is within about a twentieth."""
    return round(math.log(max(value, 1e-12)) / _STEP)


def joined(cluster: Cluster, devices: Sequence[Device]) -> Hashable:
    """The same for groups among whose devices sums take as long, wherever these are."""
    pairs = itertools.combinations((each.name for each in devices), 2)
    slowest = max((cluster.link(a, b) for a, b in pairs), key=_slowness, default=None)
    tables = ((t.num_ranks, t.backend, t.points) for t in sums_among(cluster, devices))
    return () if slowest is None else (slowest, *tables)


def sums_among(cluster: Cluster, devices: Sequence[Device]) -> Sequence[AllReduceTable]:
    """Measured sums that count for a group."""
    hosts = {each.host for each in devices}
    if len(hosts) == 1:
        return cluster.host(hosts.pop()).all_reduce
    return [each for each in cluster.all_reduce if hosts.issuperset(each.hosts)]


class Joins:
    """Classes of pairs of hosts, by the time that sums take: 0 is the quickest.

    Attributes:
        num_classes: 1: all pairs are alike.
    """

    def __init__(self, cluster: Cluster) -> None:
        self._first: dict[str, Device] = {}
        for each in cluster.devices:
            self._first.setdefault(each.host, each)
        own = {frozenset(pair): self._class(cluster, *pair) for pair in self._own_pairs(cluster)}
        other = set[int]()
        if len(own) < len(self._first) * (len(self._first) - 1) // 2:
            other = {self._class(cluster, *self._plain_pair(own))}
        known = sorted({*own.values(), *other})
        number = {each: index for index, each in enumerate(known)}
        self.num_classes = max(len(known), 1)
        self._own = {pair: number[each] for pair, each in own.items()}
        self._other = number[other.pop()] if other else len(known) - 1
        self._best = dict.fromkeys(self._first, self._other)
        for pair, own_class in self._own.items():
            for host in pair:
                self._best[host] = min(self._best[host], own_class)

    def between(self, first: str, second: str) -> int:
        """Class of two hosts."""
        return self._own.get(frozenset((first, second)), self._other)

    def best(self, host: str) -> int:
        """The best class of the host with any other."""
        return self._best[host]

    def _own_pairs(self, cluster: Cluster) -> Iterator[tuple[str, str]]:
        """Hosts with a link of their own, or with devices that have one, or with sums."""
        hosts = {each.name: each.host for each in cluster.devices}
        ends = [(hosts.get(each.a, each.a), hosts.get(each.b, each.b)) for each in cluster.links]
        summed = (itertools.combinations(each.hosts, 2) for each in cluster.all_reduce)
        for pair in dict.fromkeys((*ends, *itertools.chain.from_iterable(summed))):
            if pair[0] != pair[1] and self._first.keys() >= set(pair):
                yield pair

    def _plain_pair(self, own: dict[frozenset[str], int]) -> tuple[str, str]:
        """Two hosts that only the network joins."""
        pairs = itertools.combinations(self._first, 2)
        return next(each for each in pairs if frozenset(each) not in own)

    def _class(self, cluster: Cluster, first: str, second: str) -> int:
        links = GroupLinks(cluster, (self._first[first], self._first[second]))
        seconds = sum(links.all_reduce_s(size) for size in _SIZES)
        return round(math.log(max(seconds, 1e-12)) / _CLASS)


def _slowness(link: Link) -> tuple[float, float]:
    return 1 / link.bytes_per_s, link.latency_s
