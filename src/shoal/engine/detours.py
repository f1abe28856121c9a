"""Other routes for a sequence that runs, and what it would gain there.

    route 0   [ instance 0 ]──[ instance 1 ]      a detour of route 0, and of route 2: one hop is
    route 1   [ instance 0 ]──[ instance 2 ]      another instance's, and its KV can be copied
    route 2   [ instance 3 ]──[ instance 1 ]      a detour of route 0; of route 1, two hops are

Routes that run other layers of the same instance are none: a block there holds what its route runs.
Knows nothing of how KV gets from one instance to another.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable

from shoal.core.plan import Hop
from shoal.core.step import BLOCK_SIZE
from shoal.engine.config import EngineConfig
from shoal.engine.places import Places
from shoal.engine.sequence import Sequence
from shoal.policy.cost import OtherHop, gain_of_moving, hop_load

# Of each route: those with the fewest other hops.
_MAX_LOOKED_AT = 16


class Detours:
    """Of one engine's routes."""

    def __init__(self, config: EngineConfig, places: Places) -> None:
        self._config = config
        self._places = places
        self._known: dict[int, list[int]] = {}

    def of(self, sequence: Sequence) -> list[int]:
        """Open ones that could hold all of it."""
        return [route for route in self._open(sequence.route) if self.fits(sequence, route)]

    def lighter(self, routes: Iterable[int], load: Counter[int]) -> list[tuple[int, int]]:
        """Routes, each with a detour on which less runs; the largest differences first."""
        differences = {
            (route, other): self._difference(route, other, load)
            for route in sorted(routes)
            for other in self._open(route)
        }
        pairs = [pair for pair, difference in differences.items() if difference > 0]
        return sorted(pairs, key=lambda pair: -differences[pair])

    def fits(self, sequence: Sequence, route: int) -> bool:
        return sequence.max_len <= self._config.route_tokens(route)

    def changed(self, route: int, other: int) -> list[int]:
        """Hops in which two routes differ."""
        routes = self._config.routes
        return [
            hop for hop in range(len(routes[route])) if routes[route][hop] != routes[other][hop]
        ]

    def gain(self, sequence: Sequence, route: int, load: Counter[int]) -> float:
        """What a running sequence gains by going on there.

        Args:
            load: tokens on each instance, its own among them.
        """
        returned = sequence.num_returned
        full = returned // BLOCK_SIZE * BLOCK_SIZE
        routes = self._config.routes
        hops = []
        for here, there in zip(routes[sequence.route], routes[route], strict=True):
            if here == there:
                hops.append(OtherHop(len(here.layers), returned))
                continue
            left = self._hop_load(here, load[here.instance] - sequence.total_len)
            found = self._hop_load(there, load[there.instance])
            hops.append(OtherHop(len(there.layers), full, full, left - found))
        return gain_of_moving(hops, sequence.total_len)

    def _difference(self, route: int, other: int, load: Counter[int]) -> float:
        both = zip(self._config.routes[route], self._config.routes[other], strict=True)
        return sum(
            self._hop_load(here, load[here.instance]) - self._hop_load(there, load[there.instance])
            for here, there in both
            if here != there
        )

    def _hop_load(self, hop: Hop, tokens: int) -> float:
        return hop_load(len(hop.layers), tokens, self._places.shares[hop.instance])

    def _open(self, route: int) -> list[int]:
        if route not in self._known:
            self._known[route] = self._find(route)
        found = (other for other in self._known[route] if self._places.is_open(other))
        return list(itertools.islice(found, _MAX_LOOKED_AT))

    def _find(self, route: int) -> list[int]:
        """All routes that its KV can be copied to, those with few other hops first."""
        routes = self._config.routes
        num_changed = {
            other: len(changed)
            for other in range(len(routes))
            if len(routes[other]) == len(routes[route])
            and (changed := self.changed(route, other))
            and self._can_copy(route, other, changed)
        }
        return sorted(num_changed, key=lambda other: num_changed[other])

    def _can_copy(self, route: int, other: int, hops: list[int]) -> bool:
        places = self._places.instances(route), self._places.instances(other)
        pairs = [(places[0][hop], places[1][hop]) for hop in hops]
        return all(here != there and self._config.can_copy(here, there) for here, there in pairs)
