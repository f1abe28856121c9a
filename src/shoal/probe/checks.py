"""Where a device or link gives less than driver and kernel say it could, and what held it back.

Knows nothing of how anything was measured; what is wrong with a machine beyond that is a doctor's.
"""

from __future__ import annotations

from collections.abc import Iterator

from shoal.cluster.topology import POWER_CAP, Gpu, Topology
from shoal.cluster.units import text
from shoal.core.measured import DeviceMeasure, bytes_per_s
from shoal.probe.survey import Survey

_REACHED_PCIE, _REACHED_NVLINK, _REACHED_NIC = 0.5, 0.4, 0.3
"""A healthy link gives more of its nominal rate."""

_SHARE_TOGETHER = 0.8


def warnings_of(survey: Survey) -> list[str]:
    """For people, one line each."""
    return [*_devices(survey), *_pairs(survey), *_networks(survey)]


def _devices(survey: Survey) -> Iterator[str]:
    for site in survey.sites:
        alone = survey.alone.get(site.name)
        if alone is None:
            continue
        gpu = survey.gpu(site.name)
        for reason in alone.held_back:
            if reason != POWER_CAP or gpu is None or _is_capped(gpu):
                yield f"{site.name} is held back: {reason}"
        if gpu is not None:
            yield from _slot(site.name, gpu, alone)
        together = survey.together.get(site.name)
        if together is not None:
            share = together.bandwidth_bytes_per_s / alone.bandwidth_bytes_per_s
            if share < _SHARE_TOGETHER:
                yield (
                    f"{site.name} reads memory at {share:.0%} of its rate while the machine's "
                    "other devices work; the file has that"
                )


def _is_capped(gpu: Gpu) -> bool:
    """Below what its maker gives it; up to that, reaching its cap is what a busy GPU does."""
    limit, default = gpu.power_limit_w, gpu.default_power_limit_w
    return limit is not None and default is not None and limit < default


def _slot(name: str, gpu: Gpu, measure: DeviceMeasure) -> Iterator[str]:
    if _is_capped(gpu):
        yield (
            f"{name} may draw {gpu.power_limit_w:g} W; it was made for "
            f"{gpu.default_power_limit_w:g} W"
        )
    if gpu.pcie is None:
        return
    if gpu.pcie.width < gpu.pcie.max_width:
        yield f"{name} has {gpu.pcie.label} PCIe lanes; card and slot could do {gpu.pcie.max_label}"
    most = gpu.pcie.max_bytes_per_s
    if measure.host_bytes_per_s < most * _REACHED_PCIE:
        yield (
            f"{name} is filled from its host at {text(measure.host_bytes_per_s, 'B/s')}; "
            f"{gpu.pcie.max_label} could do {text(most, 'B/s')}"
        )


def _pairs(survey: Survey) -> Iterator[str]:
    """Two GPUs of a host, whose sums were measured."""
    for sums in survey.sums:
        hosts = {site.host for site in survey.sites if site.name in sums.devices}
        is_pair = len(hosts) == 1 and len(sums.devices) == 2
        pair = survey.pair(*sums.devices) if is_pair else None
        if pair is None or pair.connection not in ("nvlink", "nvswitch"):
            continue
        rate = bytes_per_s(sums.points)
        if rate < pair.bytes_per_s * _REACHED_NVLINK:
            yield (
                f"sums of {' and '.join(sums.devices)} go at {text(rate, 'B/s')}; their NVLink "
                f"could do {text(pair.bytes_per_s, 'B/s')}"
            )


def _networks(survey: Survey) -> Iterator[str]:
    host_of = {site.name: site.host for site in survey.sites}
    cards = {host: _fastest(topology) for host, topology in survey.topologies.items()}
    for (a, b), points in survey.ways.items():
        one, other = cards.get(host_of[a]), cards.get(host_of[b])
        if host_of[a] == host_of[b] or one is None or other is None:
            continue
        claimed, rate = min(one, other), bytes_per_s(points)
        if rate < claimed * _REACHED_NIC:
            yield (
                f"hosts {host_of[a]} and {host_of[b]} exchange {text(rate * 8, 'bit/s')}; their "
                f"network cards say {text(claimed * 8, 'bit/s')}"
            )


def _fastest(topology: Topology) -> float | None:
    """Of the network cards that are up."""
    rates = [
        each.bytes_per_s
        for each in topology.nics
        if each.is_up and not each.is_virtual and each.bytes_per_s
    ]
    return max(rates, default=None)
