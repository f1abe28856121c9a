"""How long KV of a prompt takes from host to host, in clusters of any size.

Hosts that others reach only slowly are *poorly joined*: replicas with roles leave them out, as
everybody else would have to count with them. Knows nothing of who starts requests.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Set
from statistics import median

from shoal.core.cluster import Cluster, Link
from shoal.policy.cost_model.transport import message_s

_SIZE_BYTES = 64 << 20
"""Of a message by which hosts are told apart."""
_POOR = 4.0
"""Times as long as is usual between hosts."""


def poorly_joined(cluster: Cluster) -> frozenset[str]:
    """Hosts to which KV takes much longer than is usual."""
    usual_s: dict[str, float] = {}
    for host, links in _between_hosts(cluster, frozenset()).items():
        seconds = [message_s(link, _SIZE_BYTES) for link, n in links.items() for _ in range(n)]
        if seconds:
            usual_s[host] = median(seconds)
    if not usual_s:
        return frozenset()
    most_s = _POOR * median(usual_s.values())
    return frozenset(host for host, own_s in usual_s.items() if own_s > most_s)


class KvLinks:
    """
    Args:
        left_out: hosts that neither send nor take KV.
    """

    def __init__(self, cluster: Cluster, left_out: Set[str]) -> None:
        crowds = Counter(each.host for each in cluster.devices)
        hosts = {each.name: each.host for each in cluster.devices}
        self._links: dict[str, set[Link]] = {
            host: set(links) for host, links in _between_hosts(cluster, left_out).items()
        }
        for each in cluster.hosts:
            if each.link is not None and crowds[each.name] > 1 and each.name in self._links:
                self._links[each.name].add(each.link)
        for one in cluster.links:
            ends = hosts.get(one.a), hosts.get(one.b)
            if None not in ends and self._links.keys() >= set(ends):  # of two devices
                for end in ends:
                    self._links[str(end)].add(one.link)

    def slowest_s(self, hosts: Set[str], size_bytes: float) -> float:
        """Seconds, to one of these hosts from any device that may send."""
        links = {link for host in hosts for link in self._links.get(host, ())}
        return max((message_s(each, size_bytes) for each in links), default=0.0)


def _between_hosts(cluster: Cluster, left_out: Set[str]) -> dict[str, Counter[Link]]:
    """Of each host, its links to every other one: of the pair's own, or the network."""
    found = {each.name: Counter[Link]() for each in cluster.hosts if each.name not in left_out}
    for each in cluster.links:
        if each.a in found and each.b in found:
            found[each.a][each.link] += 1
            found[each.b][each.link] += 1
    if cluster.network is not None:
        for links in found.values():
            plain = len(found) - 1 - links.total()
            if plain > 0:
                links[cluster.network] += plain
    return found
