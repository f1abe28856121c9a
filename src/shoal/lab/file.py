"""lab.yaml: hosts and links, and a plan for them.

    model: smollm2-135m
    stages:
      - {layers: 0-15, devices: [{device: cpu, host: a}]}
      - {layers: 15-30, devices: [{device: cpu, host: b, speed: 0.3}]}
    hosts: [a, b]                               # left out: those that devices name; or
    hosts: {a: {speed: 1.0}, b: {speed: 0.5, threads: 1}}   # whatever plan runs on them
    links:
      default: {bandwidth: 20Mbit}              # of every pair of hosts
      a|b: {bandwidth: 100Mbit, latency: 5ms}   # of these two

`plan: plan.yaml`, beside the lab file, may stand for model, stages and routes. Hosts with a speed
need no plan in the file: one may come from elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from shoal.core.errors import ConfigError
from shoal.core.plan import RankPlan, ReplicaPlan
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


@dataclass(frozen=True, slots=True)
class LabHost:
    """A host's CPUs: their speed, and how many threads work there; None: an even part."""

    speed: float = 1.0
    num_threads: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LabFile:
    """A lab.

    Attributes:
        plan: None: the file has none.
        hosts: in order.
        links: of each pair of hosts that has one.
        own: of hosts that say themselves what they are, all or none.
    """

    plan: PlanFile | None
    hosts: tuple[str, ...]
    links: Mapping[Pair, LinkSpeed]
    own: Mapping[str, LabHost] = field(default_factory=dict)

    def cpus(self, num_cpus: int) -> tuple[RankPlan, ...]:
        """What there is to measure: a CPU of each host, as any plan would find it.

        Raises:
            ConfigError: the file says of no host what it is.
        """
        if not self.own:
            raise ConfigError(
                "the lab's hosts have no speeds of their own; say them: hosts: {a: {speed: 1.0}}"
            )
        return tuple(self._rank(RankPlan(device="cpu", host=host), num_cpus) for host in self.own)

    def with_hosts(self, replica: ReplicaPlan, num_cpus: int) -> ReplicaPlan:
        """The same on this lab's hosts, where they say what they are.

        Raises:
            ConfigError: a rank has a speed of its own.
        """
        if not self.own:
            return replica
        stages = tuple(
            replace(
                stage,
                instances=tuple(
                    replace(each, ranks=tuple(self._rank(rank, num_cpus) for rank in each.ranks))
                    for each in stage.instances
                ),
            )
            for stage in replica.stages
        )
        return replace(replica, stages=stages)

    def _rank(self, rank: RankPlan, num_cpus: int) -> RankPlan:
        host = self.own[rank.host or ""]
        num_threads = host.num_threads or max(num_cpus // len(self.own), 1)
        if rank.speed not in (1.0, host.speed):
            raise ConfigError(
                f"the plan runs host {rank.host} at speed {rank.speed:g}, the lab at "
                f"{host.speed:g}; remove the plan's"
            )
        return replace(rank, speed=host.speed, num_threads=rank.num_threads or num_threads)


def read_lab(path: Path, plan_path: Path | None = None) -> LabFile:
    """A lab file.

    Args:
        plan_path: of a plan, that stands for the file's own.

    Raises:
        ConfigError: with file and line.
    """
    root = read_fields(path)
    entries = root.entries((*PLAN_KEYS, "plan", "hosts", "links"))
    plan = _plan(entries, root, path) if plan_path is None else read_plan(plan_path)
    named = _named_hosts(plan) if plan is not None else {}
    own = _own(entries["hosts"]) if "hosts" in entries and entries["hosts"].is_mapping else {}
    hosts = tuple(own) or (_hosts(entries["hosts"]) if "hosts" in entries else tuple(named))
    for name, place in named.items():
        if name not in hosts:
            raise place.error(f"host {name!r} is none of hosts: {', '.join(hosts)}; add it there")
        if not _HOST.fullmatch(name):
            raise place.error(_bad_host(name))
    if len(hosts) > MAX_HOSTS:
        raise root.error(f"{len(hosts)} hosts; a lab has {MAX_HOSTS} at most: name fewer")
    if hosts and plan is not None:
        _require_hosts(plan)
    links = _links(entries["links"], hosts) if "links" in entries else {}
    return LabFile(plan=plan, hosts=hosts, links=links, own=own)


def _plan(entries: Mapping[str, Field], root: Field, path: Path) -> PlanFile | None:
    if "plan" not in entries:
        has_own = "hosts" in entries and entries["hosts"].is_mapping
        has_plan = any(key in entries for key in PLAN_KEYS)
        return plan_of(entries, root) if has_plan or not has_own else None
    for key in PLAN_KEYS:
        if key in entries:
            raise entries[key].error(f"{key} stands beside plan, which says it; remove one")
    return read_plan(path.parent / entries["plan"].text())


def _devices(plan: PlanFile) -> list[tuple[str | None, Field]]:
    """The host that each device names, and where."""
    return [
        (rank.host, place)
        for draft in plan.drafts
        for stage in draft.stages
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


def _own(place: Field) -> dict[str, LabHost]:
    own = {}
    for key, value in place.pairs():
        name = key.text()
        if not _HOST.fullmatch(name):
            raise key.error(_bad_host(name))
        if name in own:
            raise key.error(f"host {name} stands there twice; remove one")
        entries = value.entries(("speed", "threads"))
        own[name] = LabHost(
            speed=entries["speed"].number(0.001, 1.0) if "speed" in entries else 1.0,
            num_threads=entries["threads"].integer(1, 1024) if "threads" in entries else None,
        )
    if not own:
        raise place.error("hosts are empty; name one at least: hosts: {a: {speed: 1.0}}")
    return own


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
    for name, value in entries.items():
        one, _, other = (part.strip() for part in name.partition("|"))
        if one not in hosts or other not in hosts or one == other:
            raise value.error(
                f"a link is called {name!r}; it must be two of the hosts ({', '.join(hosts)}) "
                "with | between them, or default"
            )
        links[pair(one, other)] = _speed(value)
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
