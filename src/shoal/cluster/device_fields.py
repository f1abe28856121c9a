"""Devices as a cluster file writes them: catalogue groups, measured ones, or both at once.

    8x H100-SXM nvlink
    {kind: RTX-3090, memory: 22GiB, bandwidth: 850GB/s, flops: {bfloat16: 65T}, speed: 0.5}
    {kind: cpu, memory: 48GiB, bandwidth: 60GB/s, flops: {float32: 2T, bfloat16: 4T}}

What a measured one leaves out comes from the catalogue, if its kind is there; what is far from
that, or from what any device is, is taken for a wrong unit. Knows nothing of hosts or links.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, cast, get_args

from shoal.cluster import catalogue
from shoal.cluster.catalogue import Kind
from shoal.cluster.units import flops_per_s, rate_bytes_per_s, size_bytes, text, time_s
from shoal.core.cluster import Device, Precision
from shoal.core.errors import ConfigError
from shoal.plan_file.fields import Field

MAX_GROUPS = 64

_KEYS = (
    *("kind", "name", "count", "memory", "bandwidth", "flops", "precisions", "launch"),
    *("host_bandwidth", "usd_per_hour", "watts", "speed"),
)
_NEEDED = ("memory", "bandwidth", "flops")
_FAR = 30.0
"""A measured value differs from the maker's by less; a wrong unit by 1,000."""

_FLOPS_PER_BYTE = (1.0, 3000.0)
_READ_S = {True: (0.02, 200.0), False: (0.002, 0.6)}
"""What reading all of its memory takes: a CPU, and a GPU (0.02 s for an H100, 0.08 s for an L4)."""

_CPU_LAUNCH_S, _GPU_LAUNCH_S = 2e-6, 5e-6
_MOST_LAUNCH_S = {True: 1e-2, False: 5e-4}
"""Of a CPU, which may be a lab's at a thousandth of its speed, and of a GPU."""


@dataclass(frozen=True, slots=True)
class DeviceDraft:
    """Some devices that are alike.

    Attributes:
        model: one of them, under any name.
        known: what the catalogue says of the kind; None: nothing.
        name: if it is given; only one that stands alone has one.
        link: as the group says it.
    """

    model: Device
    count: int
    known: Kind | None
    name: str | None = None
    link: str | None = None

    @property
    def kind(self) -> str:
        return self.model.kind

    @property
    def is_cpu(self) -> bool:
        return self.kind == "cpu"

    def device(self, name: str, host: str, place: str) -> Device:
        return replace(self.model, name=name, host=host, device=place)


def draft_devices(field: Field) -> list[DeviceDraft]:
    """
    Raises:
        ConfigError: with file and line.
    """
    places = field.items(MAX_GROUPS) if field.is_list else [field]
    drafts = [_measured(each) if each.is_mapping else _group(each) for each in places]
    cpus = [place for place, draft in zip(places, drafts, strict=True) if draft.is_cpu]
    if len(cpus) > 1 or any(draft.is_cpu and draft.count > 1 for draft in drafts):
        raise cpus[-1].error("a host's CPUs are one device; leave out what is more than one")
    return drafts


def _group(field: Field) -> DeviceDraft:
    try:
        found = catalogue.group(field.text())
    except ConfigError as error:
        raise field.error(str(error)) from error
    return DeviceDraft(
        found.kind.device("", "", "cuda:0"), found.count, found.kind, None, found.link
    )


def _measured(field: Field) -> DeviceDraft:
    entries = field.entries(_KEYS)
    if "kind" not in entries:
        raise field.error("there is no key kind; name the device: kind: RTX-3090, or kind: cpu")
    kind = entries["kind"].text()
    known = catalogue.kinds().get(kind)
    if known is None and any(key not in entries for key in _NEEDED):
        lacking = next(key for key in _NEEDED if key not in entries)
        raise field.error(
            f"{kind!r} is not in the catalogue, and there is no key {lacking}; give its "
            f"{', '.join(_NEEDED)}, or {_nearest(kind)}"
        )
    model = _device(entries, kind, known)
    _check_units(entries, model, known)
    count = entries["count"].integer(1, catalogue.MAX_COUNT) if "count" in entries else 1
    name = entries["name"].text() if "name" in entries else None
    if name is not None and count > 1:
        raise entries["name"].error(f"{count} devices are to be named {name!r}; leave the name out")
    return DeviceDraft(model, count, known, name)


