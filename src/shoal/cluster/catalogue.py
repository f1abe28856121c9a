"""Devices known by name: what their makers and others say of them, and what was measured on them.

    devices.json      memory, bandwidth, flops, links, prices; with sources
    all_reduce.json   measured all-reduces of some kinds
    constants.json    what the cost model leaves out, fitted on measurements of some kinds

    8x H100-SXM nvlink      eight of a kind in one host, and what joins them

Knows nothing of files that users write.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, cast

from shoal.core.cluster import AllReduceTable, Constants, Device, Link, Precision
from shoal.core.errors import ConfigError

MAX_COUNT = 1024

LINK_NAMES = ("nvlink", "xgmi", "roce", "pcie", "pcie3", "pcie4", "pcie5")

_PCIE_BYTES_PER_S = {"pcie3": 16e9, "pcie4": 32e9, "pcie5": 64e9}
_LATENCY_S = {"nvlink": 5e-6, "xgmi": 8e-6, "roce": 10e-6, "pcie": 10e-6}
_REACHED = 0.77
"""Of a link's nominal rate: 348 of 450 GB/s between H100s, 228 of 300 between A100s (vidur)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A device by name.

    Attributes:
        flops: dense, by precision.
        fabric: that joins it to others of its kind beside PCIe, and its rate one way; None: none.
        pcie: its slot ("pcie4"), and the rate one way.
        unsourced: values that no source gave.
    """

    name: str
    memory_bytes: int
    bandwidth_bytes_per_s: float
    flops: tuple[tuple[Precision, float], ...]
    fabric: tuple[str, float] | None
    pcie: tuple[str, float]
    usd_per_hour: float | None
    watts: float | None
    unsourced: str

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """Of weights that its kernels take: integers everywhere, fp8 and bf16 where it has them."""
        rates = dict(self.flops)
        wanted: tuple[Precision, ...] = ("bfloat16", "fp8")
        return ("float32", "float16", *(each for each in wanted if each in rates), "int8", "int4")

    def device(self, name: str, host: str, place: str) -> Device:
        """One of them."""
        return Device(
            name=name,
            kind=self.name,
            host=host,
            device=place,
            memory_bytes=self.memory_bytes,
            bandwidth_bytes_per_s=self.bandwidth_bytes_per_s,
            flops=self.flops,
            precisions=self.precisions,
            host_bytes_per_s=self.pcie[1] * _REACHED,
            usd_per_hour=self.usd_per_hour,
            watts=self.watts,
            source="catalogue",
        )

    def link(self, name: str) -> Link:
        """What joins two of them in one host.

        Raises:
            ConfigError: a link that they don't have.
        """
        if name == "pcie":
            name = self.pcie[0]
        if name in _PCIE_BYTES_PER_S:
            rate = min(_PCIE_BYTES_PER_S[name], self.pcie[1])
        elif self.fabric is not None and self.fabric[0] == name:
            rate = self.fabric[1]
        else:
            own = [self.pcie[0]] + ([self.fabric[0]] if self.fabric else [])
            raise ConfigError(f"{self.name} has no {name}; write {' or '.join(own)}")
        family = name.rstrip("345")
        return Link(latency_s=_LATENCY_S[family], bytes_per_s=rate * _REACHED, kind=name)


@dataclass(frozen=True, slots=True)
class Group:
    """`8x H100-SXM nvlink`; `link` None: not said."""

    kind: Kind
    count: int
    link: str | None


@cache
def kinds() -> Mapping[str, Kind]:
    """All of them, by name."""
    return {entry["name"]: _kind(entry) for entry in _data("devices.json")["devices"]}


def kind_called(model: str, memory_bytes: int) -> Kind | None:
    """The one that a driver means by "NVIDIA A100-SXM4-80GB"; None: not in the catalogue.

    All words of its name are in the driver's; among several, the most words, then the memory that
    is nearest.
    """
    said = set(re.findall(r"[A-Z]+[0-9]*[A-Z]*|[0-9]+", model.upper().replace("SXM", " SXM ")))
    if not said & {"PCIE", "NVL"}:
        said.add("SXM")  # "NVIDIA H200" is one

    def words(name: str) -> set[str]:
        return {each for each in name.upper().replace("SXM2", "SXM").split("-") if each != "80"}

    def fit(each: Kind) -> tuple[int, float]:
        return -len(words(each.name)), abs(each.memory_bytes - memory_bytes)

    if said & {"TI", "SUPER"}:
        return None
    able = (each for each in kinds().values() if words(each.name) <= said)
    return min(able, key=fit, default=None)


def kind(name: str) -> Kind:
    """
    Raises:
        ConfigError: there is none of that name; the nearest are named.
    """
    known = kinds()
    by_lower = {each.lower(): each for each in known}
    found = by_lower.get(name.lower())
    if found is None:
        near = difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.4)
        names = [by_lower[each] for each in near] or list(known)
        raise ConfigError(
            f"no device is known as {name!r}; did you mean {', '.join(names)}? Or measure it: give "
            "its memory, bandwidth and flops"
        )
    return known[found]


def group(text: str) -> Group:
    """What `8x H100-SXM nvlink` says.

    Raises:
        ConfigError: it says something else.
    """
    found = re.fullmatch(
        r"(?:([0-9]{1,4}) *[x×] +)?([A-Za-z0-9.-]{1,40})(?: +([a-z0-9]{1,10}))?", text
    )
    if not found or found[1] == "0" * len(found[1] or "-"):
        raise ConfigError(
            f"{text!r} is no group of devices; write a count, a name and what joins them: "
            "8x H100-SXM nvlink"
        )
    count = int(found[1] or 1)
    if count > MAX_COUNT:
        raise ConfigError(
            f"{text!r} are more than {MAX_COUNT} devices in one host; name more hosts"
        )
    if found[3] is not None and found[3] not in LINK_NAMES:
        near = difflib.get_close_matches(found[3], LINK_NAMES, n=1)
        raise ConfigError(
            f"no link is known as {found[3]!r}; use one of {', '.join(LINK_NAMES)}"
            + (f" ({near[0]}?)" if near else "")
        )
    known = kind(found[2])
    if found[3] is not None:
        known.link(found[3])
    return Group(known, count, found[3])


@cache
def all_reduce_tables(kind: str, link: str) -> tuple[AllReduceTable, ...]:
    """Measured among devices of a kind over a link; empty: nothing was."""
    family = link.rstrip("345")
    return tuple(
        AllReduceTable(
            num_ranks=entry["ranks"],
            points=tuple((size, time_us * 1e-6) for size, time_us in entry["bytes_us"]),
            backend=entry["backend"],
        )
        for entry in _data("all_reduce.json")["tables"]
        if kind in entry["kinds"] and family == entry["link"]
    )


@cache
def known_constants() -> tuple[Constants, ...]:
    """Of the cost model, that were fitted on published measurements."""
    return tuple(
        Constants(
            kind=entry["kind"],
            engine=entry["engine"],
            precision=entry["precision"],
            eta=entry["eta"],
            layer_s=entry["layer_us"] * 1e-6,
            mfu=entry["mfu"],
            error=entry["error"],
            bandwidth_bytes_per_s=kinds()[entry["kind"]].bandwidth_bytes_per_s,
            flops_per_s=dict(kinds()[entry["kind"]].flops)["float16"],
            source=entry["source"],
        )
        for entry in _data("constants.json")["constants"]
    )


def _kind(entry: Mapping[str, Any]) -> Kind:
    fabric = None
    if "nvlink_gb_per_s" in entry:
        fabric = ("nvlink", entry["nvlink_gb_per_s"] * 1e9)
    elif "fabric" in entry:
        fabric = (entry["fabric"], entry["fabric_gb_per_s"] * 1e9)
    prices = entry.get("usd_per_hour")
    return Kind(
        name=entry["name"],
        memory_bytes=int(entry["memory_gb"] * 1e9),
        bandwidth_bytes_per_s=entry["bandwidth_gb_per_s"] * 1e9,
        flops=tuple((cast(Precision, name), rate * 1e12) for name, rate in entry["tflops"].items()),
        fabric=fabric,
        pcie=(f"pcie{min(entry['pcie'], 5)}", entry["pcie_gb_per_s"] * 1e9),
        usd_per_hour=sum(prices) / len(prices) if prices else None,
        watts=entry.get("watts"),
        unsourced=entry.get("unsourced", ""),
    )


def _data(name: str) -> dict[str, Any]:
    text = (resources.files("shoal.cluster") / name).read_text(encoding="utf-8")
    return cast(dict[str, Any], json.loads(text))
