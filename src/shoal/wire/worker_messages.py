"""Messages between an executor and the worker processes it started, and among workers.

    executor → worker   LaunchWorker, HoldBlocks, Connect, then Run | Release | Reset | Connect
                        | Lab | Deal | LendBlocks | EndLease
                        | PullBlocks | StopPull | DropPull;
                        StoreValue whenever its rendezvous asks; leaving is closing
    worker → executor   Bound, Loading*, Loaded | LaunchFailed, after Connect Warm,
                        then Beat*, Done, Failed, ResetDone, Pulled,
                        ExpertLoad*, Dealt

Workers among each other speak as `peer_messages.py` says. Processes that measure are started the
same way, and speak as `probe_messages.py` says.

Knows nothing of sockets.
"""

from __future__ import annotations

from typing import ClassVar

import msgspec

from shoal.core.kv import KVSource
from shoal.core.link_forms import FormSteps
from shoal.core.options import EngineOptions
from shoal.core.plan import ReplicaPlan
from shoal.core.split import Dealing, Range
from shoal.core.step import Step, StepResult
from shoal.core.step_times import StepTaken
from shoal.wire.curve import MeshKeys
from shoal.wire.messages import LaunchFailed, Loading
from shoal.wire.probe_messages import Answer, LaunchProbe, Question


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
        kv_keys: to exchange KV with workers of all replicas; None: it does not.
    """

    module: ClassVar[str] = "shoal.worker.process"

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
    kv_keys: MeshKeys | None = None

    @property
    def num_threads(self) -> int | None:
        return self.options.num_threads


class Connect(msgspec.Struct, tag=True, frozen=True):
    """Where other workers are, by name, over each of their networks; some may have moved."""

    addresses: dict[str, tuple[str, ...]]


class HoldBlocks(msgspec.Struct, tag=True, frozen=True):
    """Which KV blocks of its instance are the worker's, where ranks split KV by tokens.

    Goes before `Connect`.
    """

    blocks: Range


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


class Deal(msgspec.Struct, tag=True, frozen=True):
    """Other experts, for Steps of this dealing and later ones.

    Attributes:
        after: the last dealing that all ranks have loaded; what was dealt between is void.
        dealings: of the worker's instance, by layer of the model.
    """

    version: int
    after: int
    dealings: dict[int, Dealing]


class Forms(msgspec.Struct, tag=True, frozen=True):
    """In which form hidden states are sent to peers (activations), and among ranks (sums)."""

    links: dict[str, FormSteps]
    sums: FormSteps = ()


class StoreValue(msgspec.Struct, tag=True, frozen=True):
    """The answer to `StoreGet`."""

    key: str
    value: bytes


class LendBlocks(msgspec.Struct, tag=True, frozen=True):
    """Other workers may read these blocks until `EndLease`; said again when more are ready.

    Attributes:
        num_ready: the first ones, which nobody writes any more; the others still are written.
    """

    lease_id: int
    block_ids: tuple[int, ...]
    num_ready: int


class EndLease(msgspec.Struct, tag=True, frozen=True):
    lease_id: int


class PullBlocks(msgspec.Struct, tag=True, frozen=True):
    """Fill blocks with what a lease of other workers has of these layers.

    Attributes:
        first: of the lease's blocks; so many from there on as are to be filled.
    """

    pull_id: int
    lease_id: int
    first: int
    sources: tuple[KVSource, ...]
    layers: Range
    block_ids: tuple[int, ...]


class StopPull(msgspec.Struct, tag=True, frozen=True):
    """Ask for nothing more, and report what of a pull is whole."""

    pull_id: int


class DropPull(msgspec.Struct, tag=True, frozen=True):
    """Write nothing more of a pull: its blocks are others' from the next Step on."""

    pull_id: int


ToWorker = (
    LaunchWorker
    | HoldBlocks
    | Connect
    | Run
    | Release
    | Reset
    | Lab
    | Forms
    | Deal
    | StoreValue
    | LendBlocks
    | EndLease
    | PullBlocks
    | StopPull
    | DropPull
    | LaunchProbe
    | Question
)


class Bound(msgspec.Struct, tag=True, frozen=True):
    """Where the worker is reached, and its process.

    Attributes:
        addresses: over each network that its host is on; the one it was given first.
        kv_address: for KV, if it lends any.
    """

    addresses: tuple[str, ...]
    pid: int
    kv_address: str = ""


class Loaded(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """The worker has its part of the model; it goes on when it is told where the others are.

    Attributes:
        num_blocks: KV blocks that fit; None: it keeps no KV.
        weight_bytes, kv_bytes: what it holds.
        device, device_type, dtype, kernels: for people.
        digest: what, beside the checkpoint, the bytes of its KV follow from.
        disk: what layers on disk or in host memory cost, for people; "": all are on the device.
        expert_bytes: of one expert; 0: it has none.
        expert_room: how many more experts there is room for, over all of its layers.
    """

    num_blocks: int | None
    weight_bytes: int
    kv_bytes: int
    device: str
    device_type: str
    dtype: str
    kernels: str
    digest: str
    disk: str = ""
    expert_bytes: int = 0
    expert_room: int = 0


class LinkFacts(msgspec.Struct, frozen=True):
    """A link to a peer, as it was measured; `latency_s` is one way, of a small message."""

    peer: str
    interface: str
    latency_s: float
    bandwidth_bytes_per_s: float


class PaceFacts(msgspec.Struct, frozen=True, kw_only=True):
    """How fast a worker is, as it was measured.

    Attributes:
        step_s: of a Step of `step_tokens`.
        coding_s: to code one number to int8 and back.
        itemsize: bytes of a number that it sends exactly.
        gather_s, gather_bytes: of a small and of a large collective of its instance, and how large
            a part each rank gave; empty: it needs no network.
    """

    step_s: float
    step_tokens: int
    coding_s: float
    itemsize: int
    gather_s: tuple[float, ...] = ()
    gather_bytes: tuple[int, ...] = ()


class Warm(msgspec.Struct, tag=True, frozen=True):
    """The worker is ready: it has run a first Step, together with its instance's ranks.

    At the first start `links` are those to whom it sends; `pace` is measured where somebody is to
    be sent hidden states.
    """

    links: list[LinkFacts] = []
    pace: PaceFacts | None = None


class Beat(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Sent every quarter of a second from its own thread.

    Attributes:
        num_steps: finished since it began.
        busy_s: for how long it has been at the Step that runs; 0: none does.
        heard_s: seconds since each peer was last heard.
        taken: what the latest Steps took; rank 0 of its instance says it.
    """

    incarnation: int
    num_steps: int
    busy_s: float
    heard_s: dict[str, float]
    taken: tuple[StepTaken, ...] = ()


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


class Pulled(msgspec.Struct, tag=True, frozen=True):
    """A pull is over; its first `num_blocks` blocks are whole."""

    pull_id: int
    num_blocks: int


class ExpertLoad(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """What a worker did since the last one; sent every second while Steps run.

    Attributes:
        computed_s: spent on Steps, without waiting for other ranks; None: not known.
        tokens: of each of its layers, those that went to each expert of it; rank 0 says it, as all
            ranks know the same.
    """

    num_steps: int
    computed_s: float | None
    tokens: list[list[int]]


class Dealt(msgspec.Struct, tag=True, frozen=True):
    """A `Deal` can be switched to; or it cannot, because of a problem."""

    version: int
    problem: str | None = None


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
    | ExpertLoad
    | Dealt
    | Pulled
    | StoreSet
    | StoreGet
    | Answer
)
