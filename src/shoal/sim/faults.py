"""What happens to replicas while they serve: slow-downs, stalls, deaths, joins, drains.

Knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from shoal.core.errors import ConfigError
from shoal.sim.setup import ReplicaSetup

FaultKind = Literal["slow", "stall", "lose", "join", "drain", "resume"]

_OF_ALL: tuple[FaultKind, ...] = ("stall", "drain", "resume")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Something that happens to a replica, or to one of its instances.

    Attributes:
        instance: None: the whole replica.
        kind: "slow": it runs at `speed` of itself from its next Step on; "stall": all of it does
            nothing for `seconds`, and then goes on; "lose": it is gone, with its KV; "join": it is
            there again, empty; "drain": its requests move to others, until "resume". A replica
            of which the first that happens is that it joins is not there before.
    """

    at_s: float
    replica: str
    kind: FaultKind
    instance: int | None = None
    speed: float = 1.0
    seconds: float = 0.0


def check_faults(faults: Sequence[Fault], replicas: Sequence[ReplicaSetup]) -> None:
    """
    Raises:
        ConfigError: of a replica or an instance that there is not.
    """
    known = {each.name: len(each.config.instance_blocks) for each in replicas}
    for fault in faults:
        if fault.kind in _OF_ALL and fault.instance is not None:
            raise ConfigError(
                f"an event {fault.kind}s instance {fault.instance} of replica {fault.replica}; "
                "only all of a replica can: leave the instance out"
            )
        if fault.replica not in known:
            raise ConfigError(
                f"an event names replica {fault.replica!r}; there are {', '.join(known)}"
            )
        most = known[fault.replica] - 1
        if fault.instance is not None and not 0 <= fault.instance <= most:
            raise ConfigError(
                f"an event names instance {fault.instance} of replica {fault.replica}, which has "
                f"0-{most}; name one of them, or leave it out for the whole replica"
            )


def joins_later(replica: str, faults: Sequence[Fault]) -> bool:
    """Whether it is not there from the start.

    Args:
        faults: in order of time.
    """
    own = (each.kind for each in faults if each.replica == replica and each.instance is None)
    return next((kind == "join" for kind in own if kind in ("join", "lose")), False)


def drains(faults: Sequence[Fault]) -> bool:
    """Whether requests leave a replica that is there."""
    return any(each.kind == "drain" for each in faults)
