"""What an engine is told (events) and what it asks for (effects).

Knows nothing of who tells or who does it: a live loop, a test, the simulator.
"""

from __future__ import annotations

from dataclasses import dataclass

from shoal.core.kv import KVArrived, KVLoan, KVOffer, KVPull
from shoal.core.request import ErrorInfo, GenerateRequest, Grammar, Output
from shoal.core.step import InstancesReady, Step, StepFailure, StepResult
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
    """Lend the KV of a request, for so long at most; answered by `LendKV`, if with nothing."""

    lease_id: int
    request_id: str
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
    | EndLease
    | Receive
    | KVArrived
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
class EndLoan:
    """Let nobody read the blocks of a lease any more: the next Steps may write them."""

    lease_id: int


@dataclass(frozen=True, slots=True)
class PullKV:
    """Fill blocks with KV from elsewhere; send `KVArrived` when that is over."""

    pull: KVPull


@dataclass(frozen=True, slots=True)
class DropKV:
    """Write nothing more of a pull: the next Steps may use its blocks."""

    pull_id: int


@dataclass(frozen=True, slots=True)
class TellPulled:
    """For whoever made the offer: its first `num_blocks` blocks are here."""

    pull_id: int
    num_blocks: int


KVEffect = LendKV | EndLoan | PullKV | DropKV | TellPulled
Effect = RunStep | Emit | CompileGrammar | KVEffect
