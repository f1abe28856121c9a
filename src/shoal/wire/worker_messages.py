"""Messages between an executor and the worker processes it started, and among workers.

    executor → worker   LaunchWorker, Connect, then Run | Release | Reset | Connect | Lab;
                        StoreValue whenever its rendezvous asks; leaving is closing
    worker → executor   Bound, Loading*, Loaded | LaunchFailed, after Connect Warm,
                        then Beat*, Done, Failed, ResetDone
    worker → worker     Activations | Tokens | Go, over authenticated sockets (`wire/mesh.py`)

Knows nothing of sockets.
"""

from __future__ import annotations

import msgspec

from shoal.core.options import EngineOptions
from shoal.core.plan import ReplicaPlan
from shoal.core.step import Step, StepResult
from shoal.wire.curve import MeshKeys
from shoal.wire.messages import LaunchFailed, Loading


class LaunchWorker(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """What to load, and who the others are.

    Attributes:
        name: of the worker; among its peers too.
        options: the engine's, with what the plan says of this rank put in.
        replica, instance, rank: which part of the model is its own.
        incarnation: it takes Steps of this one and later ones.
        group: how the ranks of its instance reduce; "none": it is alone.
        group_fd: descriptor of their shared memory.
        address: where its sockets are bound.
        keys: its own, and by which it knows the others.
        speed: of a lab's device.
    """

    name: str
    options: EngineOptions
    replica: ReplicaPlan
    instance: int
    rank: int
    incarnation: int
    group: str
    group_fd: int | None
    address: str
    keys: MeshKeys
    speed: float = 1.0


class Connect(msgspec.Struct, tag=True, frozen=True):
    """Where other workers are, by name; those named before may have moved."""

    addresses: dict[str, str]


class Run(msgspec.Struct, tag=True, frozen=True):
    """One more Step of a route that the worker is on."""

    step: Step


class Release(msgspec.Struct, tag=True, frozen=True):
    """Sequences whose state may go; no Step on its way names them."""

    sequence_ids: tuple[int, ...]


class Reset(msgspec.Struct, tag=True, frozen=True):
    """Abandon what runs; only Steps of this incarnation count from now on."""

    incarnation: int


class Link(msgspec.Struct, frozen=True):
    """What a lab makes of the way to a peer."""

    cut: bool = False
    bandwidth_bytes_per_s: float | None = None
    latency_s: float = 0.0


class Lab(msgspec.Struct, tag=True, frozen=True):
    """A lab's settings: of the worker's device, and of its links by peer."""

    speed: float
    links: dict[str, Link]


class StoreValue(msgspec.Struct, tag=True, frozen=True):
    """The answer to `StoreGet`."""

    key: str
    value: bytes


ToWorker = LaunchWorker | Connect | Run | Release | Reset | Lab | StoreValue


class Bound(msgspec.Struct, tag=True, frozen=True):
    """Where the worker is reached, and its process."""

    address: str
    pid: int


class Loaded(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """The worker has its part of the model; it goes on when it is told where the others are.

    Attributes:
        num_blocks: KV blocks that fit; None: it keeps no KV.
        weight_bytes, kv_bytes: what it holds.
        device, device_type, dtype, kernels: for people.
        digest: what, beside the checkpoint, the bytes of its KV follow from.
    """

    num_blocks: int | None
    weight_bytes: int
    kv_bytes: int
    device: str
    device_type: str
    dtype: str
    kernels: str
    digest: str


class LinkFacts(msgspec.Struct, frozen=True):
    """A link to a peer, as it was measured; `latency_s` is one way, of a small message."""

    peer: str
    interface: str
    latency_s: float
    bandwidth_bytes_per_s: float


class Warm(msgspec.Struct, tag=True, frozen=True):
    """The worker is ready: it has run a first Step, together with its instance's ranks.

    `links`: to those that it sends to, at the first start.
    """

    links: list[LinkFacts] = []


class Beat(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Sent every quarter of a second from its own thread.

    Attributes:
        num_steps: finished since it began.
        busy_s: for how long it has been at the Step that runs; 0: none does.
        heard_s: seconds since each peer was last heard.
    """

    incarnation: int
    num_steps: int
    busy_s: float
    heard_s: dict[str, float]


class Done(msgspec.Struct, tag=True, frozen=True):
    result: StepResult


class Failed(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """A Step that did not finish.

    Attributes:
        blames_step: False: the ranks lost each other, which no Step is to blame for.
    """

    step_id: int
    incarnation: int
    reason: str
    blames_step: bool


class ResetDone(msgspec.Struct, tag=True, frozen=True):
    incarnation: int


class StoreSet(msgspec.Struct, tag=True, frozen=True):
    """A value of the rendezvous of the worker's instance."""

    key: str
    value: bytes


class StoreGet(msgspec.Struct, tag=True, frozen=True):
    """Wants a value as soon as it is set."""

    key: str


FromWorker = (
    Bound
    | Loading
    | Loaded
    | LaunchFailed
    | Warm
    | Beat
    | Done
    | Failed
    | ResetDone
    | StoreSet
    | StoreGet
)


class Activations(msgspec.Struct, tag=True, frozen=True):
    """Goes before the bytes of a Step's hidden states [num_tokens, hidden size]."""

    incarnation: int
    step_id: int
    num_tokens: int
    dtype: str


class Tokens(msgspec.Struct, tag=True, frozen=True):
    """What a Step sampled, row by row; -1: that row did not."""

    incarnation: int
    step_id: int
    token_ids: tuple[int, ...]


class Go(msgspec.Struct, tag=True, frozen=True):
    """The Step that the ranks of an instance run next."""

    incarnation: int
    step_id: int


PeerMessage = Activations | Tokens | Go
