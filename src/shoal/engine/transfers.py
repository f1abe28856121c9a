"""KV that is lent to other engines, and KV that is on its way here.

    lend      a running sequence's full blocks, as far as their KV came back: held until the
              lease is ended, or runs out by itself
    receive   free blocks are taken and filled; those that are whole when the pull is over are
              published by name, and let go: admission finds them like any cached prefix

What does not come is computed. If workers fail, both end: blocks that may still be written belong
to nobody else until the workers were told to stop, in order with the Steps that follow. Knows
nothing of workers, or of why KV moves.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from shoal.core.kv import KVArrived, KVHop, KVLoan, KVOffer, KVPull
from shoal.core.step import BLOCK_SIZE
from shoal.engine.config import EngineConfig
from shoal.engine.events import DropKV, Effect, EndLoan, LendKV, PullKV, TellPulled
from shoal.engine.scheduler import Scheduler
from shoal.engine.sequence import Sequence, Status


@dataclass(frozen=True, slots=True)
class _Loan:
    deadline: float
    hops: tuple[KVHop, ...]


@dataclass(frozen=True, slots=True)
class _Pull:
    deadline: float
    route: int
    names: tuple[bytes, ...]
    hops: tuple[KVHop, ...]


class Transfers:
    """Of one engine."""

    def __init__(self, config: EngineConfig, scheduler: Scheduler) -> None:
        self._config = config
        self._pools = scheduler.pools
        self._scheduler = scheduler
        self._loans: dict[int, _Loan] = {}
        self._pulls: dict[int, _Pull] = {}

    def __bool__(self) -> bool:
        return bool(self._loans or self._pulls)

    def next_deadline(self) -> float | None:
        """When something of it ends by itself."""
        both: list[_Loan | _Pull] = [*self._loans.values(), *self._pulls.values()]
        return min((each.deadline for each in both), default=None)

    def held(self, instance: int) -> list[list[int]]:
        """Blocks of an instance that are lent or on their way; for tests and idle time."""
        both: list[_Loan | _Pull] = [*self._loans.values(), *self._pulls.values()]
        hops = (hop for each in both for hop in each.hops)
        return [list(hop.block_ids) for hop in hops if hop.instance == instance]

    # --- lending ---

    def lend(self, lease_id: int, sequence: Sequence | None, until: float) -> list[Effect]:
        """Lend what there is of a sequence, which may be nothing."""
        if lease_id in self._loans:
            return []
        names, hops = self._full_blocks(sequence)
        if names:
            for hop in hops:
                self._pools.of_instance[hop.instance].hold(hop.block_ids)
            self._loans[lease_id] = _Loan(until, hops)
        return [LendKV(KVLoan(lease_id, hops), names)]

    def end_loan(self, lease_id: int) -> list[Effect]:
        loan = self._loans.pop(lease_id, None)
        if loan is None:
            return []
        self._let_go(loan.hops)
        return [EndLoan(lease_id)]

    def _full_blocks(
        self, sequence: Sequence | None
    ) -> tuple[tuple[bytes, ...], tuple[KVHop, ...]]:
        if sequence is None or sequence.status is not Status.RUNNING:
            return (), ()
        num_tokens = min(sequence.num_returned, len(sequence.token_ids))
        names = tuple(sequence.names(num_tokens // BLOCK_SIZE))
        route = self._config.routes[sequence.route]
        hops = tuple(
            KVHop(at.instance, at.layers, tuple(hop.block_ids[: len(names)]))
            for at, hop in zip(route, sequence.hops, strict=True)
        )
        return names, hops

    # --- receiving ---

    def receive(self, offer: KVOffer, until: float) -> list[Effect]:
        """Get what an offer has beyond what is here."""
        pull_id = offer.lease_id
        is_fit = self._config.prefix_caching and offer.digest == self._config.model_digest
        route = self._roomiest_route() if is_fit and pull_id not in self._pulls else None
        if route is None:
            return [TellPulled(pull_id, 0)]
        first = min(len(found) for found in self._pools.find(route, offer.names))
        count = min(len(offer.names) - first, self._room(route))
        if count < 1:
            return [TellPulled(pull_id, first)]
        names = offer.names[first : first + count]
        hops = tuple(
            KVHop(hop.instance, hop.layers, tuple(pool.allocate(count)))
            for hop, pool in zip(self._config.routes[route], self._pools.along(route), strict=True)
        )
        self._pulls[pull_id] = _Pull(until, route, names, hops)
        return [PullKV(KVPull(pull_id, pull_id, first, offer.sources, hops))]

    def arrived(self, event: KVArrived) -> list[Effect]:
        """A pull is over: what is whole may be found, the rest is free again."""
        pull = self._pulls.pop(event.pull_id, None)
        if pull is None:
            return []
        for index, (hop, count) in enumerate(zip(pull.hops, event.num_blocks, strict=True)):
            named = zip(hop.block_ids[:count], pull.names[:count], strict=True)
            self._pools.publish(pull.route, index, named)
        self._let_go(pull.hops)
        return [TellPulled(event.pull_id, min(event.num_blocks))]

    def _roomiest_route(self) -> int | None:
        usable = self._scheduler.places.usable
        return max(usable, key=self._room, default=None)

    def _room(self, route: int) -> int:
        """Blocks that may be taken: those that run keep one more each to grow into."""
        running = len(self._scheduler.running)
        return min(pool.num_free for pool in self._pools.along(route)) - running

    # --- ends ---

    def expire(self, now: float) -> list[Effect]:
        effects: list[Effect] = []
        for lease_id, loan in list(self._loans.items()):
            if now >= loan.deadline:
                effects += self.end_loan(lease_id)
        for pull_id, pull in list(self._pulls.items()):
            if now >= pull.deadline:
                effects += self._drop(pull_id)
        return effects

    def end_all(self) -> list[Effect]:
        """Workers failed: what they wrote can't be trusted."""
        effects: list[Effect] = []
        for lease_id in list(self._loans):
            effects += self.end_loan(lease_id)
        for pull_id in list(self._pulls):
            effects += self._drop(pull_id)
        return effects

    def _drop(self, pull_id: int) -> list[Effect]:
        self._let_go(self._pulls.pop(pull_id).hops)
        return [DropKV(pull_id), TellPulled(pull_id, 0)]

    def _let_go(self, hops: Iterable[KVHop]) -> None:
        for hop in hops:
            self._pools.of_instance[hop.instance].release(hop.block_ids)