def _device(entries: Mapping[str, Field], kind: str, known: Kind | None) -> Device:
    flops = _flops(entries["flops"]) if "flops" in entries else known.flops if known else ()
    if "precisions" in entries:
        names = entries["precisions"].items(len(get_args(Precision)))
        precisions = tuple(cast(Precision, each.choice(get_args(Precision))) for each in names)
    elif known is not None:
        precisions = known.precisions
    else:
        rates = tuple(name for name, _ in flops)
        precisions = tuple(dict.fromkeys((*rates, "float32", "int8", "int4")))
    is_measured = any(key in entries for key in ("bandwidth", "flops", "launch"))
    source: Literal["measured", "catalogue"] = "measured" if is_measured else "catalogue"
    device = Device(
        name="a device",
        kind=kind,
        host="",
        memory_bytes=_memory(entries, known),
        bandwidth_bytes_per_s=_bandwidth(entries, known),
        flops=flops,
        precisions=precisions,
        launch_s=_CPU_LAUNCH_S if kind == "cpu" else _GPU_LAUNCH_S,
        source=source,
    )
    if known is not None:
        given = known.device("", "", "")
        device = replace(
            device,
            host_bytes_per_s=given.host_bytes_per_s,
            usd_per_hour=given.usd_per_hour,
            watts=given.watts,
        )
    return _with_rest(device, entries)


def _with_rest(device: Device, entries: Mapping[str, Field]) -> Device:
    if "launch" in entries:
        most_s = _MOST_LAUNCH_S[device.kind == "cpu"]
        device = replace(device, launch_s=time_s(entries["launch"], 1e-8, most_s))
    if "host_bandwidth" in entries:
        rate = rate_bytes_per_s(entries["host_bandwidth"], 1e8, 1e12)
        device = replace(device, host_bytes_per_s=rate)
    if "usd_per_hour" in entries:
        device = replace(device, usd_per_hour=entries["usd_per_hour"].number(0.0, 1e4))
    if "watts" in entries:
        device = replace(device, watts=entries["watts"].number(1.0, 1e5))
    if "speed" in entries:
        device = replace(device, speed=entries["speed"].number(0.001, 1.0))
    return device


def _memory(entries: Mapping[str, Field], known: Kind | None) -> int:
    if "memory" in entries:
        return size_bytes(entries["memory"], 2.0**20)
    assert known is not None, "else it was asked for"
    return known.memory_bytes


def _bandwidth(entries: Mapping[str, Field], known: Kind | None) -> float:
    if "bandwidth" in entries:
        return rate_bytes_per_s(entries["bandwidth"], 1e8, 1e15)
    assert known is not None, "else it was asked for"
    return known.bandwidth_bytes_per_s


def _flops(field: Field) -> tuple[tuple[Precision, float], ...]:
    names = get_args(Precision)
    entries = field.entries(names)
    if not entries:
        raise field.error("flops are empty; name one precision at least: {bfloat16: 65T}")
    return tuple((cast(Precision, name), flops_per_s(each)) for name, each in entries.items())


def _check_units(entries: Mapping[str, Field], device: Device, known: Kind | None) -> None:
    """Whether what was measured can be."""
    best = max(rate for _, rate in device.flops)
    if known is not None:
        for key, value, usual, unit in (
            ("memory", device.memory_bytes, known.memory_bytes, "B"),
            ("bandwidth", device.bandwidth_bytes_per_s, known.bandwidth_bytes_per_s, "B/s"),
            ("flops", best, max(rate for _, rate in known.flops), "flops/s"),
        ):
            if key in entries and not 1 / _FAR < value / usual < _FAR:
                raise entries[key].error(
                    f"{key} is {text(value, unit)}; a {device.kind} has {text(usual, unit)}: check "
                    "the unit"
                )
        return
    low, high = _FLOPS_PER_BYTE
    if not low < best / device.bandwidth_bytes_per_s < high:
        raise entries["flops"].error(
            f"flops of {text(best, 'flops/s')} beside a bandwidth of "
            f"{text(device.bandwidth_bytes_per_s, 'B/s')} are "
            f"{best / device.bandwidth_bytes_per_s:.3g} for each byte; devices have {low:g} to "
            f"{high:g}: check both units"
        )
    read_s = device.memory_bytes / device.bandwidth_bytes_per_s
    low, high = _READ_S[device.kind == "cpu"]
    if not low < read_s < high:
        raise entries["memory"].error(
            f"memory of {text(device.memory_bytes, 'B')} would be read in {text(read_s, 's')} at "
            f"{text(device.bandwidth_bytes_per_s, 'B/s')}; devices take {low:g} to {high:g} s: "
            "check both units"
        )


def _nearest(kind: str) -> str:
    try:
        catalogue.kind(kind)
    except ConfigError as error:
        return str(error).partition("; ")[2].partition("? ")[0] + "?"
    return "write it as the catalogue does"
