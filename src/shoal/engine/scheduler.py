"""Which tokens go into the next Step: continuous batching with chunked prefill.

One token budget a Step. Sequences that decode come first (one token each), then chunks of
prompts already begun, then waiting requests in order of (priority, arrival); how much of prompts
there is beside those that decode, `engine/chunks.py` says. When KV runs out the worst-ranked
running sequence gives its blocks back and is computed again later; the best-ranked one therefore
always advances, so the whole does.

A Step follows one route; whose turn it is there, `engine/turns.py` says.

Knows nothing of events, outputs or time.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Callable, Collection, Iterable

from shoal.core.step import BLOCK_SIZE, StepRow
from shoal.engine.batch import Batch, Rows
from shoal.engine.blocks import blocks_for
from shoal.engine.chunks import Chunks
from shoal.engine.config import EngineConfig
from shoal.engine.places import Place, Places
from shoal.engine.pools import Pools
from shoal.engine.sequence import HopBlocks, Status
from shoal.engine.sequence import Sequence as TokenSequence
from shoal.engine.turns import Turns
from shoal.policy.cost import Work


class Scheduler:
    """Holds the waiting and running sequences and the block pools."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self.pools = Pools(config)
        self.places = Places(config, self.pools)
        self.chunks = Chunks(config)
        self.max_running = config.max_num_seqs
        self.waiting: list[TokenSequence] = []
        self.running: list[TokenSequence] = []
        # Finished or preempted, their blocks still in use by Steps in flight.
        self.leaving: list[TokenSequence] = []
        # Those whose sampler state workers may forget.
        self._released: list[int] = []
        self._is_in_order = len(config.routes) == 1
        # Some sequence may have been in a Step that failed.
        self.has_suspects = False
        self._turns = Turns(config)
        self.num_preemptions = 0
        self.num_admissions = 0

    def add(self, sequence: TokenSequence) -> None:
        """Queue a sequence that is ready to run."""
        sequence.status = Status.WAITING
        insort(self.waiting, sequence, key=_rank)

    def remove(self, sequence: TokenSequence) -> None:
        """The sequence is over; its blocks go once no Step in flight uses them."""
        if sequence.status is Status.WAITING:
            self.waiting.remove(sequence)
        elif sequence.status is Status.RUNNING:
            self.running.remove(sequence)
            self._let_go(sequence)
        sequence.status = Status.FINISHED

    def routes(self) -> list[int]:
        """Usable ones that somebody runs on, and one more where somebody waits to be admitted."""
        usable = self.places.usable
        if len(usable) == 1:
            return usable
        used = {sequence.route for sequence in self.running}
        others = [route for route in usable if route not in used] if self.waiting else []
        return [*(route for route in usable if route in used), *others[:1]]

    def fill(self, route: int, step_id: int) -> Batch:
        """The next Step of a route; without rows if there is nothing to do."""
        if self.has_suspects and (suspect := self._suspect()) is not None:
            batch = self._fill_alone(suspect, route, step_id)
            if batch.rows or suspect.in_flight or self._runs_elsewhere(suspect, route):
                return batch
        self._displace()
        batch = self._fill_in_turn(route, step_id, ahead=False)
        self._fill_up(batch)
        if not batch.rows and len(self._config.routes[route]) > 1:
            batch = self._fill_in_turn(route, step_id, ahead=True)
        if batch.rows:
            self._turns.handed_out(batch)
            self.chunks.handed_out(batch, len(self._on(route)))
        return batch

    def note_returned(self, sequence: TokenSequence, row: StepRow) -> None:
        """A Step with a row of the sequence came back."""
        if sequence.status is Status.RUNNING:
            sequence.num_returned = max(sequence.num_returned, row.end)
            if not self._is_in_order:
                self.publish(sequence)
        self.note_gone(sequence)

    def note_gone(self, sequence: TokenSequence) -> None:
        """A Step with a row of the sequence came back, or was abandoned."""
        sequence.in_flight -= 1
        if sequence.in_flight == 0 and sequence in self.leaving:
            self.leaving.remove(sequence)
            self._release(sequence)

    def publish(self, sequence: TokenSequence) -> None:
        """Make its newly full blocks findable.

        Workers run the Steps of a route in order: with one route, whoever finds a block whose KV
        is still in flight reads it after it was written. With several it must have come back.
        """
        if not self._config.prefix_caching or sequence.status is not Status.RUNNING:
            return
        num_tokens = sequence.num_scheduled if self._is_in_order else sequence.num_returned
        num_full = min(num_tokens, len(sequence.token_ids)) // BLOCK_SIZE
        for index, hop in enumerate(sequence.hops):
            if hop.num_published < num_full:
                named = sequence.take_publishable(hop, num_full)
                self.pools.publish(sequence.route, index, named)

    def preempt(self, sequence: TokenSequence) -> None:
        """Take its place from a running sequence; it waits, and is computed again."""
        self.num_preemptions += 1
        sequence.is_paused = False
        self.running.remove(sequence)
        self._let_go(sequence)
        self.add(sequence)

    def rebind(
        self, sequence: TokenSequence, route: int, hops: tuple[HopBlocks, ...], work: Work
    ) -> None:
        """A running sequence goes on on another route; no Step of it is in flight."""
        assert not sequence.in_flight, f"{sequence.in_flight} Steps of it are on the old route"
        self._tell_workers_to_forget(sequence)
        self.num_admissions += 1
        sequence.bind(self.num_admissions, route, hops, work)

    def leave_unusable(self) -> None:
        """Those on routes that can't be taken now wait for another, if there is one."""
        if self.places.usable:
            for sequence in list(self.running):
                if not self.places.is_usable(sequence.route):
                    self.preempt(sequence)

    def take_released(self) -> tuple[int, ...]:
        """Sequences that all workers may forget; said once."""
        released, self._released = tuple(self._released), []
        return released

    def forget_workers(self) -> None:
        """All workers forgot all sequences."""
        self._released = []

    def check_integrity(self, held: Callable[[int], Iterable[list[int]]]) -> None:
        """Every block is accounted for; for tests and idle time.

        Args:
            held: blocks of an instance that others than sequences hold.
        """
        holding = [*self.running, *self.leaving]
        for instance, pool in enumerate(self.pools.of_instance):
            pool.check_integrity([*self.places.held(holding, instance), *held(instance)])
        assert all(not sequence.hops for sequence in self.waiting if not sequence.in_flight)
        assert all(sequence.in_flight for sequence in self.leaving)
        for queue in (self.waiting, self.running):
            assert queue == sorted(queue, key=_rank)
        for sequence in self.running:
            assert sequence.num_returned <= sequence.num_scheduled <= sequence.total_len

    # --- rows of those that run ---

    def _fill_in_turn(self, route: int, step_id: int, *, ahead: bool) -> Batch:
        batch = self._batch(route, step_id, len(self._config.routes[route]))
        for num_hops, sequences in self._turns.of(self._on(route), route, ahead=ahead):
            if num_hops != batch.num_hops:
                batch = self._batch(route, step_id, num_hops)
            for sequence in sequences:
                # An earlier turn of this loop may have preempted it.
                if sequence.status is Status.RUNNING and self.grow(sequence, batch.rows):
                    self._put(sequence, batch)
                if not batch.budget:
                    break
            if batch.rows:
                break
        return batch

    def _on(self, route: int) -> list[TokenSequence]:
        """Those that run on a route."""
        if self._is_in_order:
            return self.running
        return [sequence for sequence in self.running if sequence.route == route]

    def _batch(self, route: int, step_id: int, num_hops: int) -> Batch:
        budget = self._config.max_num_batched_tokens
        return Batch(route, step_id, self._turns.next, budget, num_hops)

    def _suspect(self) -> TokenSequence | None:
        """The first that was in a Step that failed, and in none that came back since."""
        suspects = [s for s in [*self.running, *self.waiting] if s.num_failures]
        self.has_suspects = bool(suspects)
        return suspects[0] if suspects else None

    def _fill_alone(self, suspect: TokenSequence, route: int, step_id: int) -> Batch:
        """A Step of the one sequence that was in a failed Step: only the guilty fail again."""
        if suspect.status is Status.WAITING:
            self._admit(suspect)
        batch = self._batch(route, step_id, suspect.run.num_hops)
        if (
            suspect.status is Status.RUNNING
            and suspect.route == route
            and self._turns.can_run(suspect)
            and self.grow(suspect, batch.rows)
        ):
            self._put(suspect, batch)
        return batch

    def _runs_elsewhere(self, suspect: TokenSequence, route: int) -> bool:
        is_bound = suspect.status is Status.RUNNING and suspect.route != route
        return is_bound and self.places.is_usable(suspect.route)

    def _fill_up(self, batch: Batch) -> None:
        """Admit who waits while the Step has room; some may be bound to other routes."""
        while self.waiting and batch.budget:
            sequence = self.waiting[0]
            has_room = self.chunks.room(batch, self._on(batch.route), self._num_coming)
            if not has_room or not self._admit(sequence):
                return
            if sequence.route != batch.route:
                continue
            if not batch.rows:
                batch.num_hops = sequence.run.num_hops
            if sequence.run.num_hops != batch.num_hops:
                return  # its turn comes; more of its kind need not hold blocks yet
            self._put(sequence, batch)

    # --- one row ---

    def _put(self, sequence: TokenSequence, batch: Batch) -> None:
        if (num_tokens := sequence.num_in_run) > 1:
            running = self._on(batch.route)
            num_tokens = self.chunks.take(batch, sequence, running, self._num_coming)
        if not num_tokens:
            return
        row = sequence.make_row(num_tokens)
        sequence.note_scheduled(row, batch.step_id, len(batch.rows), batch.turn)
        if self._is_in_order and row.token_ids:
            self.publish(sequence)
        batch.rows.append((sequence, row))
        batch.budget -= num_tokens

    @property
    def _num_coming(self) -> int:
        """Waiting sequences that there are seats for."""
        return min(len(self.waiting), max(self.max_running - len(self.running), 0))

    def grow(self, sequence: TokenSequence, rows: Rows) -> bool:
        """Give a running sequence the block its next token needs, if there is one to be had."""
        missing = blocks_for(sequence.total_len) - len(sequence.hops[0].block_ids)
        if missing <= 0:
            return True
        pools = self.pools.along(sequence.route)
        instances = self.places.instances(sequence.route)
        while short := {i for i, p in zip(instances, pools, strict=True) if p.num_free < missing}:
            returning = self.places.blocks(self.leaving)
            free = (self.pools.of_instance[i].num_free + returning[i] for i in short)
            if min(free) >= missing:
                return False
            victim = self._worst_running(rows, short)
            if victim is None:
                return False
            self.preempt(victim)
            if victim is sequence:
                return False
        for hop, pool in zip(sequence.hops, pools, strict=True):
            hop.block_ids += pool.allocate(missing)
        return True

    # --- admission ---

    def _displace(self) -> None:
        """Make room for a waiting request that is more urgent than running ones."""
        if not self.waiting or self.has_place(self.waiting[0]):
            return
        urgent = self.waiting[0]
        victims = [s for s in self.running if s.request.priority > urgent.request.priority]
        if not victims:
            return
        returning = self.places.blocks(self.leaving)
        stay = [s for s in self.running if s.request.priority <= urgent.request.priority]
        gained = self.places.blocks(victims) + returning
        for place in self.places.candidates(urgent, self.running):
            if self.places.has_room(urgent, place, stay, gained):
                self._make_room(urgent, place, victims)
                return

    def _make_room(self, urgent: TokenSequence, place: Place, victims: list[TokenSequence]) -> None:
        """Preempt the worst ones until there is a place."""
        if len(self.running) < self._config.max_num_seqs:
            wanted = set(self.places.instances(place.route))
            victims = [s for s in victims if wanted & set(self.places.instances(s.route))]
        while victims and not self.places.has_room(
            urgent, place, self.running, self.places.blocks(self.leaving)
        ):
            self.preempt(victims.pop())

    def _admit(self, sequence: TokenSequence) -> bool:
        """Give a waiting sequence a route and the blocks of all its known tokens."""
        if sequence.in_flight or (place := self.find_place(sequence)) is None:
            return False
        wanted, hops = blocks_for(sequence.total_len), []
        for pool, found in zip(self.pools.along(place.route), place.found, strict=True):
            pool.hold(found)
            fresh = pool.allocate(wanted - len(found))
            hops.append(HopBlocks([*found, *fresh], len(found), len(found)))
        self.num_admissions += 1
        sequence.bind(self.num_admissions, place.route, tuple(hops), place.work)
        if sequence.num_cached_tokens is None:
            sequence.num_cached_tokens = min(sequence.num_scheduled, sequence.prompt_len)
        self.waiting.remove(sequence)
        sequence.status = Status.RUNNING
        insort(self.running, sequence, key=_rank)
        return True

    def find_place(self, sequence: TokenSequence) -> Place | None:
        """The best route with room for it."""
        if len(self.running) >= self.max_running:
            return None
        for place in self.places.candidates(sequence, self.running):
            if self.places.has_room(sequence, place, self.running, Counter()):
                return place
        return None

    def has_place(self, sequence: TokenSequence) -> bool:
        """Whether there is a route with room for it."""
        if len(self.running) < self.max_running and self.places.has_plain_room(
            sequence, len(self.running)
        ):
            return True
        return self.find_place(sequence) is not None

    # --- giving blocks back ---

    def _worst_running(self, rows: Rows, short: Collection[int]) -> TokenSequence | None:
        """The worst-ranked that is in no row yet and holds blocks of the instances."""
        placed = {id(sequence) for sequence, _ in rows}
        for sequence in reversed(self.running):
            if id(sequence) not in placed and not set(short).isdisjoint(
                self.places.instances(sequence.route)
            ):
                return sequence
        return None

    def _let_go(self, sequence: TokenSequence) -> None:
        if sequence.in_flight:
            self.leaving.append(sequence)
        else:
            self._release(sequence)

    def _release(self, sequence: TokenSequence) -> None:
        """Its blocks, and what its workers know of it."""
        for pool, hop in zip(self.pools.along(sequence.route), sequence.hops, strict=True):
            pool.release(hop.block_ids)
        sequence.hops = ()
        self._tell_workers_to_forget(sequence)

    def _tell_workers_to_forget(self, sequence: TokenSequence) -> None:
        if sequence.num_hops_told:
            self._released.append(sequence.sequence_id)
        sequence.num_hops_told = 0


def _rank(sequence: TokenSequence) -> tuple[int, int]:
    return sequence.rank
