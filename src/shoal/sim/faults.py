"""What happens to replicas while they serve: slow-downs, stalls, deaths, joins, drains.

At a time, or to whoever is just handed a request. Knows nothing of files.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestStall:
    """The replica that a request is handed to first does nothing for `seconds` from then on: so
    that it is met by that request, whatever the router knows of replicas by then.

    Attributes:
        request: its number, by arrival, from 0 on. One that is handed to nobody (refused, or
            answered along with an equal one) stalls nobody.
    """

    request: int
    seconds: float


class Faults:
    """All of a run.

    Attributes:
        timed: those that happen at a time, in its order.

    Raises:
        ConfigError: of a replica, an instance or a request that there is not.
    """

    def __init__(
        self,
        faults: Sequence[Fault | RequestStall],
        replicas: Sequence[ReplicaSetup],
        num_requests: int,
    ) -> None:
        self.timed = sorted(
            (each for each in faults if isinstance(each, Fault)), key=lambda each: each.at_s
        )
        _check_replicas(self.timed, replicas)
        self._stalls_s: dict[str, float] = {}
        for each in faults:
            if isinstance(each, RequestStall):
                _check_request(each.request, num_requests)
                known_s = self._stalls_s.get(str(each.request), 0.0)
                self._stalls_s[str(each.request)] = known_s + each.seconds

    def joins_later(self, replica: str) -> bool:
        """Whether it is not there from the start."""
        own = (each for each in self.timed if each.replica == replica and each.instance is None)
        return next((each.kind == "join" for each in own if each.kind in ("join", "lose")), False)

    def stall_s(self, request_id: str) -> float:
        """For how long whoever is handed that request now does nothing: once."""
        return self._stalls_s.pop(request_id, 0.0)


def drains(faults: Sequence[Fault | RequestStall]) -> bool:
    """Whether requests leave a replica that is there."""
    return any(isinstance(each, Fault) and each.kind == "drain" for each in faults)


def _check_replicas(faults: Sequence[Fault], replicas: Sequence[ReplicaSetup]) -> None:
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


def _check_request(request: int, num_requests: int) -> None:
    if not 0 <= request < num_requests:
        raise ConfigError(
            f"an event names request {request}; there are {num_requests}, by arrival from 0 on: "
            "name one of them"
        )
