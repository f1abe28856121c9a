"""`Step` and `StepResult`: the only seam between an engine and its workers.

A Step is one micro-batch: rows of new tokens, each with where its KV lives. There are no
prefill or decode phases, only tokens to compute. Several Steps are in flight, and workers
run them in order, so a row may end in a token not yet known: «the token of step k, row r».

    position   0 ............ start ............ start+len
               [ KV in blocks ][ token_ids | token_ref ]  → samples the token at start+len

Knows nothing of torch, queues or requests' text.
"""

from __future__ import annotations

from dataclasses import dataclass

from shoal.core.kv import KVArrived
from shoal.core.request import SamplingParams, TokenLogprobs

BLOCK_SIZE = 16
"""Tokens in a KV block."""


@dataclass(frozen=True, slots=True)
class TokenRef:
    """The token that step `step_id` sampled in its row `row`."""

    step_id: int
    row: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceStart:
    """What the sampler must know of a sequence: sent before its first row, and again when it
    is rebuilt (after preemption or on a restarted worker).

    `token_ids` are the prompt and the outputs known so far; outputs begin at `prompt_len`.
    """

    token_ids: tuple[int, ...]
    prompt_len: int
    sampling: SamplingParams
    eos_token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRow:
    """New tokens of one sequence.

    Attributes:
        sequence_id: the worker's key to the sampler's state; never reused.
        start: absolute position of the first new token.
        token_ids: new tokens that are known.
        token_ref: one more new token, after `token_ids`, still in flight.
        block_ids: for each hop of the Step's route, the physical KV blocks of its instance that
            cover positions [0, start + num_tokens).
        samples: sample the token that follows the last new one.
        mask: allowed token ids as a little-endian bitmask of the vocabulary; None: all.
        start_state: the sampler's state, when the worker does not have it.
    """

    sequence_id: int
    start: int
    token_ids: tuple[int, ...]
    block_ids: tuple[tuple[int, ...], ...]
    token_ref: TokenRef | None = None
    samples: bool = False
    mask: bytes | None = None
    start_state: SequenceStart | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids) + (self.token_ref is not None)

    @property
    def end(self) -> int:
        return self.start + self.num_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One micro-batch of work for a replica.

    Attributes:
        step_id: counts up from 0 within an incarnation.
        incarnation: of the workers; a Step for an older one is dropped.
        weights_version, route: which weights, and which chain of instances, it runs on.
        rows: at most one per sequence.
        released: sequences whose sampler state may go; no later Step names them.
        num_hops: only so many hops of the route are run, and nothing is sampled (the KV of a
            lost instance is rebuilt); None: all of them.
        dealing: of experts: from this Step on, dealings of up to this version hold.
    """

    step_id: int
    rows: tuple[StepRow, ...]
    released: tuple[int, ...] = ()
    incarnation: int = 0
    weights_version: int = 0
    route: int = 0
    num_hops: int | None = None
    dealing: int = 0

    @property
    def num_tokens(self) -> int:
        return sum(row.num_tokens for row in self.rows)


@dataclass(frozen=True, slots=True)
class RowResult:
    """What one row gave.

    Attributes:
        token_id: the sampled token; None if the row did not sample.
        logprobs: of the sampled token, if the sequence asked for them.
        prompt_logprobs: of the prompt tokens at positions start+1 .. end (inside the prompt).
    """

    token_id: int | None = None
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What a Step gave, row by row; `compute_s` is the workers' own time for it."""

    step_id: int
    rows: tuple[RowResult, ...]
    incarnation: int = 0
    compute_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFailure:
    """Workers failed: everything in flight of this incarnation is lost, and no result of it comes.

    Attributes:
        step_id: the Step to blame; None: none, a worker was lost by itself.
        lost: instances whose KV is gone; None: all.
        down: instances that run no Steps until `InstancesReady` says so.
    """

    step_id: int | None
    reason: str
    incarnation: int = 0
    lost: tuple[int, ...] | None = None
    down: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class InstancesReady:
    """Instances that run Steps again, from the incarnation after the failure's on."""

    instances: tuple[int, ...]


ExecutorEvent = StepResult | StepFailure | InstancesReady | KVArrived
"""What an executor tells its engine."""
