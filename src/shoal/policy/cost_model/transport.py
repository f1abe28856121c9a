"""Seconds of messages and collectives over a cluster's links.

    message      points of the link; else latency + bytes / rate
    all-reduce   points of that many ranks; else between those of fewer and more; else a ring, by
                 the best of NCCL's protocols (NVIDIA/nccl src/graph/tuning.cc):
                 base + 2 (n - 1) hop + 2 (n - 1) / n x bytes / (share x rate)
    all-to-all   to ranks with experts only: latency + what the busiest one gets / rate; there are
                 two in a layer, dispatch and combine (DeepEP, legacy docs)

A group is as slow as the slowest of its links. Knows nothing of models.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from shoal.core.cluster import AllReduceTable, Cluster, Device, Link
from shoal.policy.cost_model.tables import between, time_at

_PROTOCOLS = {
    "nvlink": ((6.6e-6, 0.6e-6, 0.5), (14e-6, 1.9e-6, 0.95), (8.4e-6, 3.4e-6, 1.0)),
    "pcie": ((6.6e-6, 1.0e-6, 0.5), (14e-6, 2.5e-6, 0.95), (8.4e-6, 5.7e-6, 1.0)),
}
"""Of NCCL's LL, LL128 and Simple: base, hop, share of the link's rate."""

_CUSTOM_UP_TO = {"trtllm": ((2, math.inf), (4, 1e6), (math.inf, 5e5))}
"""Bytes from which an engine leaves sums to NCCL though it has kernels for them, by ranks up to so
many. TensorRT-LLM, allreduceOp.cpp, selectImplementation; not said of an engine: what is faster."""


def message_s(link: Link, size_bytes: float) -> float:
    """One way."""
    if link.bytes_per_s == math.inf or size_bytes <= 0:
        return 0.0
    if link.points:
        return time_at(link.points, size_bytes)
    return link.latency_s + size_bytes / link.bytes_per_s


def ring_s(link: Link, num_ranks: int, size_bytes: float) -> float:
    """All-reduce over links that are alike; each hop of one that is no GPU's costs its latency."""
    family = link.kind.rstrip("0123456789")
    steps = 2 * (num_ranks - 1)
    seconds = steps / num_ranks * size_bytes / link.bytes_per_s
    protocols = _PROTOCOLS.get(family, ((0.0, link.latency_s, 1.0),))
    return min(base + steps * hop + seconds / share for base, hop, share in protocols)


class GroupLinks:
    """What joins the devices of an instance.

    Args:
        devices: in the order of ranks.
        engine: others than shoal have kernels of their own for small sums; they count where they
            were measured.
    """

    def __init__(
        self, cluster: Cluster, devices: Sequence[Device], *, engine: str = "shoal"
    ) -> None:
        self.num_ranks = len(devices)
        names = [each.name for each in devices]
        pairs = [cluster.link(a, b) for a, b in itertools.combinations(names, 2)]
        self.slowest = max(pairs, key=_slowness) if pairs else None
        hosts = {each.host for each in devices}
        tables = _tables(cluster, hosts)
        self._nccl, self._custom = (
            sorted((each for each in tables if each.backend == backend), key=_ranks)
            for backend in ("nccl", "custom")
        )
        self._most_custom_bytes = _most_custom_bytes(engine, self.num_ranks)

    def all_reduce_s(self, size_bytes: float) -> float:
        """Of a sum over all ranks."""
        if self.slowest is None or size_bytes <= 0:
            return 0.0
        own = self._custom if size_bytes < self._most_custom_bytes else []
        tables = [each for each in (self._nccl, own) if each]
        link, num_ranks = self.slowest, self.num_ranks
        if not tables:
            return ring_s(link, num_ranks, size_bytes)
        return min(all_reduce_at(each, link, num_ranks, size_bytes) for each in tables)

    def all_to_all_s(self, most_bytes: float) -> float:
        """
        Args:
            most_bytes: what the rank gets that gets most.
        """
        return 0.0 if self.slowest is None else message_s(self.slowest, most_bytes)


def _tables(cluster: Cluster, hosts: set[str]) -> Sequence[AllReduceTable]:
    """Measured among devices of one host; or among just these hosts, else the slowest of parts."""
    if len(hosts) == 1:
        return cluster.host(next(iter(hosts))).all_reduce
    inside = [each for each in cluster.all_reduce if hosts.issuperset(each.hosts)]
    if not inside:
        return ()
    most = max(len(each.hosts) for each in inside)
    return [max((each for each in inside if len(each.hosts) == most), key=_last_s)]


def all_reduce_at(
    tables: Sequence[AllReduceTable], link: Link, num_ranks: int, size_bytes: float
) -> float:
    """From measured tables, by number of ranks: between two, or from the nearest as a ring goes."""
    fewer = [each for each in tables if each.num_ranks <= num_ranks]
    more = [each for each in tables if each.num_ranks >= num_ranks]
    if fewer and fewer[-1].num_ranks == num_ranks:
        return time_at(fewer[-1].points, size_bytes)
    if fewer and more:
        low, high = fewer[-1], more[0]
        return between(
            num_ranks,
            (low.num_ranks, time_at(low.points, size_bytes)),
            (high.num_ranks, time_at(high.points, size_bytes)),
        )
    near = fewer[-1] if fewer else more[0]
    ratio = ring_s(link, num_ranks, size_bytes) / ring_s(link, near.num_ranks, size_bytes)
    return time_at(near.points, size_bytes) * ratio


def _most_custom_bytes(engine: str, num_ranks: int) -> float:
    """Larger sums are left to NCCL."""
    if engine == "shoal":
        return 0.0
    limits = _CUSTOM_UP_TO.get(engine, ())
    return next((size for ranks, size in limits if num_ranks <= ranks), math.inf)


def _slowness(link: Link) -> tuple[float, float]:
    return 1 / link.bytes_per_s, link.latency_s


def _last_s(table: AllReduceTable) -> float:
    return table.points[-1][1]


def _ranks(table: AllReduceTable) -> int:
    return table.num_ranks
