"""The Cluster: devices, the hosts they sit in, what joins them, and how fast all of that is.

    host a   H100 H100 H100 H100        inside a host: `Host.link`, or a pair's own
                 │ network              between hosts: `Cluster.network`, or a pair's own
    host b   4090 4090

Measured by a probe, written by hand, or taken from a catalogue. Links are the same both ways.
Knows nothing of files, models or plans.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

from shoal.core.errors import ConfigError
from shoal.core.fitted import Constants, LayerTimes, Points, Precision, check_points

__all__ = [
    "AllReduceTable",
    "Between",
    "Cluster",
    "Constants",
    "Device",
    "Host",
    "LayerTimes",
    "Link",
    "Points",
    "Precision",
    "check_points",
]

_STANDS_IN: dict[Precision, tuple[Precision, ...]] = {
    "int4": ("int4", "int8", "fp8", "bfloat16", "float16", "float32"),
    "int8": ("int8", "bfloat16", "float16", "float32"),
    "fp8": ("fp8", "bfloat16", "float16", "float32"),
    "bfloat16": ("bfloat16", "float16", "float32"),
    "float16": ("float16", "bfloat16", "float32"),
    "float32": ("float32",),
}
"""Products of a precision that a device lacks are made in the next of these."""

_WIDE_PENALTY = 16
"""fp32 products of an A100 or H100 are so much slower than those of 16 bits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One GPU, or the CPUs of a host.

    Attributes:
        name: its own in the cluster: "a.0".
        kind: as a catalogue or its driver names it: "H100-SXM".
        device: as a plan names it on its host: "cuda:0", "cpu".
        memory_bytes: that weights and KV may take.
        bandwidth_bytes_per_s: at which it reads its memory.
        flops: of dense products, per second, by the precision they are made in.
        precisions: of weights that its kernels take.
        launch_s: what starting a kernel costs.
        host_bytes_per_s: at which it is filled from its host's memory.
        usd_per_hour, watts: None: not known.
        speed: it runs at this share of all these rates (throttled, or supposed to be).
        source: whether the rates were measured there, or are what the maker says.
    """

    name: str
    kind: str
    host: str
    memory_bytes: int
    bandwidth_bytes_per_s: float
    flops: tuple[tuple[Precision, float], ...]
    precisions: tuple[Precision, ...]
    device: str = "cuda:0"
    launch_s: float = 5e-6
    host_bytes_per_s: float = 25e9
    usd_per_hour: float | None = None
    watts: float | None = None
    speed: float = 1.0
    source: Literal["measured", "catalogue"] = "measured"

    def __post_init__(self) -> None:
        rates = {
            "memory": self.memory_bytes,
            "bandwidth": self.bandwidth_bytes_per_s,
            "host bandwidth": self.host_bytes_per_s,
            "speed": self.speed,
            **{f"flops of {name}": rate for name, rate in self.flops},
        }
        for what, value in rates.items():
            if not 0 < value < math.inf:
                raise ConfigError(
                    f"the {what} of device {self.name} is {value:g}; it must be more than 0: "
                    "measure it, or leave the device out"
                )
        if not self.flops or not self.precisions:
            raise ConfigError(
                f"device {self.name} has no flops or no precisions; name those of one precision "
                "at least: flops: {bfloat16: 100T}"
            )

    def flops_per_s(self, precision: Precision) -> float:
        """Of products that were asked for in a precision, made in one that the device has."""
        rates = dict(self.flops)
        for each in _STANDS_IN[precision]:
            if each in rates:
                return rates[each]
        return max(rates.values()) / _WIDE_PENALTY  # only of narrower ones is anything known


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """What joins two devices or hosts.

    Attributes:
        latency_s, bytes_per_s: of a message one way.
        kind: "nvlink4", "pcie4", "network": for people, and to find tables of collectives.
        points: measured times by size; where there are some, they are what counts.
    """

    latency_s: float
    bytes_per_s: float
    kind: str = "network"
    points: Points = ()

    def __post_init__(self) -> None:
        if not 0 <= self.latency_s < math.inf or not self.bytes_per_s > 0:
            raise ConfigError(
                f"a {self.kind} link has {self.latency_s:g} s of latency and "
                f"{self.bytes_per_s:g} bytes/s; needed are at least 0 and more than 0"
            )
        check_points(f"a {self.kind} link", self.points)


@dataclass(frozen=True, slots=True, kw_only=True)
class AllReduceTable:
    """Measured all-reduces of `num_ranks` devices: (bytes of the message, seconds).

    Attributes:
        backend: "nccl" (or what stands for it on CPUs), or "custom" kernels that engines have
            beside it for small messages.
        hosts: among which it was measured, a device of each; empty: among devices of one.
    """

    num_ranks: int
    points: Points
    backend: Literal["nccl", "custom"] = "nccl"
    hosts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.num_ranks < 2 or not self.points:
            raise ConfigError(
                f"a table of all-reduces has {self.num_ranks} ranks and {len(self.points)} points; "
                "needed are 2 ranks and 1 point at least"
            )
        check_points(f"all-reduces of {self.num_ranks} ranks", self.points)


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """A machine.

    Attributes:
        link: between any two of its devices; None: it has one.
        all_reduce: measured among its devices.
        disk_bytes_per_s: at which it reads weights.
    """

    name: str
    link: Link | None = None
    all_reduce: tuple[AllReduceTable, ...] = ()
    disk_bytes_per_s: float = 2e9


@dataclass(frozen=True, slots=True)
class Between:
    """A link of two hosts, or of two devices, by their names."""

    a: str
    b: str
    link: Link


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """All devices and links.

    Attributes:
        network: between any two hosts; None: `links` names every pair.
        links: of pairs that have one of their own.
        all_reduce: measured among hosts.
        constants: of kinds of device; those of the nearest serve the others.
        layer_times: of kinds of device, for models that have layers of that shape.
        request_s: what a request takes beside its Steps: HTTP, tokenizer, wires.

    Raises:
        ConfigError: names that stand twice or that are nobody's, and links that are missing.
    """

    hosts: tuple[Host, ...]
    devices: tuple[Device, ...]
    network: Link | None = None
    links: tuple[Between, ...] = ()
    all_reduce: tuple[AllReduceTable, ...] = ()
    constants: tuple[Constants, ...] = ()
    layer_times: tuple[LayerTimes, ...] = ()
    request_s: float = 0.0
    _devices: dict[str, Device] = field(init=False, repr=False, compare=False)
    _hosts: dict[str, Host] = field(init=False, repr=False, compare=False)
    _links: dict[frozenset[str], Link] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_devices", {each.name: each for each in self.devices})
        object.__setattr__(self, "_hosts", {each.name: each for each in self.hosts})
        links = {frozenset((each.a, each.b)): each.link for each in self.links}
        object.__setattr__(self, "_links", links)
        self._check_names()
        self._check_links()

    def device(self, name: str) -> Device:
        """
        Raises:
            ConfigError: there is none of that name.
        """
        if name not in self._devices:
            raise ConfigError(f"there is no device {name!r}; {_listed('devices', self._devices)}")
        return self._devices[name]

    def host(self, name: str) -> Host:
        """
        Raises:
            ConfigError: there is none of that name.
        """
        if name not in self._hosts:
            raise ConfigError(f"there is no host {name!r}; {_listed('hosts', self._hosts)}")
        return self._hosts[name]

    def at(self, host: str | None, device: str) -> Device:
        """What a plan names.

        Args:
            host: None: the only one.
            device: "cuda" is the host's first.

        Raises:
            ConfigError: no such device.
        """
        if host is None:
            if len(self.hosts) != 1:
                raise ConfigError(
                    f"a device {device} is named without a host; name one: "
                    f"{_listed('hosts', self._hosts)}"
                )
            host = self.hosts[0].name
        wanted = "cuda:0" if device == "cuda" else device
        for each in self.devices:
            if each.host == host and each.device == wanted:
                return each
        raise ConfigError(
            f"host {host} has no {wanted}; it has "
            + (", ".join(each.device for each in self.devices if each.host == host) or "no devices")
        )

    def link(self, a: str, b: str) -> Link:
        """Between two devices, by name; a device reaches itself at once."""
        if a == b:
            return Link(latency_s=0.0, bytes_per_s=math.inf, kind="none")
        own = self._links.get(frozenset((a, b)))
        if own is not None:
            return own
        first, second = self.device(a).host, self.device(b).host
        if first != second:
            found = self._links.get(frozenset((first, second)), self.network)
        else:
            found = self.host(first).link
        assert found is not None, "checked when the cluster was made"
        return found

    def without(self, names: Collection[str]) -> Cluster:
        """The same without some devices; a host that has none left goes too.

        Raises:
            ConfigError: a name that is nobody's, or no device would be left.
        """
        for name in names:
            self.device(name)
        kept = tuple(each for each in self.devices if each.name not in names)
        used = {each.host for each in kept}
        hosts = tuple(host for host in self.hosts if host.name in used)
        known = used | {each.name for each in kept}
        links = tuple(each for each in self.links if each.a in known and each.b in known)
        sums = tuple(each for each in self.all_reduce if used.issuperset(each.hosts))
        return replace(self, hosts=hosts, devices=kept, links=links, all_reduce=sums)

    def slowed(self, name: str, speed: float) -> Cluster:
        """The same with one device at a share of its speed."""
        slow = replace(self.device(name), speed=speed)
        devices = tuple(slow if each.name == name else each for each in self.devices)
        return replace(self, devices=devices)

    def _check_names(self) -> None:
        if not self.devices:
            raise ConfigError("a cluster has no devices; name one at least")
        hosts, devices = [host.name for host in self.hosts], [each.name for each in self.devices]
        for what, names in (("hosts", hosts), ("devices", devices)):
            seen: set[str] = set()
            for name in names:
                if not name or not name.isprintable():
                    raise ConfigError(
                        f"one of the {what} is named {name!r}; give it a name that can be printed"
                    )
                if name in seen:
                    raise ConfigError(f"two {what} are named {name!r}; give each its own name")
                seen.add(name)
        for name in self._hosts.keys() & self._devices.keys():
            raise ConfigError(
                f"a host and a device are both named {name!r}; links could mean either: rename one"
            )
        places = set()
        for device in self.devices:
            self.host(device.host)
            if (device.host, device.device) in places:
                raise ConfigError(
                    f"two devices of host {device.host} are {device.device}; number them"
                )
            places.add((device.host, device.device))

    def _check_links(self) -> None:
        if len(self._links) < len(self.links):
            twice = Counter(frozenset((each.a, each.b)) for each in self.links).most_common(1)[0][0]
            raise ConfigError(
                f"two links join {' and '.join(sorted(twice))}; leave the one that holds"
            )
        for each in self.links:
            if each.a == each.b:
                raise ConfigError(
                    f"a link joins {each.a!r} to itself; name two hosts or two devices, or say "
                    "`link:` of the host"
                )
            for end in (each.a, each.b):
                if end not in self._devices and end not in self._hosts:
                    raise ConfigError(
                        f"a link joins {each.a!r} and {each.b!r}, but {end!r} is neither a host "
                        f"nor a device; {_listed('hosts', self._hosts)}"
                    )
        for table in self.all_reduce:
            for name in table.hosts:
                self.host(name)
        for a, b in self._unlinked():
            where = f"hosts {a} and {b}" if a != b else f"the devices of host {a}"
            raise ConfigError(
                f"no link joins {where}; measure it, or say `network:` or `link:` for all"
            )

    def _unlinked(self) -> Iterator[tuple[str, str]]:
        """Hosts between which nothing is known, or within which."""
        for host in self.hosts:
            names = [each.name for each in self.devices if each.host == host.name]
            if host.link is None and any(
                frozenset(pair) not in self._links for pair in itertools.combinations(names, 2)
            ):
                yield host.name, host.name
        if self.network is None:
            for a, b in itertools.combinations(self._hosts, 2):
                if frozenset((a, b)) not in self._links:
                    yield a, b


def _listed(what: str, names: Collection[str]) -> str:
    shown = ", ".join(itertools.islice(names, 8))
    return f"the {what} are {shown}" + (" and more" if len(names) > 8 else "")
