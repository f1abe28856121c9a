"""A worker's links to its peers: where they are, and over which network each is nearest.

    offered      a peer's addresses, one for each network that its host is on
    measure      tries them all, stays with the one that takes a message soonest

Knows nothing of what is sent.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

from shoal.comm.interfaces import (
    Measured,
    interface_towards,
    measure,
    nearest,
    other_addresses,
)
from shoal.core.errors import WireError
from shoal.wire.curve import MeshKeys
from shoal.wire.mesh import Mesh
from shoal.wire.worker_messages import LinkFacts

log = logging.getLogger(__name__)

_LIMIT_S, _TRY_LIMIT_S = 5.0, 1.0


def open_mesh(keys: MeshKeys, address: str) -> Mesh:
    """Listens at an address, and on this host's other private networks, if it is on one."""
    return Mesh(keys, address, *other_addresses(address))


class Links:
    """
    Args:
        peers: that the worker sends to, or hears of.
    """

    def __init__(self, mesh: Mesh, peers: Iterable[str]) -> None:
        self._mesh = mesh
        self._peers = frozenset(peers)
        self._offered: dict[str, tuple[str, ...]] = {}
        self._nearest: dict[str, int] = {}

    def connect(self, addresses: Mapping[str, tuple[str, ...]]) -> None:
        """Reach peers where they are now; one that moved, over the same network as before."""
        for peer in self._peers & addresses.keys():
            offered = addresses[peer]
            if offered != self._offered.get(peer):
                network = self._nearest.get(peer, 0)
                self._mesh.connect(peer, offered[network if network < len(offered) else 0])
                self._offered[peer] = offered

    def measure(self, peers: Iterable[str]) -> list[LinkFacts]:
        """What links give, each over the network that is best; before anything is sent there.

        Those that do not answer in time are left out.
        """
        found = []
        for peer in sorted(peers):
            link = self._measure(peer)
            if link is None:
                log.warning("the link to %s was not measured: it did not answer", peer)
                continue
            found.append(
                LinkFacts(peer, link.interface, link.latency_s, link.bandwidth_bytes_per_s)
            )
        return found

    def _measure(self, peer: str) -> Measured | None:
        offered = self._offered[peer]
        if len(offered) == 1:
            return self._try(peer, offered[0], _LIMIT_S)
        measured = []
        for address in offered:
            self._mesh.connect(peer, address)
            measured.append(self._try(peer, address, _TRY_LIMIT_S))
        network = self._nearest[peer] = nearest(measured)
        self._mesh.connect(peer, offered[network])
        return measured[network]

    def _try(self, peer: str, address: str, limit_s: float) -> Measured | None:
        """None: there is no way."""
        host = address.partition(" ")[0].removeprefix("tcp://").rpartition(":")[0].strip("[]")
        try:
            return measure(
                interface_towards(host), lambda size: self._mesh.round_trip(peer, size, limit_s)
            )
        except WireError:
            return None
