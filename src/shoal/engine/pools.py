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
        self._layers = tuple(_layer_keys(route) for route in config.routes)
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
            pool.find(name + layers for name in names)
            for pool, layers in zip(self.along(route), self._layers[route], strict=True)
        )

    def publish(self, route: int, hop: int, named: Iterable[tuple[int, BlockName]]) -> None:
        """Make blocks of a hop findable by their names."""
        pool, layers = self.along(route)[hop], self._layers[route][hop]
        pool.publish([(block, name + layers) for block, name in named])


def _layer_keys(route: Route) -> tuple[bytes, ...]:
    return tuple(f" {hop.layers.start}-{hop.layers.stop}".encode() for hop in route)
