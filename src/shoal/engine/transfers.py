"""KV that is lent to other engines, and KV that is on its way here.

    loans     what is lent is held until its lease ends (engine/loans.py)
    receive   free blocks are taken and filled; those that are whole when the pull is over are
              published by name, and let go: admission finds them like any cached prefix

What does not come is computed. If workers fail, both end: blocks that may still be written belong
to nobody else until the workers were told to stop, in order with the Steps that follow. Knows
nothing of workers, or of why KV moves.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from shoal.core.kv import KVArrived, KVHop, KVOffer, KVPull
from shoal.engine.config import EngineConfig
from shoal.engine.events import DropKV, Effect, PullKV, StopKV, TellPulled
from shoal.engine.loans import Loans
from shoal.engine.scheduler import Scheduler

_STOP_GRACE_S = 1.0


@dataclass(frozen=True, slots=True)
class _Pull:
    deadline: float
    route: int
    first: int
    names: tuple[bytes, ...]
    hops: tuple[KVHop, ...]
    is_stopped: bool = False


class Transfers:
    """Of one engine.

    Attributes:
        loans: what others may read.
    """

    def __init__(self, config: EngineConfig, scheduler: Scheduler) -> None:
        self._config = config
        self._pools = scheduler.pools
        self._scheduler = scheduler
        self.loans = Loans(config, scheduler)
        self._pulls: dict[int, _Pull] = {}

    def __bool__(self) -> bool:
        return bool(self.loans or self._pulls)

    def next_deadline(self) -> float | None:
        """When something of it ends by itself."""
        deadlines = [self.loans.next_deadline(), *(each.deadline for each in self._pulls.values())]
        return min((each for each in deadlines if each is not None), default=None)

    def held(self, instance: int) -> list[list[int]]:
        """Blocks of an instance that are lent or on their way; for tests and idle time."""
        hops = (hop for each in self._pulls.values() for hop in each.hops)
        coming = [list(hop.block_ids) for hop in hops if hop.instance == instance]
        return [*self.loans.held(instance), *coming]

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
        self._pulls[pull_id] = _Pull(until, route, first, names, hops)
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
        return [TellPulled(event.pull_id, pull.first + min(event.num_blocks))]

    def _roomiest_route(self) -> int | None:
        usable = self._scheduler.places.usable
        return max(usable, key=self._room, default=None)

    def _room(self, route: int) -> int:
        """Blocks that may be taken: those that run keep one more each to grow into."""
        running = len(self._scheduler.running)
        return min(pool.num_free for pool in self._pools.along(route)) - running

    # --- ends ---

    def expire(self, now: float) -> list[Effect]:
        if not self:
            return []
        effects = self.loans.expire(now)
        for pull_id, pull in list(self._pulls.items()):
            if now >= pull.deadline:
                effects += self._drop(pull_id) if pull.is_stopped else self._stop(pull_id, now)
        return effects

    def end_all(self) -> list[Effect]:
        """Workers failed: what they wrote can't be trusted."""
        effects = self.loans.end_all()
        for pull_id in list(self._pulls):
            effects += self._drop(pull_id)
        return effects

    def _stop(self, pull_id: int, now: float) -> list[Effect]:
        """What came in time is of use; workers say at once how much that is, unless they hang."""
        pull = self._pulls[pull_id]
        self._pulls[pull_id] = replace(pull, deadline=now + _STOP_GRACE_S, is_stopped=True)
        return [StopKV(pull_id)]

    def _drop(self, pull_id: int) -> list[Effect]:
        self._let_go(self._pulls.pop(pull_id).hops)
        return [DropKV(pull_id), TellPulled(pull_id, 0)]

    def _let_go(self, hops: Iterable[KVHop]) -> None:
        for hop in hops:
            self._pools.of_instance[hop.instance].release(hop.block_ids)
