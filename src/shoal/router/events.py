"""What a router is told (events) and what it asks for (effects)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shoal.core.kv import KVOffer
from shoal.core.request import ErrorInfo, GenerateRequest, Output
from shoal.core.stats import Computed, EngineInfo, Lag
from shoal.engine.blocks import BlockName


@dataclass(frozen=True, slots=True)
class Submit:
    """A new request."""

    request: GenerateRequest


@dataclass(frozen=True, slots=True)
class Cancel:
    """Nobody wants this request any more; unknown ids are ignored."""

    request_id: str


@dataclass(frozen=True, slots=True)
class ReplicaReady:
    """A replica can take requests; `incarnation` counts its restarts.

    Of one that runs, and has not been restarted: `info.restarts` is another one from now on.
    """

    replica: str
    incarnation: int
    info: EngineInfo


@dataclass(frozen=True, slots=True)
class ReplicaLost:
    """A replica's process is gone; `final`: it will not come back."""

    replica: str
    incarnation: int
    reason: str
    final: bool = False


@dataclass(frozen=True, slots=True)
class ReplicaStuck:
    """A replica runs, but nothing of it goes on until its workers are back; or they are."""

    replica: str
    incarnation: int
    is_stuck: bool


@dataclass(frozen=True, slots=True)
class ReplicaOutputs:
    """What a replica produced: its Step's outputs come together.

    Attributes:
        computed: all that it has, by then; None: it does not tell.
    """

    replica: str
    incarnation: int
    outputs: Sequence[Output]
    computed: Computed | None = None


@dataclass(frozen=True, slots=True)
class AttemptFailed:
    """A replica will not do what it was sent; another one may.

    Attributes:
        request_id: as the replica was told.
    """

    replica: str
    incarnation: int
    request_id: str
    error: ErrorInfo


@dataclass(frozen=True, slots=True)
class AttemptHeld:
    """What a replica says is not read for now, as the client is slow; or it is again.

    Attributes:
        request_id: as the replica was told.
    """

    replica: str
    incarnation: int
    request_id: str
    is_held: bool


@dataclass(frozen=True, slots=True)
class KVLent:
    """A replica lends the KV that it was asked for; without names, there is none."""

    replica: str
    incarnation: int
    offer: KVOffer


@dataclass(frozen=True, slots=True)
class KVPulled:
    """A replica has got what it will of an offer: its first `num_blocks` blocks."""

    replica: str
    incarnation: int
    move_id: int
    num_blocks: int


@dataclass(frozen=True, slots=True)
class DrainReplica:
    """Move what runs there to other replicas, and send nothing more."""

    replica: str


@dataclass(frozen=True, slots=True)
class ResumeReplica:
    """Send requests there again."""

    replica: str


@dataclass(frozen=True, slots=True)
class Drain:
    """Admit nothing more; finish what runs."""


@dataclass(frozen=True, slots=True)
class Abandon:
    """Drain time is over: end what still runs with an error."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Look at deadlines."""


Event = (
    Submit
    | Cancel
    | ReplicaReady
    | ReplicaLost
    | ReplicaStuck
    | ReplicaOutputs
    | AttemptFailed
    | AttemptHeld
    | KVLent
    | KVPulled
    | DrainReplica
    | ResumeReplica
    | Drain
    | Abandon
    | Tick
)


@dataclass(frozen=True, slots=True)
class Send:
    """Hand a request to a replica."""

    replica: str
    request: GenerateRequest


@dataclass(frozen=True, slots=True)
class CancelAt:
    replica: str
    request_id: str


@dataclass(frozen=True, slots=True)
class Deliver:
    """News for whoever made the requests: a Step's come together."""

    outputs: Sequence[Output]


@dataclass(frozen=True, slots=True)
class LendAt:
    """Ask a replica for the KV of a request, for so long at most.

    Attributes:
        ahead: also for what of it is still to be computed.
    """

    replica: str
    move_id: int
    request_id: str
    ttl_s: float
    ahead: bool = False


@dataclass(frozen=True, slots=True)
class LendPrefixAt:
    """Ask a replica for blocks that it may have, for so long at most."""

    replica: str
    move_id: int
    names: tuple[BlockName, ...]
    ttl_s: float


@dataclass(frozen=True, slots=True)
class PullAt:
    """Have a replica get the KV of an offer, within so long."""

    replica: str
    offer: KVOffer
    ttl_s: float


@dataclass(frozen=True, slots=True)
class EndLeaseAt:
    """What a replica lends for a move is not needed any more."""

    replica: str
    move_id: int


@dataclass(frozen=True, slots=True)
class ReplanNeeded:
    """A replica has been slow for long: another plan would carry more."""

    replica: str
    lag: Lag


Effect = ReplanNeeded | Send | CancelAt | Deliver | LendAt | LendPrefixAt | PullAt | EndLeaseAt
