"""How fast KV gets from one replica of a plan to another: bytes by the cost model, over its links.

    source   layers 0-20 | 20-32        each rank of the target gets its layers and heads of a block
    target   layers 0-16 | 16-32        from all ranks of the source that have such layers

What goes over one link goes one after another; links beside each other work at once. Knows nothing
of which KV is on its way.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from shoal.core.cluster import Cluster, Link
from shoal.core.plan import Hop
from shoal.core.step import BLOCK_SIZE
from shoal.policy.cost_model.times import InstanceCost, ReplicaCost
from shoal.policy.cost_model.transport import message_s

_MANY = 256
"""Blocks; as many tell how long each one more takes, where links are tables."""


@dataclass(frozen=True, slots=True)
class KVLink:
    """From one replica to another: `latency_s` until the first block's begin is there."""

    latency_s: float
    block_s: float


KVLinks = Callable[[str, str], KVLink]
"""From a replica (its name) to another one."""


class PlannedLinks:
    """
    Args:
        costs: of the replicas of a plan, by name.
    """

    def __init__(self, costs: Mapping[str, ReplicaCost], cluster: Cluster) -> None:
        self._costs, self._cluster = costs, cluster
        self._known: dict[tuple[str, str], KVLink] = {}

    def __call__(self, source: str, target: str) -> KVLink:
        pair = source, target
        if pair not in self._known:
            self._known[pair] = self._link(self._costs[source], self._costs[target])
        return self._known[pair]

    def _link(self, source: ReplicaCost, target: ReplicaCost) -> KVLink:
        loads: dict[Link, float] = defaultdict(float)
        for (sent, lender), (got, borrower) in (
            (one, other) for one in _hops(source) for other in _hops(target)
        ):
            num = max(
                min(sent.layers.stop, got.layers.stop) - max(sent.layers.start, got.layers.start), 0
            )
            for device, token_bytes in zip(
                borrower.devices, borrower.kv_token_bytes(), strict=True
            ):
                size = BLOCK_SIZE * token_bytes * num / len(got.layers)
                senders = [each for each in lender.devices if each.name != device.name]
                for each in senders:
                    loads[self._cluster.link(each.name, device.name)] += size / len(senders)
        return max(
            (_kv_link(link, size) for link, size in loads.items() if size),
            key=lambda each: each.block_s,
            default=KVLink(0.0, 0.0),
        )


def _hops(cost: ReplicaCost) -> Iterator[tuple[Hop, InstanceCost]]:
    return zip(cost.plan.routes[0], cost.hops(0), strict=True)


def _kv_link(link: Link, block_bytes: float) -> KVLink:
    one_s, many_s = message_s(link, block_bytes), message_s(link, _MANY * block_bytes)
    block_s = max(many_s - one_s, 0.0) / (_MANY - 1)
    return KVLink(max(one_s - block_s, 0.0), block_s)
