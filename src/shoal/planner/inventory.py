"""Devices of a large cluster by what they are, and which of them are still free.

    sort    devices that are nearly alike, on hosts that are nearly alike: a probe finds no two the
            same; each counts as the least of its sort
    form    so many devices of each sort, on one host or each of several: what a tensor-parallel
            group is taken from; where pairs of hosts differ, those that are joined well enough
    stock   free devices of each sort; and of each form that not all hosts are joined well enough
            for, how many groups there may be

Knows nothing of models.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace

from shoal.core.cluster import Cluster, Device
from shoal.planner.joins import Joins, rough

Sort = Hashable

_SIZES = (1, 2, 4, 8, 16)
_NUM_HOSTS = (2, 4)
"""Over which a group may be spread; it has all devices of a sort on each of them."""
_MOST_SPREAD = 8
"""Devices of a group that is on several hosts."""


@dataclass(frozen=True, slots=True)
class Form:
    """`counts` of each sort, by its number among `Inventory.sorts`, on each of so many hosts, any
    two of which are joined by a class of up to `reach` (`joins.py`)."""

    counts: tuple[tuple[int, int], ...]
    num_hosts: int = 1
    reach: int = 0

    @property
    def num_devices(self) -> int:
        return sum(count for _, count in self.uses)

    @property
    def uses(self) -> tuple[tuple[int, int], ...]:
        """Of each sort, on all hosts."""
        return tuple((sort, count * self.num_hosts) for sort, count in self.counts)


class Inventory:
    """What is free, host by host, in the cluster's order.

    Args:
        apart: hosts that are not like others, whatever they have.
    """

    def __init__(self, cluster: Cluster, apart: frozenset[str] = frozenset()) -> None:
        self._hosts: dict[str, dict[int, list[Device]]] = {}
        sorts: dict[Sort, int] = {}
        shapes = _host_shapes(cluster)
        members: dict[int, list[Device]] = {}
        self._sort_of: dict[str, int] = {}
        for each in cluster.devices:
            sort = sorts.setdefault(
                (each.host in apart, shapes[each.host], rough_kind(each)), len(sorts)
            )
            members.setdefault(sort, []).append(each)
            self._sort_of[each.name] = sort
        for sort, own in members.items():
            for each in _levelled(own):
                self._hosts.setdefault(each.host, {}).setdefault(sort, []).append(each)
        self.sorts = tuple(sorts)
        self._examples = {
            sort: own[0] for host in self._hosts.values() for sort, own in reversed(host.items())
        }
        self._joins = Joins(cluster)
        scarce = dict.fromkeys(each for each in self._spread() if self._is_scarce(each))
        self._scarce = {form: number for number, form in enumerate(scarce)}

    def stock(self) -> tuple[int, ...]:
        """What is free of each resource: devices of each sort, then groups of each scarce form."""
        totals = Counter[int]()
        for host in self._hosts.values():
            for sort, free in host.items():
                totals[sort] += len(free)
        groups = (self._num_groups(each) for each in self._scarce)
        return (*(totals[sort] for sort in range(len(self.sorts))), *groups)

    def uses(self, form: Form) -> tuple[tuple[int, int], ...]:
        """What a group takes of each resource of the stock, by its number there."""
        number = self._scarce.get(form)
        if number is None:
            return form.uses
        return *form.uses, (len(self.sorts) + number, 1)

    def example(self, sort: int) -> Device:
        return self._examples[sort]

    def forms(self) -> tuple[Form, ...]:
        """Worth looking at: powers of two of one sort, all of a host's of one, all of a host; and
        all of one sort on several hosts."""
        found: dict[Form, None] = {}
        for host in self._hosts.values():
            for sort, free in host.items():
                sizes = {size for size in _SIZES if size <= len(free)} | {len(free)}
                for size in sorted(sizes):
                    found[Form(((sort, size),))] = None
            if len(host) > 1:
                everything = ((sort, len(free)) for sort, free in host.items())
                found[Form(tuple(sorted(everything)))] = None
        for form in self._spread():
            found[form] = None
        return tuple(found)

    def take(self, forms: Sequence[Form]) -> list[list[Device]] | None:
        """Devices for groups of these forms, largest first, on as few hosts; None: not enough."""
        taken: list[Device] = []
        order = sorted(range(len(forms)), key=lambda index: -forms[index].num_devices)
        groups: list[list[Device]] = [[] for _ in forms]
        last = ""
        for index in order:
            hosts = self._hosts_for(forms[index], last)
            if not hosts:
                self.give_back(taken)
                return None
            last = hosts[-1]
            for host in hosts:
                own = self._hosts[host]
                devices = [own[sort].pop(0) for sort, n in forms[index].counts for _ in range(n)]
                taken += devices
                groups[index] += devices
        return groups

    def typical(self, form: Form) -> list[Device]:
        """Devices of a group that are joined no better than any of that form."""
        hosts = self._hosts_for(form, "", worst_first=True)
        free = [(self._hosts[host], counts) for host in hosts for counts in form.counts]
        return [device for own, (sort, count) in free for device in own[sort][:count]]

    def peek(self, forms: Sequence[Form]) -> list[list[Device]] | None:
        """What `take` would give, which stays free."""
        groups = self.take(forms)
        if groups is not None:
            order = sorted(range(len(forms)), key=lambda index: -forms[index].num_devices)
            self.give_back([device for index in order for device in groups[index]])
        return groups

    def free(self) -> Iterator[Device]:
        for host in self._hosts.values():
            for devices in host.values():
                yield from devices

    def give_back(self, taken: Sequence[Device]) -> None:
        """In the order in which they were taken."""
        for device in reversed(taken):
            self._hosts[device.host][self._sort_of[device.name]].insert(0, device)

    def _hosts_for(self, form: Form, last: str, *, worst_first: bool = False) -> list[str]:
        """The last one used, if it has them, and then the fullest that are just enough, those that
        are joined well to others last; empty: not so many are joined as well as the form says.

        Args:
            worst_first: beside the first, those that are joined worst to it come first.
        """
        joins = self._joins
        fitting = [
            name
            for name, free in self._hosts.items()
            if all(len(free.get(sort, ())) >= count for sort, count in form.counts)
        ]

        def rank(host: str) -> tuple[int, int]:
            return -joins.best(host), self._num_free(host)

        if form.num_hosts == 1:
            first = last if last in fitting else min(fitting, key=rank, default="")
            return [first] if first else []
        fitting = [each for each in fitting if joins.best(each) <= form.reach]
        fitting.sort(key=lambda host: (host != last, rank(host)))
        for index, first in enumerate(fitting):
            hosts, others = [first], fitting[:index] + fitting[index + 1 :]
            if worst_first:
                others.sort(key=lambda host: -joins.between(first, host))
            for host in others:
                if len(hosts) == form.num_hosts:
                    break
                if all(joins.between(host, other) <= form.reach for other in hosts):
                    hosts.append(host)
            if len(hosts) == form.num_hosts:
                return hosts
            if not self._is_scarce(form):
                break
        return []

    def _spread(self) -> Iterator[Form]:
        """Forms over several hosts, of each class that joins some."""
        alike: dict[tuple[int, int], list[str]] = {}
        for name, host in self._hosts.items():
            for sort, free in host.items():
                alike.setdefault((sort, len(free)), []).append(name)
        for (sort, count), hosts in alike.items():
            for num_hosts in _NUM_HOSTS:
                if num_hosts > len(hosts) or num_hosts * count > _MOST_SPREAD:
                    continue
                for reach in self._classes(hosts):
                    form = Form(((sort, count),), num_hosts, reach)
                    if not self._is_scarce(form) or self._hosts_for(form, ""):
                        yield form

    def _classes(self, hosts: Sequence[str]) -> list[int]:
        """Of joins among hosts, from the best."""
        if self._joins.num_classes == 1:
            return [0]
        pairs = itertools.combinations(hosts, 2)
        return sorted({self._joins.between(*each) for each in pairs})

    def _is_scarce(self, form: Form) -> bool:
        """Not any of the hosts that it could be on are joined well enough."""
        return form.num_hosts > 1 and form.reach < self._joins.num_classes - 1

    def _num_groups(self, form: Form) -> int:
        """That can be had of a form."""
        groups: list[list[Device]] = []
        while found := self.take([form]):
            groups += found
        for each in reversed(groups):
            self.give_back(each)
        return len(groups)

    def _num_free(self, host: str) -> int:
        return sum(map(len, self._hosts[host].values()))


def device_kind(device: Device) -> Hashable:
    """What devices have in common that are alike, wherever they are."""
    rates = (device.bandwidth_bytes_per_s, device.flops, device.speed, device.launch_s)
    what = (device.kind, device.memory_bytes, device.precisions, device.source)
    return *what, *rates, device.usd_per_hour, device.watts


def rough_kind(device: Device) -> Hashable:
    """The same for rates and sizes that are within about a twentieth."""
    rates = (
        device.bandwidth_bytes_per_s * device.speed,
        dict(device.flops).get("bfloat16", device.flops[0][1]) * device.speed,
        float(device.memory_bytes),
    )
    return device.kind, device.precisions, device.source, *map(rough, rates)


def _levelled(devices: Sequence[Device]) -> Iterator[Device]:
    """All of a sort, each with the least that one of them has."""
    slowest = min(devices, key=lambda each: each.bandwidth_bytes_per_s * each.speed)
    memory = min(each.memory_bytes for each in devices)
    flops = min((each.flops for each in devices), key=lambda each: each[0][1])
    for each in devices:
        yield replace(
            each,
            memory_bytes=memory,
            bandwidth_bytes_per_s=slowest.bandwidth_bytes_per_s,
            flops=flops,
            speed=slowest.speed,
            launch_s=max(other.launch_s for other in devices),
        )


def _host_shapes(cluster: Cluster) -> dict[str, Hashable]:
    """What hosts have in common that are alike: devices, and how these are joined."""
    counts: dict[str, Counter[Hashable]] = {}
    for each in cluster.devices:
        counts.setdefault(each.host, Counter())[rough_kind(each)] += 1
    return {
        host.name: (
            tuple(sorted(map(repr, counts.get(host.name, Counter()).items()))),
            host.link and (host.link.kind, rough(host.link.bytes_per_s)),
            tuple((each.num_ranks, rough(each.points[-1][1])) for each in host.all_reduce),
        )
        for host in cluster.hosts
    }
