"""Messages between a router and the engine process it started.

    router → engine   Launch, then Submit | Cancel | LendKV | LendPrefix | EndLease | ReceiveKV;
                      leaving is closing
    engine → router   Loading*, then Ready | LaunchFailed, then (News | Lent | Pulled | StepsTook)*

Knows nothing of sockets.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from shoal.core.kv import KVOffer
from shoal.core.options import EngineOptions
from shoal.core.plan import ReplicaPlan
from shoal.core.request import GenerateRequest, Output
from shoal.core.stats import EngineInfo, EngineStats
from shoal.core.step_times import InstanceStep
from shoal.wire.kv_messages import KVKeys


@dataclass(frozen=True, slots=True)
class ClusterNet:
    """A cluster that `shoal up` started, as its head's machine reaches it.

    Attributes:
        address: HOST:PORT of its head.
        token_file: holds the cluster's token.
        here: this machine's address in it.
        model: what the user called the model, for nodes that must find it themselves.
    """

    address: str
    token_file: str
    here: str
    model: str


@dataclass(frozen=True, slots=True)
class HostNet:
    """How a worker is started on a host, and where it is reached.

    Attributes:
        command: of a lab: what its argv is put behind (it must end in running that).
        address: of a lab: of the interface its sockets are bound to.
        cluster: that has this host; it starts workers there, and knows its address.
    """

    command: tuple[str, ...]
    address: str
    cluster: ClusterNet | None = None


class Launch(msgspec.Struct, tag=True, frozen=True):
    """What to load.

    Attributes:
        replica: how the model is shared out; None: all of it on the device of `options`.
        hosts: those that the plan's ranks name.
        kv_keys: by which its workers exchange KV with those of all replicas; None: they do not.
        record: folder and name of a recording of its decisions; None: there is none.
    """

    options: EngineOptions
    replica: ReplicaPlan | None = None
    hosts: dict[str, HostNet] = {}
    kv_keys: KVKeys | None = None
    record: tuple[str, str] | None = None


class Submit(msgspec.Struct, tag=True, frozen=True):
    request: GenerateRequest


class Cancel(msgspec.Struct, tag=True, frozen=True):
    request_id: str


class LendKV(msgspec.Struct, tag=True, frozen=True):
    """Let others read the KV of a request, for so long at most; answered by `Lent`.

    Attributes:
        ahead: also what of it is still to be computed, as it comes.
    """

    lease_id: int
    request_id: str
    ttl_s: float
    ahead: bool = False


class LendPrefix(msgspec.Struct, tag=True, frozen=True):
    """Let others read the blocks of these names, from the first on, as far as they are there;
    answered by `Lent`."""

    lease_id: int
    names: tuple[bytes, ...]
    ttl_s: float


class EndLease(msgspec.Struct, tag=True, frozen=True):
    """Nobody reads it any more."""

    lease_id: int


class ReceiveKV(msgspec.Struct, tag=True, frozen=True):
    """Get the KV of an offer, within so long; answered by `Pulled`."""

    offer: KVOffer
    ttl_s: float


class DrainInstance(msgspec.Struct, tag=True, frozen=True):
    """Let requests leave an instance, or come to it again."""

    instance: int
    is_drained: bool


ToEngine = Launch | Submit | Cancel | LendKV | LendPrefix | EndLease | ReceiveKV | DrainInstance


class Loading(msgspec.Struct, tag=True, frozen=True):
    """How far loading is: `done` of `total` bytes of weights, or a line for people."""

    line: str = ""
    done_bytes: int = 0
    total_bytes: int = 0


class Ready(msgspec.Struct, tag=True, frozen=True):
    info: EngineInfo


class LaunchFailed(msgspec.Struct, tag=True, frozen=True):
    """The model or the device could not be used; the message is for people."""

    message: str


class News(msgspec.Struct, tag=True, frozen=True):
    """Outputs since the last one, and the engine's state; also sent when idle, as heartbeat."""

    outputs: list[Output]
    stats: EngineStats


class Lent(msgspec.Struct, tag=True, frozen=True):
    """What others may read; an offer without names: there is nothing to be had."""

    offer: KVOffer


class Pulled(msgspec.Struct, tag=True, frozen=True):
    """Getting KV is over: the first `num_blocks` blocks of the offer are here."""

    lease_id: int
    num_blocks: int


class StepsTook(msgspec.Struct, tag=True, frozen=True):
    """What Steps took since the last one, or the latest of them."""

    steps: tuple[InstanceStep, ...]


FromEngine = Loading | Ready | LaunchFailed | News | Lent | Pulled | StepsTook
