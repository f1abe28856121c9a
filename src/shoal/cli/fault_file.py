"""Events of a simulation from a YAML file: what happens to replicas, and when.

    - {at: 60, replica: replica-0, slow: 0.5}               # runs at half its speed
    - {at: 75, replica: replica-0, stall: 2}                # it does nothing for 2 s, then goes on
    - {at: 90, replica: replica-0, instance: 1, lose: yes}  # an instance, counted over all stages
    - {at: 120, replica: replica-0, instance: 1, join: yes}
    - {at: 150, replica: replica-0, drain: yes}             # its requests move to others
    - {at: 180, replica: replica-0, resume: yes}
    - {request: 17, stall: 2}                               # of whoever is handed that one

Knows nothing of what follows from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from shoal.plan_file.fields import Field, read_fields
from shoal.sim import Fault
from shoal.sim.faults import FaultKind, RequestStall

_KINDS: tuple[FaultKind, ...] = ("slow", "stall", "lose", "join", "drain", "resume")
_MAX_EVENTS, _MAX_S, _MAX_INSTANCES, _MAX_REQUESTS = 10_000, 1e9, 4096, 10**9


def read_faults(path: Path) -> tuple[Fault | RequestStall, ...]:
    """
    Raises:
        ConfigError: with file and line.
    """
    return tuple(_fault(each) for each in read_fields(path).items(_MAX_EVENTS, least=0))


def _fault(place: Field) -> Fault | RequestStall:
    entries = place.entries(("at", "replica", "instance", "request", *_KINDS))
    if "request" in entries:
        return _request_stall(place, entries)
    for needed in ("at", "replica"):
        if needed not in entries:
            raise place.error(
                f"there is no key {needed}; an event needs at, replica and what it is, or "
                "request and stall"
            )
    said = [kind for kind in _KINDS if kind in entries]
    if len(said) != 1:
        raise place.error(
            f"an event has one of {', '.join(_KINDS)}, this has {len(said)}; write slow: 0.5, "
            "stall: 2, or lose, join, drain or resume: yes"
        )
    (kind,) = said
    if kind not in ("slow", "stall"):
        entries[kind].choice(("yes", "true"))
    return Fault(
        at_s=entries["at"].number(0.0, _MAX_S),
        replica=entries["replica"].text(),
        kind=kind,
        instance=entries["instance"].integer(0, _MAX_INSTANCES) if "instance" in entries else None,
        seconds=entries["stall"].number(0.0, _MAX_S) if kind == "stall" else 0.0,
        speed=entries["slow"].number(0.001, 1000.0) if kind == "slow" else 1.0,
    )


def _request_stall(place: Field, entries: Mapping[str, Field]) -> RequestStall:
    if entries.keys() != {"request", "stall"}:
        raise place.error(
            f"an event of a request has {', '.join(sorted(entries))}; it needs request and stall, "
            "as in {request: 17, stall: 2}, and happens to whichever replica gets it"
        )
    return RequestStall(
        request=entries["request"].integer(0, _MAX_REQUESTS),
        seconds=entries["stall"].number(0.0, _MAX_S),
    )
