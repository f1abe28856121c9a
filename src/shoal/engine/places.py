"""Which route a waiting sequence takes: what is cached along it against what runs there.

A route is usable while none of its instances is down, and open while none is drained either; who
fits on no open route takes another. Its cost is `policy/cost.py`'s; a route that has no room now,
or could never hold the whole sequence, is none. Knows nothing of Steps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from shoal.core.stats import InstanceStats
from shoal.core.step import BLOCK_SIZE
from shoal.engine.blocks import blocks_for
from shoal.engine.config import EngineConfig
from shoal.engine.pools import Pools
from shoal.engine.sequence import Sequence as TokenSequence
from shoal.policy.cost import Work, cheapest_work, route_cost


@dataclass(frozen=True, slots=True)
class Place:
    """A route for a sequence.

    Attributes:
        found: for each hop, the blocks it need not compute.
        work: what it must.
    """

    route: int
    found: tuple[list[int], ...]
    work: Work
    cost: float


class Places:
    """The routes, and which of them may be taken.

    Attributes:
        shares: KV blocks of each instance, as a share of the largest's; less of one that is slow.
        slow: instances that are, lately: how many times as long their Steps take as usual.
        down: instances that run no Steps.
        drained: instances that are to have no sequences.
    """

    def __init__(self, config: EngineConfig, pools: Pools) -> None:
        self._config = config
        self._pools = pools
        largest = max(config.instance_blocks)
        self._sizes = [num_blocks / largest for num_blocks in config.instance_blocks]
        self.shares = list(self._sizes)
        self.slow: tuple[tuple[int, float], ...] = ()
        self._layers = [[len(hop.layers) for hop in route] for route in config.routes]
        self._instances = [[hop.instance for hop in route] for route in config.routes]
        self._routes = list(range(len(config.routes)))
        self.down: set[int] = set()
        self.drained: set[int] = set()

    def slow_down(self, times: tuple[tuple[int, float], ...]) -> None:
        """These are slow, and no others: who carries less for its size is chosen less."""
        self.slow = times
        self.shares = list(self._sizes)
        for instance, each in times:
            self.shares[instance] /= each

    def is_usable(self, route: int) -> bool:
        return self.down.isdisjoint(self._instances[route])

    def is_open(self, route: int) -> bool:
        return self.is_usable(route) and self.drained.isdisjoint(self._instances[route])

    @property
    def usable(self) -> list[int]:
        if not self.down:
            return self._routes
        return [route for route in self._routes if self.is_usable(route)]

    def instances(self, route: int) -> list[int]:
        """Of each hop."""
        return self._instances[route]

    def stats(self, running: Sequence[TokenSequence]) -> tuple[InstanceStats, ...]:
        """Of each instance on a route, where there are several."""
        if len(self._instances) == 1:
            return ()
        stages = {each: stage for route in self._instances for stage, each in enumerate(route)}
        counts = self._along(Counter(other.route for other in running))
        return tuple(
            InstanceStats(
                instance=instance,
                stage=stages[instance],
                is_down=instance in self.down,
                is_drained=instance in self.drained,
                num_running=counts[instance],
            )
            for instance in sorted(stages)
        )

    def candidates(self, sequence: TokenSequence, running: Sequence[TokenSequence]) -> list[Place]:
        """Its places on usable routes that could hold all of it, the cheapest first."""
        routes = [
            route for route in self.usable if sequence.max_len <= self._config.route_tokens(route)
        ]
        routes = [route for route in routes if self.is_open(route)] or routes
        load = self.tokens(running) if len(routes) > 1 else Counter()
        return sorted((self._place(sequence, route, load) for route in routes), key=_by_cost)

    def has_room(
        self,
        sequence: TokenSequence,
        place: Place,
        running: Sequence[TokenSequence],
        returning: Counter[int],
    ) -> bool:
        """Whether it could run beside `running`, once `returning` blocks of instances are back."""
        if len(running) >= self._config.max_num_seqs:
            return False
        beside = self._along(Counter(other.route for other in running))
        wanted = blocks_for(sequence.total_len)
        hops = zip(self._instances[place.route], place.found, strict=True)
        # Room for one more block each, or the newcomer would be preempted at once.
        return all(
            self._lacking(instance, wanted, found) + beside[instance]
            <= self._pools.of_instance[instance].num_free + returning[instance]
            for instance, found in hops
        )

    def has_plain_room(self, sequence: TokenSequence, num_running: int) -> bool:
        """Whether it could run on some route with none of its blocks cached: a quick look, before
        it is known which are."""
        wanted = blocks_for(sequence.total_len) + num_running
        return any(
            self.is_open(route)
            and sequence.max_len <= self._config.route_tokens(route)
            and all(pool.num_free >= wanted for pool in self._pools.along(route))
            for route in range(len(self._instances))
        )

    def blocks(self, sequences: Iterable[TokenSequence]) -> Counter[int]:
        """Blocks of each instance that these hold."""
        held: Counter[int] = Counter()
        for sequence in sequences:
            instances = self._instances[sequence.route]
            for instance, hop in zip(instances, sequence.hops, strict=True):
                held[instance] += len(hop.block_ids)
        return held

    def held(self, sequences: Iterable[TokenSequence], instance: int) -> Iterable[list[int]]:
        """Of an instance, by each of these."""
        for sequence in sequences:
            for at, hop in zip(self._instances[sequence.route], sequence.hops, strict=True):
                if at == instance:
                    yield hop.block_ids

    def tokens(self, running: Sequence[TokenSequence]) -> Counter[int]:
        """Tokens of the sequences that run on each instance."""
        of_route: Counter[int] = Counter()
        for sequence in running:
            of_route[sequence.route] += sequence.total_len
        return self._along(of_route)

    def _along(self, of_route: Counter[int]) -> Counter[int]:
        """Sums over routes, on each instance that they go through."""
        sums: Counter[int] = Counter()
        for route, amount in of_route.items():
            for instance in self._instances[route]:
                sums[instance] += amount
        return sums

    def _place(self, sequence: TokenSequence, route: int, load: Counter[int]) -> Place:
        found = self._found(sequence, route)
        layers, instances = self._layers[route], self._instances[route]
        work = cheapest_work(
            [len(blocks) * BLOCK_SIZE for blocks in found], layers, sequence.total_len
        )
        cost = route_cost(
            work,
            layers,
            [load[instance] for instance in instances],
            [self.shares[instance] for instance in instances],
        )
        return Place(route, found, work, cost)

    def _found(self, sequence: TokenSequence, route: int) -> tuple[list[int], ...]:
        if not self._config.prefix_caching or sequence.wants_prompt_logprobs:
            return tuple([] for _ in self._instances[route])
        # The last token is always computed, as its logits are wanted; tokens still in flight
        # (it may have been preempted) have no names yet.
        num_known = min(sequence.total_len - 1, len(sequence.token_ids))
        return self._pools.find(route, sequence.names(num_known // BLOCK_SIZE))

    def _lacking(self, instance: int, wanted: int, found: list[int]) -> int:
        """Free blocks of an instance that admitting a sequence would use up."""
        pool = self._pools.of_instance[instance]
        return wanted - sum(1 for block in found if not pool.is_free(block))


def _by_cost(place: Place) -> float:
    return place.cost
