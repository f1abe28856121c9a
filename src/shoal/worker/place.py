"""Where a worker stands in its replica: its hop of each route, and whom it exchanges with.

    instance 0  r0 ──► r0  instance 1      activations: rank r gets them of rank r * n0 // n1,
                r1 ──► r1                  as every rank of an instance has all of them
                   └─► r2
    tokens      first rank of a route's last instance ──► every rank of its first

Ranks that have experts only are sent neither: they keep no hidden states.

Knows nothing of processes, sockets or tensors.
"""

from __future__ import annotations

from shoal.core.plan import ReplicaPlan, Route
from shoal.core.split import Shard


class Place:
    """One worker's place.

    Attributes:
        hops: of each route that its instance is on, by the route's number, which hop that is.
        mates: the other ranks of its instance.
        follows: another rank decides which Step of several routes is next.
        leads: this one does.
    """

    def __init__(self, replica: ReplicaPlan, instance: int, rank: int) -> None:
        names = replica.worker_names(instance)
        self.name = names[rank]
        self.rank = rank
        self.shard: Shard = replica.shards(instance)[rank]
        self.routes: tuple[Route, ...] = replica.routes
        self.hops = {
            number: hop
            for number, route in enumerate(replica.routes)
            for hop, each in enumerate(route)
            if each.instance == instance
        }
        self.mates = tuple(name for name in names if name != self.name)
        is_shared = len(self.hops) > 1 and len(names) > 1
        self.follows = is_shared and rank > 0
        self.leads = is_shared and rank == 0
        self._streams_of = [
            tuple(replica.worker_name(number, rank) for rank in each.split.streams)
            for number, each in enumerate(replica.instances)
        ]

    def takers(self, route: int) -> tuple[str, ...]:
        """Workers of the next instance that this one sends activations to."""
        hops, hop = self.routes[route], self.hops[route]
        if hop + 1 == len(hops) or not self.shard.has_stream:
            return ()
        ours, theirs = (self._streams_of[hops[each].instance] for each in (hop, hop + 1))
        own = ours.index(self.name)
        return tuple(
            name for rank, name in enumerate(theirs) if rank * len(ours) // len(theirs) == own
        )

    def givers(self, route: int) -> tuple[str, ...]:
        """The worker of the instance before that it gets activations from."""
        hops, hop = self.routes[route], self.hops[route]
        if hop == 0 or not self.shard.has_stream:
            return ()
        before, ours = (self._streams_of[hops[each].instance] for each in (hop - 1, hop))
        return (before[ours.index(self.name) * len(before) // len(ours)],)

    def token_takers(self, route: int) -> tuple[str, ...]:
        """Workers that it sends sampled tokens to."""
        hops = self.routes[route]
        is_last = self.hops[route] + 1 == len(hops)
        if not is_last or len(hops) == 1 or self.rank:
            return ()
        return self._streams_of[hops[0].instance]

    def token_givers(self, route: int) -> tuple[str, ...]:
        """The worker that it gets sampled tokens from."""
        hops = self.routes[route]
        if self.hops[route] or len(hops) == 1 or not self.shard.has_stream:
            return ()
        return self._streams_of[hops[-1].instance][:1]

    @property
    def sends_to(self) -> frozenset[str]:
        named = {name for r in self.hops for name in (*self.takers(r), *self.token_takers(r))}
        return frozenset(named | set(self.mates))

    @property
    def hears(self) -> frozenset[str]:
        """Workers that messages come from."""
        named = {name for r in self.hops for name in (*self.givers(r), *self.token_givers(r))}
        return frozenset(named | set(self.mates))
