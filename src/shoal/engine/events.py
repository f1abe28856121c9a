"""What an engine is told (events) and what it asks for (effects).

Knows nothing of who tells or who does it: a live loop, a test, the simulator.
"""

from __future__ import annotations

from dataclasses import dataclass

from shoal.core.kv import KVArrived, KVHop, KVLoan, KVOffer, KVPull
from shoal.core.request import ErrorInfo, GenerateRequest, Grammar, Output
from shoal.core.step import InstancesReady, Step, StepFailure, StepResult
from shoal.engine.blocks import BlockName
from shoal.engine.sequence import GrammarMatcher


@dataclass(frozen=True, slots=True)
class Submit:
    """A new request."""

    request: GenerateRequest


@dataclass(frozen=True, slots=True)
class Cancel:
    """Nobody wants this request any more; unknown ids are ignored."""

    request_id: str


@dataclass(frozen=True, slots=True)
class GrammarStarted:
    """Its compilation has begun; from now on its time limit runs."""

    request_id: str


@dataclass(frozen=True, slots=True)
class GrammarReady:
    request_id: str
    matcher: GrammarMatcher


@dataclass(frozen=True, slots=True)
class GrammarFailed:
    request_id: str
    error: ErrorInfo


@dataclass(frozen=True, slots=True)
class Lend:
    """Lend the KV of a request, for so long at most; answered by `LendKV`, if with nothing.

    Attributes:
        ahead: also what of its prompt is still to be computed, as it comes; answered when the
            request runs.
    """

    lease_id: int
    request_id: str
    ttl_s: float
    ahead: bool = False


@dataclass(frozen=True, slots=True)
class LendPrefix:
    """Lend as many of these blocks, from the first on, as are here; answered by `LendKV`."""

    lease_id: int
    names: tuple[BlockName, ...]
    ttl_s: float


@dataclass(frozen=True, slots=True)
class EndLease:
    """The borrower is done; unknown leases are ignored."""

    lease_id: int


@dataclass(frozen=True, slots=True)
class Receive:
    """Get the KV of an offer, within so long; answered by `TellPulled`."""

    offer: KVOffer
    ttl_s: float


@dataclass(frozen=True, slots=True)
class DrainInstance:
    """Sequences leave an instance, and no new ones come, while there is another way; or no more."""

    instance: int
    is_drained: bool


@dataclass(frozen=True, slots=True)
class InstancesSlow:
    """Instances whose Steps lately take so many times as long as usual; others do not."""

    times: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class StepsDecoded:
    """Results of a run (`EngineState.decode_run`), more of them than Steps are in flight, and the
    Ticks after them; answered with the Steps that are in flight then, instead of those before.

    Attributes:
        token_ids: of each of its requests, what all of these Steps sampled.
        compute_s: of each Step.
        chunks: tokens of its prompt, if it has one, in each Step that was handed out meanwhile.
    """

    token_ids: tuple[int, ...]
    compute_s: tuple[float, ...]
    chunks: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Tick:
    """All that was there has been handled: look at deadlines, hand out Steps."""


Event = (
    Submit
    | Cancel
    | GrammarStarted
    | GrammarReady
    | GrammarFailed
    | StepResult
    | StepFailure
    | InstancesReady
    | Lend
    | LendPrefix
    | EndLease
    | Receive
    | KVArrived
    | DrainInstance
    | InstancesSlow
    | StepsDecoded
    | Tick
)


@dataclass(frozen=True, slots=True)
class RunStep:
    """Hand this Step to the workers."""

    step: Step


@dataclass(frozen=True, slots=True)
class Emit:
    """News for whoever asked."""

    output: Output


@dataclass(frozen=True, slots=True)
class CompileGrammar:
    """Compile off the loop; send GrammarStarted, then GrammarReady or GrammarFailed.

    The matcher must already have consumed `prefix_ids`.
    """

    request_id: str
    grammar: Grammar
    prefix_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LendKV:
    """Let these blocks be read, and offer them by their names."""

    loan: KVLoan
    names: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class GrowLoan:
    """More of a loan's blocks are ready; or those that are not will never be, and are left out."""

    loan: KVLoan


@dataclass(frozen=True, slots=True)
class EndLoan:
    """Let nobody read the blocks of a lease any more: the next Steps may write them."""

    lease_id: int


@dataclass(frozen=True, slots=True)
class PullKV:
    """Fill blocks with KV from elsewhere; send `KVArrived` when that is over."""

    pull: KVPull


@dataclass(frozen=True, slots=True)
class CopyKV:
    """Fill blocks with KV of other instances of this replica; send `KVArrived` when that is over.

    Attributes:
        loan: what is copied; the copy is a pull of the same number.
        first: of its blocks; each of `hops` gets as many from there on as it names.
    """

    loan: KVLoan
    first: int
    hops: tuple[KVHop, ...]


@dataclass(frozen=True, slots=True)
class StopKV:
    """A pull has taken long enough: send `KVArrived` with what is whole."""

    pull_id: int


@dataclass(frozen=True, slots=True)
class DropKV:
    """Write nothing more of a pull: the next Steps may use its blocks."""

    pull_id: int


@dataclass(frozen=True, slots=True)
class TellPulled:
    """For whoever made the offer: its first `num_blocks` blocks are here."""

    pull_id: int
    num_blocks: int


KVEffect = LendKV | GrowLoan | EndLoan | PullKV | CopyKV | StopKV | DropKV | TellPulled
Effect = RunStep | Emit | CompileGrammar | KVEffect
