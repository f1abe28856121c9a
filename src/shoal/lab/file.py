"""lab.yaml: a plan file with two more keys.

    model: smollm2-135m
    stages:
      - {layers: 0-15, devices: [{device: cpu, host: a}]}
      - {layers: 15-30, devices: [{device: cpu, host: b, speed: 0.3}]}
    hosts: [a, b]                               # left out: those that devices name
    links:
      default: {bandwidth: 20Mbit}              # of every pair of hosts
      a|b: {bandwidth: 100Mbit, latency: 5ms}   # of these two

`plan: plan.yaml`, beside the lab file, may stand for model, stages and routes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from shoal.plan_file import PlanFile, read_plan
from shoal.plan_file.drafts import PLAN_KEYS
from shoal.plan_file.fields import Field, read_fields
from shoal.plan_file.reader import plan_of

MAX_HOSTS = 16

_HOST = re.compile(r"[a-z0-9]{1,8}")
_BITS = {"bit": 1, "kbit": 10**3, "mbit": 10**6, "gbit": 10**9}
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


@dataclass(frozen=True, slots=True)
class LinkSpeed:
    """How good a link is; None and 0: as good as it comes."""

    bandwidth_bytes_per_s: float | None = None
    latency_s: float = 0.0


Pair = tuple[str, str]


def pair(one: str, other: str) -> Pair:
    """Two hosts or workers, whichever is named first."""
    return (one, other) if one < other else (other, one)


@dataclass(frozen=True, slots=True, kw_only=True)
class LabFile:
    """A lab: `hosts` in order, and a link for each pair of them that has one."""

    plan: PlanFile
    hosts: tuple[str, ...]
    links: Mapping[Pair, LinkSpeed]


def read_lab(path: Path) -> LabFile:
    """A lab file.

    Raises:
        ConfigError: with file and line.
    """
    root = read_fields(path)
    entries = root.entries((*PLAN_KEYS, "plan", "hosts", "links"))
    plan = _plan(entries, root, path)
    named = _named_hosts(plan)
    hosts = _hosts(entries["hosts"]) if "hosts" in entries else tuple(named)
    for name, place in named.items():
        if name not in hosts:
            raise place.error(f"host {name!r} is none of hosts: {', '.join(hosts)}; add it there")
        if not _HOST.fullmatch(name):
            raise place.error(_bad_host(name))
    if len(hosts) > MAX_HOSTS:
        raise root.error(f"{len(hosts)} hosts; a lab has {MAX_HOSTS} at most: name fewer")
    if hosts:
        _require_hosts(plan)
    links = _links(entries["links"], hosts) if "links" in entries else {}
    return LabFile(plan=plan, hosts=hosts, links=links)


def _plan(entries: Mapping[str, Field], root: Field, path: Path) -> PlanFile:
    if "plan" not in entries:
        return _one_replica(plan_of(entries, root), root)
    for key in PLAN_KEYS:
        if key in entries:
            raise entries[key].error(f"{key} stands beside plan, which says it; remove one")
    return _one_replica(read_plan(path.parent / entries["plan"].text()), entries["plan"])


def _one_replica(plan: PlanFile, place: Field) -> PlanFile:
    if len(plan.drafts) > 1:
        raise place.error(f"the plan has {len(plan.drafts)} replicas; a lab runs one: keep one")
    return plan


def _devices(plan: PlanFile) -> list[tuple[str | None, Field]]:
    """The host that each device names, and where."""
    return [
        (rank.host, place)
        for stage in plan.drafts[0].stages
        for instance in stage.instances
        for rank, place in zip(instance.ranks, instance.device_places, strict=True)
    ]


def _named_hosts(plan: PlanFile) -> dict[str, Field]:
    named: dict[str, Field] = {}
    for host, place in _devices(plan):
        if host is not None:
            named.setdefault(host, place)
    return named


def _require_hosts(plan: PlanFile) -> None:
    for host, place in _devices(plan):
        if host is None:
            raise place.error(
                "this device names no host, and the lab has some; add one: "
                "{device: cpu, host: NAME}"
            )


def _hosts(place: Field) -> tuple[str, ...]:
    names: list[str] = []
    for each in place.items(MAX_HOSTS):
        name = each.text()
        if not _HOST.fullmatch(name):
            raise each.error(_bad_host(name))
        if name in names:
            raise each.error(f"host {name} stands there twice; remove one")
        names.append(name)
    return tuple(names)


def _bad_host(name: str) -> str:
    return f"a host is called {name!r}; use up to 8 small letters and digits"


def _links(place: Field, hosts: tuple[str, ...]) -> dict[Pair, LinkSpeed]:
    entries = place.entries()
    links: dict[Pair, LinkSpeed] = {}
    if "default" in entries:
        speed = _speed(entries.pop("default"))
        links = {(one, other): speed for one in hosts for other in hosts if one < other}
    for name, field in entries.items():
        one, _, other = (part.strip() for part in name.partition("|"))
        if one not in hosts or other not in hosts or one == other:
            raise field.error(
                f"a link is called {name!r}; it must be two of the hosts ({', '.join(hosts)}) "
                "with | between them, or default"
            )
        links[pair(one, other)] = _speed(field)
    return links


def _speed(place: Field) -> LinkSpeed:
    entries = place.entries(("bandwidth", "latency"))
    bandwidth = latency = None
    if "bandwidth" in entries:
        needed = "a rate such as 20Mbit (per second)"
        bandwidth = _quantity(entries["bandwidth"], _BITS, needed) / 8
        if not 125 <= bandwidth <= 125e9:
            raise entries["bandwidth"].wrong("from 1Kbit to 1000Gbit")
    if "latency" in entries:
        latency = _quantity(entries["latency"], _SECONDS, "a time such as 5ms")
        if latency > 10:
            raise entries["latency"].wrong("10s at most")
    return LinkSpeed(bandwidth, latency or 0.0)


def _quantity(place: Field, units: Mapping[str, float], needed: str) -> float:
    found = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,6})?) *([A-Za-z]+)", place.text())
    if not found or found[2].lower() not in units:
        raise place.wrong(needed)
    return float(found[1]) * units[found[2].lower()]
