"""Messages between a router and the engine process it started.

    router → engine   Launch, then Submit | Cancel; leaving is closing
    engine → router   Loading*, then Ready | LaunchFailed, then News*

Knows nothing of sockets.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from shoal.core.options import EngineOptions
from shoal.core.plan import ReplicaPlan
from shoal.core.request import GenerateRequest, Output
from shoal.core.stats import EngineInfo, EngineStats


@dataclass(frozen=True, slots=True)
class HostNet:
    """How a worker is started on a lab's host, and where it is reached.

    Attributes:
        command: what its argv is put behind (it must end in running that).
        address: of the interface its sockets are bound to.
    """

    command: tuple[str, ...]
    address: str


class Launch(msgspec.Struct, tag=True, frozen=True):
    """What to load.

    Attributes:
        replica: how the model is shared out; None: all of it on the device of `options`.
        hosts: those that the plan's ranks name.
    """

    options: EngineOptions
    replica: ReplicaPlan | None = None
    hosts: dict[str, HostNet] = {}


class Submit(msgspec.Struct, tag=True, frozen=True):
    request: GenerateRequest


class Cancel(msgspec.Struct, tag=True, frozen=True):
    request_id: str


ToEngine = Launch | Submit | Cancel


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


FromEngine = Loading | Ready | LaunchFailed | News
