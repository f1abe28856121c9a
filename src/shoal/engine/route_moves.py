"""Running sequences on their way from one route to another, with their KV.

    copying   full blocks are lent by the old instances, and filled on the new ones; meanwhile the
              sequence goes on where it is. Again, for what came since, until that is little
    paused    no more rows of it; its last Steps on the old route come back
    then      it is bound to the new route: hops that both routes have keep their blocks, and what
              was not copied is computed

Two kinds are due: those on instances that are drained, and, one at a time, those that gain by it
(`policy/cost.py`); so load spreads again when an instance is back. Whatever fails, the sequence is
still on its old route, or waits like any that lost KV. Knows nothing of workers, or of how KV gets
from one to another.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from shoal.core.kv import KVArrived, KVHop, KVLoan
from shoal.core.step import BLOCK_SIZE
from shoal.engine.blocks import blocks_for
from shoal.engine.config import EngineConfig
from shoal.engine.detours import Detours
from shoal.engine.events import CopyKV, DropKV, Effect, EndLoan, StopKV
from shoal.engine.scheduler import Scheduler
from shoal.engine.sequence import HopBlocks, Sequence, Status
from shoal.policy.cost import cheapest_work

_LOOK_EVERY_S = 0.25
_TIMEOUT_S = 10.0
_STOP_GRACE_S = 1.0
# Where copying does not work, it is not tried again at once.
_REST_S = 5.0
_MAX_LEAVING = 4
# Pairs of routes that are looked at for balance: this must cost next to nothing.
_MAX_LOOKED_AT = 4
# Rather computed than copied, if they came while others were.
_FEW_BLOCKS = 2
# Of output at least, or a sequence is over before it has gained anything.
_MIN_TOKENS_LEFT = 32


@dataclass(slots=True, eq=False)
class _Move:
    """
    Attributes:
        sequence_id: its name while it is on the old route.
        route: the new one.
        is_needed: it goes even if its KV does not come along.
        blocks: of each hop that changes, those held on its new instance.
        num_whole: of each, the first ones, which have its KV.
        loan: what is being copied; its number is the copy's.
        is_cut_short: not all came, or it is told to end with what came.
    """

    sequence: Sequence
    sequence_id: int
    route: int
    is_needed: bool
    deadline: float
    blocks: dict[int, list[int]]
    num_whole: int
    loan: KVLoan | None = None
    num_copies: int = 0
    is_cut_short: bool = False

    @property
    def is_current(self) -> bool:
        """Whether the sequence is still where it began."""
        sequence = self.sequence
        return sequence.status is Status.RUNNING and sequence.sequence_id == self.sequence_id

    @property
    def num_missing(self) -> int:
        """Full blocks that could be copied."""
        return self.sequence.num_returned // BLOCK_SIZE - self.num_whole


class RouteMoves:
    """Of one engine.

    Attributes:
        num_moved: sequences that went on on another route.
        num_copied_tokens: whose KV was copied for them.
    """

    def __init__(self, config: EngineConfig, scheduler: Scheduler) -> None:
        self._config = config
        self._scheduler = scheduler
        self._places = scheduler.places
        self._pools = scheduler.pools
        self._detours = Detours(config, scheduler.places)
        self._moves: list[_Move] = []
        self._num_copies = 0
        self._look_at = 0.0
        self.num_moved = 0
        self.num_copied_tokens = 0

    def __bool__(self) -> bool:
        return bool(self._moves)

    def next_deadline(self) -> float | None:
        """When copying ends by itself."""
        copying = (move.deadline for move in self._moves if not move.sequence.is_paused)
        return min(copying, default=None)

    def held(self, instance: int) -> list[list[int]]:
        """Blocks of an instance that are lent or on their way; for tests and idle time."""
        lent = [hop for move in self._moves if move.loan for hop in move.loan.hops]
        held = [list(hop.block_ids) for hop in lent if hop.instance == instance]
        for move in self._moves:
            instances = self._places.instances(move.route)
            held += [ids for hop, ids in move.blocks.items() if instances[hop] == instance]
        return held

    # --- events ---

    def drain(self, instance: int, is_drained: bool) -> None:
        """Whether sequences are to leave an instance."""
        drained = self._places.drained
        if is_drained:
            drained.add(instance)
        else:
            drained.discard(instance)
        self.look_soon()

    def look_soon(self) -> None:
        """Routes have changed."""
        self._look_at = 0.0

    def advance(self, now: float) -> list[Effect]:
        """Begin what is due, and go on with what was begun."""
        if len(self._config.routes) == 1:
            return []
        if now >= self._look_at:
            self._look_at = now + _LOOK_EVERY_S
            self._leave_drained(now)
            self._balance(now)
        return [effect for move in list(self._moves) for effect in self._go_on(move, now)]

    def arrived(self, event: KVArrived) -> list[Effect]:
        """Copying is over: what is whole counts, the rest is free again."""
        found = (m for m in self._moves if m.loan and m.loan.lease_id == event.pull_id)
        if (move := next(found, None)) is None:
            return []
        first, num = move.num_whole, min(event.num_blocks)
        move.num_whole += num
        self.num_copied_tokens += num * BLOCK_SIZE
        move.is_cut_short = self._let_go_of_rest(move)
        if self._config.prefix_caching:
            names = move.sequence.names(move.num_whole)[first:]
            for hop, blocks in move.blocks.items():
                self._pools.publish(move.route, hop, zip(blocks[first:], names, strict=True))
        return self._end_loan(move)

    def end_all(self) -> list[Effect]:
        """Workers failed: who had begun to move stays, if it can."""
        self.look_soon()
        return [effect for move in list(self._moves) for effect in self._drop(move)]

    # --- who moves ---

    def _leave_drained(self, now: float) -> None:
        leaving = sum(move.is_needed for move in self._moves)
        for sequence in list(self._scheduler.running):
            if self._places.is_open(sequence.route) or not self._may_move(sequence):
                continue
            if leaving == _MAX_LEAVING:
                return
            leaving += 1
            load = self._load()
            ways = [
                (self._detours.gain(sequence, route, load), route)
                for route in self._detours.of(sequence)
            ]
            if ways:
                self._begin(sequence, max(ways)[1], now, is_needed=True)
            else:
                self._send_off(sequence)

    def _balance(self, now: float) -> None:
        if any(not move.is_needed for move in self._moves):
            return
        load = self._load()
        may_move = [s for s in self._scheduler.running if self._may_move(s) and _has_much_left(s)]
        pairs = self._detours.lighter({sequence.route for sequence in may_move}, load)
        for route, other in pairs[:_MAX_LOOKED_AT]:
            gains = (
                (self._detours.gain(sequence, other, load), sequence)
                for sequence in may_move
                if sequence.route == route and self._detours.fits(sequence, other)
            )
            gain, best = max(gains, key=lambda each: each[0], default=(0.0, None))
            if best is not None and gain > 0 and self._has_room(best, other):
                self._begin(best, other, now, is_needed=False)
                return

    def _may_move(self, sequence: Sequence) -> bool:
        # Who may be to blame for a failure runs alone first.
        is_moving = any(move.sequence is sequence for move in self._moves)
        return not is_moving and not sequence.num_failures

    def _load(self) -> Counter[int]:
        """Tokens on each instance, once all are where they are going."""
        load = self._places.tokens(self._scheduler.running)
        for move in self._moves:
            if move.is_current:
                load.subtract(self._places.tokens([move.sequence]))
                for instance in self._places.instances(move.route):
                    load[instance] += move.sequence.total_len
        return load

    def _has_room(self, sequence: Sequence, route: int) -> bool:
        """Room for all of it where it has none yet, and a block for each that grows there."""
        wanted = blocks_for(sequence.total_len)
        instances, pools = self._places.instances(route), self._pools.along(route)
        beside = Counter(
            instance
            for other in self._scheduler.running
            for instance in self._places.instances(other.route)
        )
        return all(
            pools[hop].num_free > wanted + beside[instances[hop]]
            for hop in self._detours.changed(sequence.route, route)
        )

    def _begin(self, sequence: Sequence, route: int, now: float, *, is_needed: bool) -> None:
        if not self._has_room(sequence, route):
            return
        hops = self._detours.changed(sequence.route, route)
        num_full = sequence.num_returned // BLOCK_SIZE if self._config.prefix_caching else 0
        found = self._pools.find(route, sequence.names(num_full))
        num = min(len(found[hop]) for hop in hops)
        blocks = {hop: found[hop][:num] for hop in hops}
        for hop, held in blocks.items():
            self._pools.along(route)[hop].hold(held)
        self._moves.append(
            _Move(sequence, sequence.sequence_id, route, is_needed, now + _TIMEOUT_S, blocks, num)
        )

    def _send_off(self, sequence: Sequence) -> None:
        """No KV can go along: it waits for another route, if it need not wait long."""
        places, rest = self._places, list(self._scheduler.running)
        rest.remove(sequence)
        returning = places.blocks([sequence])
        if any(
            places.is_open(place.route) and places.has_room(sequence, place, rest, returning)
            for place in places.candidates(sequence, rest)
        ):
            self._scheduler.preempt(sequence)

    # --- one move ---

    def _go_on(self, move: _Move, now: float) -> list[Effect]:
        if not move.is_current:
            return self._drop(move)
        is_late = now >= move.deadline
        if move.loan is not None and not is_late:
            return []
        if move.loan is not None and not move.is_cut_short:
            # What came in time is of use; workers say at once how much that is, unless they hang.
            move.is_cut_short, move.deadline = True, now + _STOP_GRACE_S
            return [StopKV(move.loan.lease_id)]
        effects = self._drop_copy(move)
        if move.is_cut_short and not move.is_needed:
            self._look_at = now + _REST_S
            return [*effects, *self._drop(move)]
        sequence = move.sequence
        if not (sequence.is_paused or move.is_cut_short or is_late):
            if move.num_missing > (_FEW_BLOCKS if move.num_copies else 0):
                return self._copy(move)
            if sequence.num_returned < sequence.prompt_len:
                return []  # chunks of its prompt are on their way: those would not be copied
        sequence.is_paused = True
        if not sequence.in_flight:
            effects += self._switch(move)
        return effects

    def _copy(self, move: _Move) -> list[Effect]:
        """Lend all full blocks, and fill as many as are missing."""
        sequence, num, first = move.sequence, move.num_missing, move.num_whole
        pools = self._pools.along(move.route)
        if any(pools[hop].num_free < num for hop in move.blocks):
            return self._drop(move)
        here, there = self._config.routes[sequence.route], self._config.routes[move.route]
        lent, taken = [], []
        for hop, blocks in move.blocks.items():
            blocks += pools[hop].allocate(num)
            ours = tuple(sequence.hops[hop].block_ids[: first + num])
            lent.append(KVHop(here[hop].instance, here[hop].layers, ours))
            taken.append(KVHop(there[hop].instance, there[hop].layers, tuple(blocks[first:])))
            self._pools.of_instance[here[hop].instance].hold(ours)
        self._num_copies += 1
        # Numbers from elsewhere are positive.
        move.loan = KVLoan(-self._num_copies, tuple(lent), first + num)
        move.num_copies += 1
        return [CopyKV(move.loan, first, tuple(taken))]

    def _switch(self, move: _Move) -> list[Effect]:
        """Nothing of it is in flight: from now on it runs on the new route."""
        sequence, route = move.sequence, move.route
        pools, old = self._pools.along(route), self._pools.along(sequence.route)
        wanted = len(sequence.hops[0].block_ids)
        if any(pools[hop].num_free < wanted - len(ids) for hop, ids in move.blocks.items()):
            return self._drop(move)
        hops, cached = [], []
        for number, hop in enumerate(sequence.hops):
            if (blocks := move.blocks.get(number)) is None:
                # What it writes again there does no harm.
                hop.num_found = max(hop.num_found, sequence.num_returned // BLOCK_SIZE)
                hops.append(hop)
                cached.append(sequence.num_returned)
                continue
            blocks += pools[number].allocate(wanted - len(blocks))
            old[number].release(hop.block_ids)
            hops.append(HopBlocks(blocks, move.num_whole, move.num_whole))
            cached.append(move.num_whole * BLOCK_SIZE)
        layers = [len(hop.layers) for hop in self._config.routes[route]]
        work = cheapest_work(cached, layers, sequence.total_len)
        self._moves.remove(move)
        self._scheduler.rebind(sequence, route, tuple(hops), work)
        self.num_moved += 1
        return []

    # --- ends ---

    def _drop(self, move: _Move) -> list[Effect]:
        """The sequence stays where it is."""
        effects = self._drop_copy(move)
        for hop, blocks in move.blocks.items():
            self._pools.along(move.route)[hop].release(blocks)
        if move.is_current:
            move.sequence.is_paused = False
        self._moves.remove(move)
        return effects

    def _drop_copy(self, move: _Move) -> list[Effect]:
        if move.loan is None:
            return []
        effects: list[Effect] = [DropKV(move.loan.lease_id)]
        move.is_cut_short = self._let_go_of_rest(move)
        return [*effects, *self._end_loan(move)]

    def _let_go_of_rest(self, move: _Move) -> bool:
        """Blocks that are not whole are free again; whether there are any."""
        rest = 0
        for hop, blocks in move.blocks.items():
            rest = len(blocks) - move.num_whole
            self._pools.along(move.route)[hop].release(blocks[move.num_whole :])
            del blocks[move.num_whole :]
        return rest > 0

    def _end_loan(self, move: _Move) -> list[Effect]:
        assert move.loan is not None
        lease_id, hops = move.loan.lease_id, move.loan.hops
        move.loan = None
        for hop in hops:
            self._pools.of_instance[hop.instance].release(hop.block_ids)
        return [EndLoan(lease_id)]


def _has_much_left(sequence: Sequence) -> bool:
    """It decodes, and will for a while."""
    has_begun = sequence.num_returned >= sequence.prompt_len
    return has_begun and sequence.max_len - sequence.total_len >= _MIN_TOKENS_LEFT
