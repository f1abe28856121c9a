"""Checks of a cluster file: where its numbers come from, what is slower than its name, links.

Knows nothing of files or plans.
"""

from __future__ import annotations

import itertools
import statistics
from collections import defaultdict
from collections.abc import Iterator

from shoal.cluster import catalogue
from shoal.core.cluster import Cluster, Device, Link
from shoal.core.errors import ConfigError
from shoal.doctor.finding import Check, Verdict, gigabits, gigabytes, ok, skipped, warn

_LEAST_BANDWIDTH, _LEAST_FLOPS, _LEAST_MEMORY = 0.6, 0.35, 0.8
"""Of what the maker says: GPUs reach 80 to 95 % of their bandwidth, and half of their flops."""

_ALIKE = 0.9
_SLOW_PCIE_BYTES_PER_S = 5e9
_SLOW_NETWORK_BYTES_PER_S, _SLOW_NETWORK_S = 1.2e9, 500e-6
_ENGINE = "shoal"
_MOST_NAMED = 8


def _sources(cluster: Cluster) -> Iterator[Verdict]:
    written = [each for each in cluster.devices if each.source == "catalogue"]
    if written:
        yield warn(
            f"{len(written)} of {len(cluster.devices)} devices have their maker's rates: "
            f"{_some(written)}",
            "measure them: shoal probe -o cluster.yaml, on each host",
        )
    else:
        yield ok(f"the rates of all {len(cluster.devices)} devices were measured")


def _names(cluster: Cluster) -> Iterator[Verdict]:
    compared = 0
    for device in cluster.devices:
        try:
            kind = catalogue.kind(device.kind)
        except ConfigError:
            continue
        if device.source != "measured":
            continue
        compared += 1
        usual = kind.device(device.name, device.host, device.device)
        for what, share, least in (
            (
                "bandwidth",
                device.bandwidth_bytes_per_s / usual.bandwidth_bytes_per_s,
                _LEAST_BANDWIDTH,
            ),
            ("flops", device.flops_per_s("float16") / usual.flops_per_s("float16"), _LEAST_FLOPS),
            ("memory", device.memory_bytes / usual.memory_bytes, _LEAST_MEMORY),
        ):
            if share < least:
                yield warn(
                    f"{device.name} has {share:.0%} of the {what} of a {device.kind}",
                    f"run `shoal doctor` on host {device.host}: power, heat, clocks, other users",
                )
    if not compared:
        yield skipped("no measured device is of a kind in the catalogue")


def _alike(cluster: Cluster) -> Iterator[Verdict]:
    kinds: dict[str, list[Device]] = defaultdict(list)
    for device in cluster.devices:
        if device.source == "measured" and device.kind != "cpu":
            kinds[device.kind].append(device)
    several = {kind: devices for kind, devices in kinds.items() if len(devices) > 1}
    if not several:
        yield skipped("no two measured devices are of one kind")
    for kind, devices in several.items():
        usual = statistics.median(each.bandwidth_bytes_per_s * each.speed for each in devices)
        slow = [
            each for each in devices if each.bandwidth_bytes_per_s * each.speed < _ALIKE * usual
        ]
        if slow:
            yield warn(
                f"{_some(slow)}: less than {_ALIKE:.0%} of the bandwidth of the other {kind}",
                f"run `shoal doctor` on host {slow[0].host}; or leave it to the planner",
            )
        else:
            yield ok(f"{len(devices)} {kind} are alike")


def _inside(cluster: Cluster) -> Iterator[Verdict]:
    """Links of two GPUs of a host."""
    slow, pairs = [], 0
    for host in cluster.hosts:
        gpus = [x for x in cluster.devices if x.host == host.name and x.device != "cpu"]
        for a, b in itertools.combinations(gpus, 2):
            pairs += 1
            link = cluster.link(a.name, b.name)
            if link.bytes_per_s < _SLOW_PCIE_BYTES_PER_S:
                slow.append((a, b, link))
    for a, b, link in slow[:_MOST_NAMED]:
        yield warn(
            f"{a.name} and {b.name} exchange {gigabytes(link.bytes_per_s)}/s",
            f"look at lanes and peer-to-peer: run `shoal doctor` on host {a.host}",
        )
    if not pairs:
        yield skipped("no host has two GPUs")
    elif not slow:
        yield ok(f"{pairs} pairs of GPUs of one host exchange 5 GB/s or more")


def _network(cluster: Cluster) -> Iterator[Verdict]:
    if len(cluster.hosts) < 2:
        yield skipped("there is one host")
        return
    found = dict.fromkeys(_between(cluster))
    slow = [each for each in found if _is_slow(each[1])]
    for where, link in slow[:_MOST_NAMED]:
        yield warn(
            f"{where}: {gigabits(link.bytes_per_s)}, {link.latency_s * 1e6:,.0f} us",
            "let only whole stages cross it (`shoal plan` does), or use a faster card",
        )
    if not slow:
        yield ok("hosts are joined by 10 Gbit/s and half a millisecond, or better")


def _between(cluster: Cluster) -> Iterator[tuple[str, Link]]:
    if cluster.network is not None:
        yield "the network", cluster.network
    hosts = {host.name for host in cluster.hosts}
    for each in cluster.links:
        if {each.a, each.b} <= hosts:
            yield f"hosts {each.a} and {each.b}", each.link


def _is_slow(link: Link) -> bool:
    return link.bytes_per_s < _SLOW_NETWORK_BYTES_PER_S or link.latency_s > _SLOW_NETWORK_S


def _constants(cluster: Cluster) -> Iterator[Verdict]:
    kinds = {device.kind for device in cluster.devices}
    fitted = {each.kind for each in cluster.constants if each.engine == _ENGINE}
    if missing := sorted(kinds - fitted):
        yield warn(
            f"nothing was fitted on {', '.join(missing)}: predictions may be off by a quarter",
            "compare plans with each other, or measure: shoal probe --model MODEL",
        )
    else:
        yield ok("the cost model's constants were fitted on each kind of device")


def _some(devices: list[Device]) -> str:
    shown = ", ".join(each.name for each in devices[:_MOST_NAMED])
    return shown + (" and more" if len(devices) > _MOST_NAMED else "")


CLUSTER_CHECKS: tuple[Check[Cluster], ...] = (
    Check("measured", "makers' rates are not reached, and not by the same share", _sources),
    Check("names", "a device that is slower than its name has a reason that may be mended", _names),
    Check("alike", "a group waits for its slowest device", _alike),
    Check("links inside", "a layer's two sums cross these links", _inside),
    Check("network", "what crosses it is waited for in every step", _network),
    Check("constants", "a plan is as good as the times it is made from", _constants),
)
