"""A lab's settings for its workers: speeds from the plan, links of hosts as links of workers.

Where hosts are namespaces their wires keep to the bandwidth, and sockets add the latency;
elsewhere sockets keep to both, each pair of workers for itself. Knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from shoal.core.plan import RankPlan, ReplicaPlan
from shoal.lab.file import LinkSpeed, Pair, pair
from shoal.lab.folder import HostState, LinkState, Settings


def workers_of(replicas: Sequence[ReplicaPlan]) -> dict[str, str]:
    """Every worker (REPLICA/WORKER where there are several replicas) → its host, "" without one."""
    return {name: rank.host or "" for name, rank in _ranks(replicas)}


def first_settings(
    replicas: Sequence[ReplicaPlan],
    links: Mapping[Pair, LinkSpeed],
    hosts: Mapping[str, HostState],
    *,
    has_namespaces: bool,
) -> Settings:
    """What workers keep to when a lab comes up."""
    speeds = {name: rank.speed for name, rank in _ranks(replicas)}
    workers = workers_of(replicas)
    states = {
        key(one, other): LinkState(
            bandwidth=None if has_namespaces else speed.bandwidth_bytes_per_s,
            latency=speed.latency_s,
        )
        for (one, other), speed in _between_workers(workers, links).items()
    }
    return Settings(speeds, states, hosts)


def with_cuts(settings: Settings, workers: Mapping[str, str], cuts: tuple[Pair, ...]) -> Settings:
    """The same links, with these pairs of hosts or workers cut and no others."""
    cut_pairs = {
        pair(one, other)
        for left, right in cuts
        for one in members(workers, left)
        for other in members(workers, right)
    }
    names = {*settings.links, *(key(*each) for each in cut_pairs)}
    links: dict[str, LinkState] = {}
    for name in sorted(names):
        old = settings.links.get(name, LinkState())
        one, _, other = name.partition("|")
        links[name] = LinkState(pair(one, other) in cut_pairs, old.bandwidth, old.latency)
    return Settings(settings.speeds, links, settings.hosts)


def members(workers: Mapping[str, str], name: str) -> list[str]:
    """The workers that a name means: one, those of a host, or a stage's or instance's (s1, s1.i2),
    or a replica's.

    Empty: it means none.
    """
    return [
        worker
        for worker, host in workers.items()
        if name in (worker, host) or worker.startswith((f"{name}.", f"{name}/"))
    ]


def key(one: str, other: str) -> str:
    return "|".join(pair(one, other))


def _ranks(replicas: Sequence[ReplicaPlan]) -> Iterator[tuple[str, RankPlan]]:
    for index, replica in enumerate(replicas):
        lead = f"replica-{index}/" if len(replicas) > 1 else ""
        for number, instance in enumerate(replica.instances):
            for rank, each in enumerate(instance.ranks):
                yield lead + replica.worker_name(number, rank), each


def _between_workers(
    workers: Mapping[str, str], links: Mapping[Pair, LinkSpeed]
) -> dict[Pair, LinkSpeed]:
    return {
        (one, other): links[between]
        for one, host in workers.items()
        for other, other_host in workers.items()
        if one < other
        and one.rpartition("/")[0] == other.rpartition("/")[0]  # replicas send each other no Steps
        and (between := pair(host, other_host)) in links
    }
