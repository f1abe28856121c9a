"""One request inside the engine: its tokens, its blocks, what of it is in flight.

    token_ids   [ prompt | outputs known ]            (then `num_pending` tokens in flight)
    KV          [ came back: num_returned | in flight: num_scheduled ][ still to compute ]

While it runs it is bound to a route, with blocks of each hop's instance. Knows nothing of other
sequences or of how rows and routes are chosen.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Protocol

from shoal.core.request import GenerateRequest, TokenLogprobs
from shoal.core.step import BLOCK_SIZE, SequenceStart, StepRow, TokenRef
from shoal.engine.blocks import BlockName, block_names
from shoal.policy.cost import Run, Work


class GrammarMatcher(Protocol):
    """Follows a sequence through its grammar (`text/` has the implementation)."""

    def mask(self) -> bytes:
        """Token ids allowed next, as a little-endian bitmask."""
        ...

    def advance(self, token_id: int) -> bool:
        """Take one token; False if the grammar does not allow it."""
        ...


class Status(Enum):
    NEW = auto()  # just arrived, or its grammar is being compiled
    WAITING = auto()  # for a row and blocks, for the first time or after preemption
    RUNNING = auto()
    FINISHED = auto()  # its terminal event is out; rows of it may still be in flight


@dataclass(slots=True, eq=False)
class HopBlocks:
    """Blocks of a sequence on one hop of its route.

    Attributes:
        block_ids: they cover all its tokens, in order.
        num_found: the first of them, whose KV others had computed.
        num_published: the first of them, which may be found.
    """

    block_ids: list[int]
    num_found: int
    num_published: int
    _told: tuple[int, ...] = ()

    def first(self, num_blocks: int) -> tuple[int, ...]:
        """The first so many: rows that follow each other mostly have the same."""
        if len(self._told) != num_blocks:
            self._told = tuple(self.block_ids[:num_blocks])
        return self._told


class Sequence:
    """State of one request. Only the scheduler and the state machine change it."""

    def __init__(
        self,
        request: GenerateRequest,
        *,
        arrival: int,
        now: float,
        max_len: int,
        eos_token_ids: tuple[int, ...],
        root: BlockName,
    ) -> None:
        self.request = request
        self.rank = (request.priority, arrival)
        self.deadline = None if request.timeout_s is None else now + request.timeout_s
        self.prompt_len = len(request.prompt_ids)
        self.max_len = max_len
        self.eos_token_ids = eos_token_ids
        self.token_ids = [*request.prompt_ids, *request.output_ids]
        self.status = Status.NEW
        self.matcher: GrammarMatcher | None = None
        self.matcher_deadline: float | None = None
        self.mask: bytes | None = None

        self.sequence_id = 0
        self.route = 0
        self.hops: tuple[HopBlocks, ...] = ()
        self.runs: tuple[Run, ...] = ()
        self.num_scheduled = 0
        self.num_returned = 0
        self.num_pending = 0
        self.in_flight = 0
        self.is_paused = False  # about to go on elsewhere: no more rows of it
        self.last_turn = 0
        self.num_hops_told = 0
        # Of its Steps, and of workers under them, since it last sampled.
        self.num_failures = self.num_losses = 0
        self.lost_at = -math.inf
        self.last_ref: TokenRef | None = None

        self.num_cached_tokens: int | None = None
        self.prompt_logprobs: list[TokenLogprobs] = []
        self._prompt_logprobs_due = request.sampling.prompt_logprobs is not None
        self._names = [root]

    @property
    def total_len(self) -> int:
        """Tokens known and in flight."""
        return len(self.token_ids) + self.num_pending

    @property
    def num_output(self) -> int:
        """Output tokens known."""
        return len(self.token_ids) - self.prompt_len

    @property
    def num_to_compute(self) -> int:
        """Tokens whose KV is neither computed nor in flight."""
        return self.total_len - self.num_scheduled

    @property
    def run(self) -> Run:
        """What it has to compute next; to the end of its tokens on all hops, but for rebuilding."""
        for run in self.runs:
            if run.stop > self.num_scheduled:
                return run
        return Run(self.total_len, len(self.hops))

    @property
    def num_hops_in_run(self) -> int:
        """Hops that its next row runs."""
        return self.run.num_hops if self.runs else len(self.hops)

    @property
    def num_in_run(self) -> int:
        """Tokens that its next rows may hold."""
        if self.runs:
            return self.run.stop - self.num_scheduled
        return len(self.token_ids) + self.num_pending - self.num_scheduled

    def can_schedule(self, max_pending: int) -> bool:
        """Whether a row of it could go into the next Step, blocks permitting.

        Args:
            max_pending: sampled tokens in flight that the row may follow.
        """
        total_len = len(self.token_ids) + self.num_pending
        if total_len == self.num_scheduled or total_len >= self.max_len or self.is_paused:
            return False
        # A mask needs every token before it; everything else may run ahead.
        return self.num_pending <= (max_pending if self.matcher is None else 0)

    @property
    def next_deadline(self) -> float | None:
        """When something must happen to it by itself."""
        limits = [self.deadline]
        if self.status is Status.NEW:
            limits.append(self.matcher_deadline)
        return min((limit for limit in limits if limit is not None), default=None)

    @property
    def wants_prompt_logprobs(self) -> bool:
        return self.request.sampling.prompt_logprobs is not None

    def bind(self, sequence_id: int, route: int, hops: tuple[HopBlocks, ...], work: Work) -> None:
        """It runs on a route from now on, with these blocks.

        Args:
            sequence_id: a new one each time: its old workers may be told late to forget it.
        """
        self.sequence_id, self.route, self.hops = sequence_id, route, hops
        self.runs = work.runs[:-1]  # the last one is all the rest
        self.num_scheduled = self.num_returned = work.start
        self.is_paused = False

    def make_row(self, num_tokens: int) -> StepRow:
        """A row of the next `num_tokens` tokens of its run; its blocks are there."""
        start, num_hops, num_known = self.num_scheduled, self.num_hops_in_run, len(self.token_ids)
        end = start + num_tokens
        known = tuple(self.token_ids[start:end]) if start < num_known else ()
        samples = end == num_known + self.num_pending
        num_blocks = -(-end // BLOCK_SIZE)
        return StepRow(
            sequence_id=self.sequence_id,
            start=start,
            token_ids=known,
            token_ref=self.last_ref if len(known) < num_tokens else None,
            block_ids=tuple([hop.first(num_blocks) for hop in self.hops]),
            samples=samples,
            mask=self.mask if samples else None,
            start_state=None if self.num_hops_told >= num_hops else self._start_state(),
        )

    def note_scheduled(self, row: StepRow, step_id: int, row_index: int, turn: int) -> None:
        """The row went into a Step."""
        self.num_hops_told = max(self.num_hops_told, self.num_hops_in_run)
        self.num_scheduled = row.end
        self.in_flight += 1
        self.last_turn = turn
        if row.samples:
            self.num_pending += 1
            self.last_ref = TokenRef(step_id, row_index)

    def note_abandoned(self) -> None:
        """What was in flight is lost, and its workers forgot it: go on from what came back."""
        self.num_pending = 0
        self.num_hops_told = 0
        self.num_scheduled = self.num_returned
        for hop in self.hops:
            kept = max(hop.num_found, self.num_returned // BLOCK_SIZE)
            hop.num_published = min(hop.num_published, kept)

    def names(self, num_blocks: int) -> list[BlockName]:
        """Names of its first `num_blocks` blocks; all their tokens are known."""
        self._name(num_blocks)
        return self._names[1 : num_blocks + 1]

    def _name(self, num_blocks: int) -> None:
        first = len(self._names) - 1
        if first < num_blocks:
            tokens = self.token_ids[first * BLOCK_SIZE : num_blocks * BLOCK_SIZE]
            full = (num_blocks - first) * BLOCK_SIZE
            assert len(tokens) == full, "only a full block of known tokens has a name"
            self._names += block_names(self._names[-1], tokens)

    def stops_at(self, token_id: int) -> bool:
        """Whether this output token, the latest, ends it."""
        params = self.request.sampling
        is_eos = token_id in self.eos_token_ids
        if params.grammar is not None and is_eos:
            # The grammar allowed it, so nothing else may follow.
            return True
        if self.num_output < params.min_tokens:
            return False
        return token_id in params.stop_token_ids or (is_eos and not params.ignore_eos)

    def follow_grammar(self, token_id: int | None = None) -> bool:
        """Take a token and work out what may follow; False if nothing may.

        Raises RequestError when the grammar's limits are exceeded.
        """
        if self.matcher is None:
            return True
        if token_id is not None and not self.matcher.advance(token_id):
            return False
        self.mask = self.matcher.mask()
        return True

    def take_prompt_logprobs(self) -> tuple[TokenLogprobs, ...]:
        """All of them, once, when they are complete."""
        if not self._prompt_logprobs_due:
            return ()
        self._prompt_logprobs_due = False
        return tuple(self.prompt_logprobs)

    def add_prompt_logprobs(self, row: StepRow, found: tuple[TokenLogprobs, ...]) -> None:
        """Those of positions start+1 …; what a rebuild computes again is skipped."""
        already = len(self.prompt_logprobs) - row.start
        self.prompt_logprobs.extend(found[max(already, 0) :])

    def take_publishable(self, hop: HopBlocks, num_full: int) -> Iterable[tuple[int, BlockName]]:
        """(block, name) of a hop's blocks before the one of that number, since the last call; all
        their tokens are known."""
        first, hop.num_published = hop.num_published, num_full
        self._name(num_full)
        names = self._names[first + 1 : num_full + 1]
        return zip(hop.block_ids[first:num_full], names, strict=True)

    def _start_state(self) -> SequenceStart:
        return SequenceStart(
            token_ids=tuple(self.token_ids),
            prompt_len=self.prompt_len,
            sampling=self.request.sampling,
            eos_token_ids=self.eos_token_ids,
        )
