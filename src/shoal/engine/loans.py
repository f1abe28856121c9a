"""KV that is lent to others: blocks that stay as they are until the lease ends, or runs out.

    lend          a running sequence's full blocks, as far as their KV came back
      ahead       all full blocks of what it knows; those not computed become ready as they come
    lend_prefix   blocks of whatever sequence had them, found by their names

Knows nothing of who borrows, or of how blocks get there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from shoal.core.kv import KVHop, KVLoan
from shoal.core.step import BLOCK_SIZE
from shoal.engine.blocks import BlockName
from shoal.engine.config import EngineConfig
from shoal.engine.events import Effect, EndLoan, GrowLoan, LendKV
from shoal.engine.scheduler import Scheduler
from shoal.engine.sequence import Sequence as TokenSequence
from shoal.engine.sequence import Status


@dataclass(slots=True)
class _Loan:
    """
    Attributes:
        num_ready: blocks whose KV came back.
        sequence: that computes the others; None: all are ready.
        sequence_id: its name while it has these blocks.
    """

    deadline: float
    hops: tuple[KVHop, ...]
    num_ready: int
    sequence: TokenSequence | None
    sequence_id: int


class Loans:
    """Of one engine."""

    def __init__(self, config: EngineConfig, scheduler: Scheduler) -> None:
        self._config = config
        self._scheduler = scheduler
        self._pools = scheduler.pools
        self._loans: dict[int, _Loan] = {}
        # Asked for ahead, of sequences that do not run yet: until when.
        self._awaited: dict[int, tuple[TokenSequence, float]] = {}

    def __bool__(self) -> bool:
        return bool(self._loans or self._awaited)

    def next_deadline(self) -> float | None:
        """When one ends by itself."""
        awaited = [until for _, until in self._awaited.values()]
        return min([*awaited, *(each.deadline for each in self._loans.values())], default=None)

    def held(self, instance: int) -> list[list[int]]:
        """Blocks of an instance that are lent."""
        hops = (hop for each in self._loans.values() for hop in each.hops)
        return [list(hop.block_ids) for hop in hops if hop.instance == instance]

    # --- opening ---

    def lend(
        self, lease_id: int, sequence: TokenSequence | None, until: float, *, ahead: bool = False
    ) -> list[Effect]:
        """Lend what there is of a sequence, which may be nothing."""
        if lease_id in self._loans or lease_id in self._awaited:
            return []
        if ahead and sequence is not None and sequence.status in (Status.NEW, Status.WAITING):
            self._awaited[lease_id] = sequence, until
            return []
        if sequence is None or sequence.status is not Status.RUNNING:
            return [_nothing(lease_id)]
        num_ready = self._num_ready(sequence)
        num = len(sequence.token_ids) // BLOCK_SIZE if ahead else num_ready
        route = self._config.routes[sequence.route]
        hops = tuple(
            KVHop(at.instance, at.layers, tuple(hop.block_ids[:num]))
            for at, hop in zip(route, sequence.hops, strict=True)
        )
        source = sequence if num > num_ready else None
        loan = _Loan(until, hops, num_ready, source, sequence.sequence_id)
        return self._open(lease_id, tuple(sequence.names(num)), loan)

    def lend_prefix(self, lease_id: int, names: Sequence[BlockName], until: float) -> list[Effect]:
        """Lend the blocks of these names, from the first on, that are here and computed."""
        if lease_id in self._loans or lease_id in self._awaited:
            return []
        most: tuple[KVHop, ...] = ()
        num = 0
        for route in self._scheduler.places.usable:
            hops = self._found(route, names)
            if len(hops[0].block_ids) > num:
                most, num = hops, len(hops[0].block_ids)
        return self._open(lease_id, tuple(names[:num]), _Loan(until, most, num, None, 0))

    def _open(self, lease_id: int, names: tuple[BlockName, ...], loan: _Loan) -> list[Effect]:
        if names:
            for hop in loan.hops:
                self._pools.of_instance[hop.instance].hold(hop.block_ids)
            self._loans[lease_id] = loan
        return [LendKV(KVLoan(lease_id, loan.hops, loan.num_ready), names)]

    def _found(self, route: int, names: Sequence[BlockName]) -> tuple[KVHop, ...]:
        """Blocks of a route, as many of each hop."""
        hops = self._config.routes[route]
        found = [
            _before(blocks, self._unfinished(hop.instance))
            for hop, blocks in zip(hops, self._pools.find(route, names), strict=True)
        ]
        num = min(map(len, found))
        return tuple(
            KVHop(hop.instance, hop.layers, tuple(blocks[:num]))
            for hop, blocks in zip(hops, found, strict=True)
        )

    def _num_ready(self, sequence: TokenSequence) -> int:
        """Full blocks of a running sequence whose KV came back."""
        num = min(sequence.num_returned, len(sequence.token_ids)) // BLOCK_SIZE
        if sequence.num_returned > min(hop.num_found for hop in sequence.hops) * BLOCK_SIZE:
            return num
        # All it has was found, and whoever computes that may not be done.
        route = self._config.routes[sequence.route]
        return min(
            len(_before(hop.block_ids[:num], self._unfinished(at.instance)))
            for at, hop in zip(route, sequence.hops, strict=True)
        )

    def _unfinished(self, instance: int) -> set[int]:
        """Blocks that may have a name already, though their KV is still being computed: who reads
        them on the same workers comes after who writes them; who borrows them does not."""
        scheduler = self._scheduler
        return {
            block
            for sequence in [*scheduler.running, *scheduler.leaving]
            for at, hop in zip(
                scheduler.places.instances(sequence.route), sequence.hops, strict=True
            )
            if at == instance
            for block in hop.block_ids[sequence.num_returned // BLOCK_SIZE :]
        }

    # --- while they run ---

    def grow(self) -> list[Effect]:
        """What came back since is ready; who began to run lends now."""
        effects: list[Effect] = []
        for lease_id, (sequence, until) in list(self._awaited.items()):
            if sequence.status in (Status.RUNNING, Status.FINISHED):
                del self._awaited[lease_id]
                effects += self.lend(lease_id, sequence, until, ahead=True)
        for lease_id, loan in self._loans.items():
            if loan.sequence is not None:
                effects += self._grow(lease_id, loan, loan.sequence)
        return effects

    def _grow(self, lease_id: int, loan: _Loan, sequence: TokenSequence) -> list[Effect]:
        before, promised = loan.num_ready, len(loan.hops[0].block_ids)
        if sequence.status is Status.RUNNING and sequence.sequence_id == loan.sequence_id:
            loan.num_ready = max(before, min(self._num_ready(sequence), promised))
            if loan.num_ready == before:
                return []
            if loan.num_ready == promised:
                loan.sequence = None
        else:
            self._cut(loan)
        return [GrowLoan(KVLoan(lease_id, loan.hops, loan.num_ready))]

    def _cut(self, loan: _Loan) -> None:
        """Nobody computes the rest any more."""
        num = loan.num_ready
        for hop in loan.hops:
            self._pools.of_instance[hop.instance].release(hop.block_ids[num:])
        loan.hops = tuple(KVHop(hop.instance, hop.layers, hop.block_ids[:num]) for hop in loan.hops)
        loan.sequence = None

    # --- ending ---

    def end(self, lease_id: int) -> list[Effect]:
        self._awaited.pop(lease_id, None)
        loan = self._loans.pop(lease_id, None)
        if loan is None:
            return []
        for hop in loan.hops:
            self._pools.of_instance[hop.instance].release(hop.block_ids)
        return [EndLoan(lease_id)]

    def expire(self, now: float) -> list[Effect]:
        """Who still waits for what was asked for ahead hears that nothing comes."""
        late = [lease_id for lease_id, (_, until) in self._awaited.items() if now >= until]
        for lease_id in late:
            del self._awaited[lease_id]
        over = [lease_id for lease_id, loan in self._loans.items() if now >= loan.deadline]
        return [*map(_nothing, late), *self._end_each(over)]

    def end_all(self) -> list[Effect]:
        """Workers failed: what they wrote can't be trusted."""
        return self._end_each([*self._loans])

    def _end_each(self, lease_ids: Iterable[int]) -> list[Effect]:
        return [effect for lease_id in lease_ids for effect in self.end(lease_id)]


def _nothing(lease_id: int) -> LendKV:
    return LendKV(KVLoan(lease_id, (), 0), ())


def _before(blocks: list[int], unfinished: set[int]) -> list[int]:
    """Those before the first that is among the others."""
    num = next((i for i, block in enumerate(blocks) if block in unfinished), len(blocks))
    return blocks[:num]
