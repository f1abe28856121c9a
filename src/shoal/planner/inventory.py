"""Devices of a large cluster by what they are, and which of them are still free.

    sort    devices that are nearly alike, on hosts that are nearly alike: a probe finds no two the
            same; each counts as the least of its sort
    form    so many devices of each sort, on one host or each of several: what a tensor-parallel
            group is taken from

Knows nothing of models.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace

from shoal.core.cluster import Cluster, Device

Sort = Hashable

_SIZES = (1, 2, 4, 8, 16)
_NUM_HOSTS = (2, 4)
"""Over which a group may be spread; it has all devices of a sort on each of them."""
_MOST_SPREAD = 8
"""Devices of a group that is on several hosts."""
_STEP = math.log(1.05)


@dataclass(frozen=True, slots=True)
class Form:
    """`counts` of each sort, by its number among `Inventory.sorts`, on each of so many hosts."""

    counts: tuple[tuple[int, int], ...]
    num_hosts: int = 1

    @property
    def num_devices(self) -> int:
        return sum(count for _, count in self.uses)

    @property
    def uses(self) -> tuple[tuple[int, int], ...]:
        """Of each sort, on all hosts."""
        return tuple((sort, count * self.num_hosts) for sort, count in self.counts)


class Inventory:
    """What is free, host by host, in the cluster's order."""

    def __init__(self, cluster: Cluster) -> None:
        self._hosts: dict[str, dict[int, list[Device]]] = {}
        sorts: dict[Sort, int] = {}
        shapes = _host_shapes(cluster)
        members: dict[int, list[Device]] = {}
        self._sort_of: dict[str, int] = {}
        for each in cluster.devices:
            sort = sorts.setdefault((shapes[each.host], rough_kind(each)), len(sorts))
            members.setdefault(sort, []).append(each)
            self._sort_of[each.name] = sort
        for sort, own in members.items():
            for each in _levelled(own):
                self._hosts.setdefault(each.host, {}).setdefault(sort, []).append(each)
        self.sorts = tuple(sorts)
        self._examples = {
            sort: own[0] for host in self._hosts.values() for sort, own in reversed(host.items())
        }

    def stock(self) -> tuple[int, ...]:
        """Free devices of each sort."""
        totals = Counter[int]()
        for host in self._hosts.values():
            for sort, free in host.items():
                totals[sort] += len(free)
        return tuple(totals[sort] for sort in range(len(self.sorts)))

    def example(self, sort: int) -> Device:
        return self._examples[sort]

    def forms(self) -> tuple[Form, ...]:
        """Worth looking at: powers of two of one sort, all of a host's of one, all of a host; and
        all of one sort on several hosts."""
        found: dict[Form, None] = {}
        alike = Counter(
            (sort, len(free)) for host in self._hosts.values() for sort, free in host.items()
        )
        for host in self._hosts.values():
            for sort, free in host.items():
                sizes = {size for size in _SIZES if size <= len(free)} | {len(free)}
                for size in sorted(sizes):
                    found[Form(((sort, size),))] = None
            if len(host) > 1:
                everything = ((sort, len(free)) for sort, free in host.items())
                found[Form(tuple(sorted(everything)))] = None
        for (sort, count), num in alike.items():
            for hosts in _NUM_HOSTS:
                if hosts <= num and hosts * count <= _MOST_SPREAD:
                    found[Form(((sort, count),), hosts)] = None
        return tuple(found)

    def take(self, forms: Sequence[Form]) -> list[list[Device]] | None:
        """Devices for groups of these forms, largest first, on as few hosts; None: not enough."""
        taken: list[Device] = []
        order = sorted(range(len(forms)), key=lambda index: -forms[index].num_devices)
        groups: list[list[Device]] = [[] for _ in forms]
        last = ""
        for index in order:
            used: list[str] = []
            while len(used) < forms[index].num_hosts:
                host = self._host_for(forms[index], last, used)
                if host is None:
                    self._give_back(taken)
                    return None
                last = host
                used.append(host)
                own = self._hosts[host]
                devices = [own[sort].pop(0) for sort, n in forms[index].counts for _ in range(n)]
                taken += devices
                groups[index] += devices
        return groups

    def peek(self, forms: Sequence[Form]) -> list[list[Device]] | None:
        """What `take` would give, which stays free."""
        groups = self.take(forms)
        if groups is not None:
            order = sorted(range(len(forms)), key=lambda index: -forms[index].num_devices)
            self._give_back([device for index in order for device in groups[index]])
        return groups

    def free(self) -> Iterator[Device]:
        for host in self._hosts.values():
            for devices in host.values():
                yield from devices

    def _give_back(self, taken: Sequence[Device]) -> None:
        """In the order in which they were taken."""
        for device in reversed(taken):
            self._hosts[device.host][self._sort_of[device.name]].insert(0, device)

    def _host_for(self, form: Form, last: str, used: Sequence[str]) -> str | None:
        """The last one used, if it has them; else the fullest that is just enough."""

        def fits(host: str) -> bool:
            free = self._hosts[host]
            return host not in used and all(
                len(free.get(sort, ())) >= count for sort, count in form.counts
            )

        if last and fits(last):
            return last
        hosts = [host for host in self._hosts if fits(host)]
        return min(hosts, key=self._num_free, default=None)

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
    return device.kind, device.precisions, device.source, *map(_step, rates)


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
            host.link and (host.link.kind, _step(host.link.bytes_per_s)),
            tuple((each.num_ranks, _step(each.points[-1][1])) for each in host.all_reduce),
        )
        for host in cluster.hosts
    }


def _step(value: float) -> int:
    return round(math.log(value) / _STEP)
