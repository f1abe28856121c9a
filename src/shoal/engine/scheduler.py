"""Which tokens go into the next Step: continuous batching with chunked prefill.

One token budget a Step. Sequences that decode come first (one token each), then chunks of
prompts already begun, then waiting requests in order of (priority, arrival). When KV runs
out the worst-ranked running sequence gives its blocks back and is computed again later;
the best-ranked one therefore always advances, so the whole does.

Knows nothing of events, outputs or time.
"""

from __future__ import annotations

from bisect import insort

from shoal.core.step import BLOCK_SIZE, StepRow
from shoal.engine.blocks import BlockPool, blocks_for
from shoal.engine.config import EngineConfig
from shoal.engine.sequence import Sequence, Status

Rows = list[tuple[Sequence, StepRow]]


class Scheduler:
    """Holds the waiting and running sequences and the block pool."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self.pool = BlockPool(config.num_blocks)
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        # Finished or preempted, their blocks still in use by Steps in flight.
        self.leaving: list[Sequence] = []
        self.num_preemptions = 0

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence that is ready to run."""
        sequence.status = Status.WAITING
        insort(self.waiting, sequence, key=lambda waiting: waiting.rank)

    def remove(self, sequence: Sequence) -> None:
        """The sequence is over; its blocks go once no Step in flight uses them."""
        if sequence.status is Status.WAITING:
            self.waiting.remove(sequence)
        elif sequence.status is Status.RUNNING:
            self.running.remove(sequence)
            self._let_go(sequence)
        sequence.status = Status.FINISHED

    def fill(self, step_id: int) -> Rows:
        """The rows of the next Step; none if there is nothing to do."""
        suspect = next((s for s in [*self.running, *self.waiting] if s.num_failures), None)
        if suspect is not None:
            rows = self._fill_alone(suspect, step_id)
            if rows or suspect.in_flight:
                return rows
        self._displace()
        rows = []
        budget = self._config.max_num_batched_tokens
        ready = [sequence for sequence in self.running if sequence.can_schedule]
        for sequence in sorted(ready, key=lambda s: (s.num_to_compute > 1, s.rank)):
            if budget == 0:
                return rows
            # An earlier turn of this loop may have preempted it.
            if sequence.status is Status.RUNNING and self._grow(sequence, rows):
                budget -= self._put(sequence, budget, rows, step_id)
        while self.waiting and budget > 0:
            sequence = self.waiting[0]
            if not self._admit(sequence):
                break
            budget -= self._put(sequence, budget, rows, step_id)
        return rows

    def _fill_alone(self, suspect: Sequence, step_id: int) -> Rows:
        """A Step of the one sequence that was in a failed Step: only the guilty fail again."""
        rows: Rows = []
        if suspect.status is Status.WAITING:
            self._admit(suspect)
        if suspect.status is Status.RUNNING and suspect.can_schedule and self._grow(suspect, rows):
            self._put(suspect, self._config.max_num_batched_tokens, rows, step_id)
        return rows

    def note_returned(self, sequence: Sequence) -> None:
        """A Step with a row of the sequence came back, or was abandoned."""
        sequence.in_flight -= 1
        if sequence.in_flight == 0 and sequence in self.leaving:
            self.leaving.remove(sequence)
            self._release(sequence)

    def publish(self, sequence: Sequence) -> None:
        """Make its newly full blocks findable."""
        if self._config.prefix_caching and sequence.block_ids:
            for block, name in sequence.take_publishable():
                self.pool.publish(block, name)

    def restart(self) -> None:
        """All KV is lost and no Step is in flight: everyone starts again from what is known."""
        for sequence in list(self.running):
            self._preempt(sequence)
        self.pool.forget_all()

    def check_integrity(self) -> None:
        """Every block is accounted for; for tests and idle time."""
        holding = [*self.running, *self.leaving]
        self.pool.check_integrity(sequence.block_ids for sequence in holding)
        assert all(not sequence.block_ids for sequence in self.waiting if not sequence.in_flight)
        assert all(sequence.in_flight for sequence in self.leaving)
        for queue in (self.waiting, self.running):
            assert queue == sorted(queue, key=lambda sequence: sequence.rank)

    # --- one row ---

    def _put(self, sequence: Sequence, budget: int, rows: Rows, step_id: int) -> int:
        num_tokens = min(sequence.num_to_compute, budget)
        row = sequence.make_row(num_tokens)
        sequence.note_scheduled(row, step_id, len(rows))
        self.publish(sequence)
        rows.append((sequence, row))
        return num_tokens

    def _grow(self, sequence: Sequence, rows: Rows) -> bool:
        """Give a running sequence the block its next token needs, if there is one to be had."""
        missing = blocks_for(sequence.total_len) - len(sequence.block_ids)
        if missing <= 0:
            return True
        while self.pool.num_free < missing:
            if self.pool.num_free + self._num_returning() >= missing:
                return False
            victim = self._worst_running(rows)
            if victim is None:
                return False
            self._preempt(victim)
            if victim is sequence:
                return False
        sequence.block_ids += self.pool.allocate(missing)
        return True

    # --- admission ---

    def _displace(self) -> None:
        """Make room for a waiting request that is more urgent than running ones."""
        if not self.waiting or self._has_place(self.waiting[0]):
            return
        urgent = self.waiting[0]
        victims = [s for s in self.running if s.request.priority > urgent.request.priority]
        returning = self._num_returning()
        gained = sum(len(victim.block_ids) for victim in victims)
        if not self._has_place(urgent, returning + gained, leaving=len(victims)):
            return  # not even without all of them
        while victims and not self._has_place(urgent, self._num_returning()):
            self._preempt(victims.pop())

    def _admit(self, sequence: Sequence) -> bool:
        """Give a waiting sequence a place and the blocks of all its known tokens."""
        if sequence.in_flight or not self._has_place(sequence):
            return False
        cached = self._cached_blocks(sequence)
        self.pool.hold(cached)
        fresh = self.pool.allocate(blocks_for(sequence.total_len) - len(cached))
        sequence.block_ids = [*cached, *fresh]
        sequence.num_published = len(cached)
        sequence.num_scheduled = len(cached) * BLOCK_SIZE
        if sequence.num_cached_tokens is None:
            sequence.num_cached_tokens = min(sequence.num_scheduled, sequence.prompt_len)
        self.waiting.remove(sequence)
        sequence.status = Status.RUNNING
        insort(self.running, sequence, key=lambda running: running.rank)
        return True

    def _has_place(self, sequence: Sequence, returning: int = 0, leaving: int = 0) -> bool:
        """Whether it could run, once `returning` blocks are back and `leaving` sequences gone."""
        num_running = len(self.running) - leaving
        if num_running >= self._config.max_num_seqs:
            return False
        # Room for one more block each, or the newcomer would be preempted at once.
        return self._blocks_lacking(sequence) + num_running <= self.pool.num_free + returning

    def _blocks_lacking(self, sequence: Sequence) -> int:
        """Free blocks that admitting it would use up."""
        shared = sum(1 for block in self._cached_blocks(sequence) if not self.pool.is_free(block))
        return blocks_for(sequence.total_len) - shared

    def _cached_blocks(self, sequence: Sequence) -> list[int]:
        if not self._config.prefix_caching or sequence.wants_prompt_logprobs:
            return []
        # The last token is always computed, as its logits are wanted; tokens still in flight
        # (it may have been preempted) have no names yet.
        num_known = min(sequence.total_len - 1, len(sequence.token_ids))
        return self.pool.find(sequence.names(num_known // BLOCK_SIZE))

    # --- giving blocks back ---

    def _worst_running(self, rows: Rows) -> Sequence | None:
        placed = {id(sequence) for sequence, _ in rows}
        return next((s for s in reversed(self.running) if id(s) not in placed), None)

    def _num_returning(self) -> int:
        return sum(len(sequence.block_ids) for sequence in self.leaving)

    def _preempt(self, sequence: Sequence) -> None:
        self.num_preemptions += 1
        self.running.remove(sequence)
        sequence.note_rebuild()
        self._let_go(sequence)
        self.add(sequence)

    def _let_go(self, sequence: Sequence) -> None:
        if sequence.in_flight:
            self.leaving.append(sequence)
        else:
            self._release(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.pool.release(sequence.block_ids)
        sequence.block_ids = []
