"""What a survey found, as a Cluster and what to say of it.

    rates       as they are while all devices of a machine work; alone they may be better
    memory      of a machine, in even parts for those of its devices that share it
    links       of each pair that was measured; among many hosts the median stands for the rest

Knows nothing of how anything was measured.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from shoal.cluster import catalogue
from shoal.cluster.cluster_writer import Remarks
from shoal.cluster.topology import GpuPair
from shoal.cluster.units import text
from shoal.core.cluster import (
    AllReduceTable,
    Between,
    Cluster,
    Constants,
    Device,
    Host,
    Link,
    Points,
)
from shoal.core.errors import DeviceError
from shoal.core.measured import DeviceMeasure, bytes_per_s, latency_s
from shoal.probe.asked import Site
from shoal.probe.survey import Survey

_FAR = 1.3
"""A pair whose link is so much better or worse than the median has its own."""


def cluster_of(survey: Survey, constants: Sequence[Constants] = ()) -> Cluster:
    """
    Raises:
        DeviceError: nothing could be measured.
        ConfigError: numbers that are no cluster's.
    """
    sites = [site for site in survey.sites if site.name in survey.alone]
    if not sites:
        raise DeviceError("no device could be measured: " + "; ".join(survey.problems))
    hosts = dict.fromkeys(site.host for site in sites)
    network, links = _links(survey, list(hosts))
    return Cluster(
        hosts=tuple(_host(survey, name) for name in hosts),
        devices=tuple(_device(survey, site) for site in _in_order(sites)),
        network=network,
        links=links,
        all_reduce=tuple(_sums_of_hosts(survey)),
        constants=tuple(constants),
    )


def remarks_of(survey: Survey, warnings: Sequence[str], when: str) -> Remarks:
    """What a reader of the file should know."""
    about: dict[str, list[str]] = {}
    for name, alone in survey.alone.items():
        about[name] = list(_about(alone, survey.together.get(name)))
    for host, topology in survey.topologies.items():
        found = [
            f"{each.name} {text(each.bytes_per_s * 8, 'bit/s')}"
            for each in topology.nics
            if each.bytes_per_s and each.is_up
        ]
        about[host] = [f"network cards, as the kernel has it: {', '.join(found)}"] if found else []
    head = f"Measured by `shoal probe`, {when}. Edit what you know better; `shoal plan` reads it."
    return Remarks((head,), (*warnings, *survey.problems), about)


def _about(alone: DeviceMeasure, together: DeviceMeasure | None) -> Iterator[str]:
    parts = [alone.model]
    if alone.is_cpu:
        parts.append(f"{alone.num_threads} threads" if alone.num_threads != 1 else "1 thread")
    yield f"{', '.join(parts)}; kernels {alone.kernels}"
    if together is not None:
        fastest = ", ".join(f"{name} {text(rate, 'op/s')}" for name, rate in alone.flops)
        yield f"alone: reads {text(alone.bandwidth_bytes_per_s, 'B/s')}, {fastest}"
        yield "while the machine's other devices work:"


def _in_order(sites: Sequence[Site]) -> list[Site]:
    """GPUs of a host by number: a cluster file counts them."""
    hosts = list(dict.fromkeys(site.host for site in sites))

    def place(site: Site) -> tuple[int, bool, int]:
        number = int(site.device.partition(":")[2] or 0)
        return hosts.index(site.host), site.device == "cpu", number

    return sorted(sites, key=place)


def _device(survey: Survey, site: Site) -> Device:
    measure = survey.together.get(site.name, survey.alone[site.name])
    kind = "cpu"
    known = None
    if not measure.is_cpu:
        known = catalogue.kind_called(measure.model, measure.total_bytes)
        kind = known.name if known is not None else _plain(measure.model)
    return Device(
        name=site.name,
        kind=kind,
        host=site.host,
        device=site.device,
        memory_bytes=measure.memory_bytes // _sharers(survey, site),
        bandwidth_bytes_per_s=measure.bandwidth_bytes_per_s,
        flops=measure.flops,
        precisions=measure.precisions,
        launch_s=measure.launch_s,
        host_bytes_per_s=measure.host_bytes_per_s,
        usd_per_hour=known.usd_per_hour if known is not None else None,
        watts=measure.watts or (known.watts if known is not None else None),
    )


def _sharers(survey: Survey, site: Site) -> int:
    """Devices that take their memory from the same machine's."""
    if site.device != "cpu":
        return 1
    return sum(each.device == "cpu" and each.machine == site.machine for each in survey.sites)


def _plain(model: str) -> str:
    return "-".join(model.removeprefix("NVIDIA ").removeprefix("GeForce ").split())


def _host(survey: Survey, name: str) -> Host:
    own = {site.name for site in survey.sites if site.host == name}
    sums = [each for each in survey.sums if own.issuperset(each.devices)]
    tables = tuple(AllReduceTable(num_ranks=len(each.devices), points=each.points) for each in sums)
    link = None
    pairs = [each for each in sums if len(each.devices) == 2]
    if pairs:
        # Of two ranks each sends all of it once.
        points = pairs[0].points
        link = Link(
            latency_s=latency_s(points),
            bytes_per_s=bytes_per_s(points),
            kind=_kind(survey.pair(*pairs[0].devices)),
        )
    host = Host(name=name, link=link, all_reduce=tables)
    if name not in survey.disks:
        return host
    return Host(name=name, link=link, all_reduce=tables, disk_bytes_per_s=survey.disks[name])


def _kind(pair: GpuPair | None) -> str:
    """By which links of GPUs go, as the driver says."""
    if pair is None:
        return "measured"
    if pair.connection in ("nvlink", "nvswitch"):
        return "nvlink"
    return "pcie"


def _links(survey: Survey, hosts: Sequence[str]) -> tuple[Link | None, tuple[Between, ...]]:
    """The network, where not every pair of hosts was measured; and pairs' own."""
    host_of = {site.name: site.host for site in survey.sites}
    between: list[Between] = []
    inside: list[Between] = []
    for (a, b), points in survey.ways.items():
        if host_of[a] == host_of[b]:
            inside.append(Between(a, b, _link(points)))
        else:
            between.append(Between(host_of[a], host_of[b], _link(points)))
    if len(between) == len(hosts) * (len(hosts) - 1) // 2:
        return None, (*between, *inside)
    if not between:
        raise DeviceError("no link between hosts could be measured: " + "; ".join(survey.problems))
    rate = statistics.median(each.link.bytes_per_s for each in between)
    usual = min(between, key=lambda each: abs(each.link.bytes_per_s - rate)).link
    own = [each for each in between if not 1 / _FAR < each.link.bytes_per_s / rate < _FAR]
    return usual, (*own, *inside)


def _link(points: Points) -> Link:
    return Link(
        latency_s=latency_s(points), bytes_per_s=bytes_per_s(points), points=points, kind="network"
    )


def _sums_of_hosts(survey: Survey) -> Iterator[AllReduceTable]:
    host_of = {site.name: site.host for site in survey.sites}
    for each in survey.sums:
        hosts = tuple(host_of[name] for name in each.devices)
        if len(set(hosts)) == len(hosts):
            yield AllReduceTable(num_ranks=len(hosts), points=each.points, hosts=hosts)
