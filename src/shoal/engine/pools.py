"""The KV blocks of all instances, seen along the routes that go through them.

One pool for each instance: what one has more than its neighbours keeps prefixes. A block holds
the layers that its route runs there, so routes that run others don't find it. Knows nothing of
sequences.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from shoal.core.plan import Route
from shoal.engine.blocks import BlockName, BlockPool
from shoal.engine.config import EngineConfig


class Pools:
    """A `BlockPool` for each instance."""

    def __init__(self, config: EngineConfig) -> None:
        self._layers = _layer_keys(config.routes)
        parts = config.rank_blocks or ((),) * len(config.instance_blocks)
        self.of_instance = tuple(
            BlockPool(num_blocks, own)
            for num_blocks, own in zip(config.instance_blocks, parts, strict=True)
        )
        self._along = [
            tuple(self.of_instance[hop.instance] for hop in route) for route in config.routes
        ]

    def along(self, route: int) -> tuple[BlockPool, ...]:
        """The pool of each hop."""
        return self._along[route]

    def find(self, route: int, names: Sequence[BlockName]) -> tuple[list[int], ...]:
        """For each hop, the blocks of the longest known beginning of `names`."""
        return tuple(
            pool.find([name + layers for name in names] if layers else names)
            for pool, layers in zip(self.along(route), self._layers[route], strict=True)
        )

    def publish(self, route: int, hop: int, named: Iterable[tuple[int, BlockName]]) -> None:
        """Make blocks of a hop findable by their names."""
        pool, layers = self.along(route)[hop], self._layers[route][hop]
        pool.publish([(block, name + layers) for block, name in named] if layers else named)


def _layer_keys(routes: Sequence[Route]) -> tuple[tuple[bytes, ...], ...]:
    """Of each hop of each route; nothing where all routes run the same layers on an instance."""
    of_instance: dict[int, set[tuple[int, int]]] = {}
    for hop in (hop for route in routes for hop in route):
        of_instance.setdefault(hop.instance, set()).add((hop.layers.start, hop.layers.stop))
    return tuple(
        tuple(
            f" {hop.layers.start}-{hop.layers.stop}".encode()
            if len(of_instance[hop.instance]) > 1
            else b""
            for hop in route
        )
        for route in routes
    )
