"""Which devices `shoal probe` measures, and how processes get to them.

here        this machine's
cluster     of every machine that joined the one `shoal up` started here
lab         of hosts as a lab has them
"""

from __future__ import annotations

import platform
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from shoal.cluster.nvml import read_topology
from shoal.cluster.probe_cache import ProbeCache, key_of
from shoal.cluster.topology import Topology
from shoal.plan_file.machine import num_cpus, num_cuda_devices
from shoal.probe.asked import Site
from shoal.wire.messages import ClusterNet, HostNet
from shoal.wire.worker_messages import Link

if TYPE_CHECKING:
    from shoal.cluster.folder import Record
    from shoal.executor.launcher import Launcher
    from shoal.executor.ray_launcher import Node

_HERE = "local"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """What is to be measured.

    Attributes:
        links: of a lab, between hosts.
        key: of what the hardware says of itself.
    """

    sites: tuple[Site, ...]
    launcher: Callable[[], Launcher]
    links: Mapping[tuple[str, str], Link] = field(default_factory=dict)
    key: str = ""


def here_or_cluster() -> Place:
    """This machine; or every machine of the cluster whose head it is.

    Raises:
        ConfigError: this machine only joined the cluster, or that cannot be reached.
    """
    from shoal.cli.serving import cluster_here
    from shoal.core.errors import ConfigError

    cluster = cluster_here()
    if cluster is None:
        return _here()
    if not cluster.is_head:
        raise ConfigError(
            f"this machine only joined a cluster; probe from its head ({cluster.head})"
        )
    return _cluster(cluster)


def probe_cache() -> ProbeCache:
    """Of this user."""
    from shoal.model.cache import models_folder

    return ProbeCache(models_folder().parent / "probes")


@contextmanager
def lab_place(path: Path, namespaces: bool | None) -> Iterator[Place]:
    """A lab's hosts while they are there; none of its own workers is started.

    Raises:
        ConfigError: the lab file says nothing of its hosts' speeds, or is wrong.
    """
    from shoal.cli.lab import leave, make_hosts, network_of
    from shoal.executor.launcher import LocalLauncher
    from shoal.lab.file import read_lab

    lab = read_lab(path)
    cpus = lab.cpus(num_cpus())
    with tempfile.TemporaryDirectory(prefix="shoal-probe-") as folder:
        network = network_of(Path(folder))
        signal.signal(signal.SIGTERM, leave)  # or namespaces would outlive us
        try:
            hosts, has_namespaces = make_hosts(network, lab, namespaces)
            links = {
                pair: Link(
                    bandwidth_bytes_per_s=None if has_namespaces else speed.bandwidth_bytes_per_s,
                    latency_s=speed.latency_s,
                )
                for pair, speed in lab.links.items()
            }
            nets = {name: HostNet(each.command, each.address) for name, each in hosts.items()}
            sites = tuple(
                Site(
                    name=f"{rank.host}.cpu",
                    host=str(rank.host),
                    device=rank.device,
                    machine=_HERE,
                    num_threads=rank.num_threads or 1,
                    speed=rank.speed,
                    place=rank.host,
                )
                for rank in cpus
            )
            yield Place(sites=sites, launcher=lambda: LocalLauncher(nets), links=links)
        finally:
            network.remove()


def _here() -> Place:
    from shoal.executor.launcher import LocalLauncher

    topology = read_topology()
    return Place(
        sites=tuple(_sites(_HERE, num_cuda_devices(), num_cpus(), None)),
        launcher=lambda: LocalLauncher({}),
        key=key_of([_described(topology)]),
    )


def _cluster(cluster: Record) -> Place:
    from shoal.cli.up import cluster_folder
    from shoal.executor.ray_launcher import RayLauncher

    launcher = RayLauncher(
        ClusterNet(cluster.head, str(cluster_folder().token), cluster.address, "")
    )
    nodes = launcher.nodes()
    sites = (
        site
        for node in nodes
        for site in _sites(node.name, node.num_gpus, node.num_cpus, node.name)
    )
    return Place(
        sites=tuple(sites), launcher=lambda: launcher, key=key_of([_node(each) for each in nodes])
    )


def _sites(host: str, num_gpus: int, cpus: int, place: str | None) -> Iterator[Site]:
    for number in range(num_gpus):
        yield Site(
            name=f"{host}.{number}",
            host=host,
            device=f"cuda:{number}",
            machine=host,
            num_threads=1,
            place=place,
        )
    yield Site(
        name=f"{host}.cpu", host=host, device="cpu", machine=host, num_threads=cpus, place=place
    )


def _described(topology: Topology) -> tuple[object, ...]:
    """What stays the same until somebody changes the machine."""
    gpus = [(each.uuid, each.memory_bytes, each.power_limit_w) for each in topology.gpus]
    nics = [(each.name, each.bytes_per_s, each.driver) for each in topology.nics]
    memory = psutil.virtual_memory().total
    return platform.node(), _cpu_model(), num_cpus(), memory, topology.driver, gpus, nics


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith("model name")), "")


def _node(node: Node) -> tuple[object, ...]:
    return node.name, node.address, node.num_cpus, node.num_gpus
