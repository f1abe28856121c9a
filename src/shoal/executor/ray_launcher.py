"""Workers on a cluster: Ray places, supervises and replaces their agents, and carries nothing else.

    place    a placement group for an instance, with a bundle for each rank, on the node that the
             plan names; where that one is gone or not heard, on another
    start    an actor in each bundle (`worker/agent.py`), which starts the worker

What is said to workers, and among them, goes over our own sockets. Ranks that name no host are
children of this process. Needs the extra `ray`. Knows nothing of Steps.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import zmq

from shoal.core.errors import ConfigError, DeviceError, ShoalError
from shoal.core.plan import RankPlan
from shoal.executor.launcher import Launch, LocalLauncher, Running, Spot, WorkerCodec
from shoal.executor.remote import RemoteWorker
from shoal.wire.agent_link import EXECUTOR, AgentLink
from shoal.wire.curve import MeshKeys
from shoal.wire.mesh import Mesh
from shoal.wire.messages import ClusterNet
from shoal.wire.worker_messages import LaunchWorker
from shoal.worker.agent import Agent

_ASK_S = 30.0
_FETCH_S = 1800.0
_PLACE_LIMIT_S = 240.0
_LOOK_EVERY_S = 0.5
_AVOID_S = 20.0
"""Ray takes longer than we do to notice that a node is gone; so long we don't ask for it."""

_A_LITTLE = 0.001
"""Of a resource: the plan says what runs where, so that Ray need not count."""


@dataclass(frozen=True, slots=True)
class Node:
    """A machine of the cluster.

    Attributes:
        id: Ray's; a machine that leaves and joins again has another.
    """

    id: str
    name: str
    address: str
    num_cpus: int
    num_gpus: int

    def is_called(self, host: str) -> bool:
        return host in (self.name, self.address)


class RayLauncher:
    """
    Raises:
        ConfigError: Ray is not installed, or the cluster cannot be reached.
    """

    def __init__(self, cluster: ClusterNet) -> None:
        self._cluster = cluster
        self._ray = connect(cluster)
        self._here = LocalLauncher({}, cluster.here)
        self._groups: dict[int, Any] = {}
        self._workers_at: dict[int, list[str]] = {}
        self._avoided_until_s: dict[str, float] = {}
        self._was_placed: set[int] = set()

    async def place(self, instance: int, ranks: Sequence[RankPlan]) -> Sequence[Spot]:
        local = await self._here.place(instance, [rank for rank in ranks if rank.host is None])
        away = [rank for rank in ranks if rank.host is not None]
        self._workers_at[instance] = [self._cluster.here] * (len(ranks) - len(away))
        remote = await asyncio.to_thread(self._place, instance, away) if away else []
        self._workers_at[instance] += [spot.address for spot in remote]
        spots = (iter(local), iter(remote))
        return [next(spots[rank.host is not None]) for rank in ranks]

    def nodes(self) -> list[Node]:
        """The machines that are there."""
        return [node_of(each) for each in self._ray.nodes() if each["Alive"]]

    def close(self) -> None:
        for instance in list(self._groups):
            self._give_up(instance)
        self._ray.shutdown()

    def avoid(self, node: Node) -> None:
        """A node from which a worker was lost: for a while another is better."""
        self._avoided_until_s[node.id] = time.monotonic() + _AVOID_S

    def call(self, reference: Any, timeout_s: float = _ASK_S) -> Any:
        """What an agent answers.

        Raises:
            DeviceError: it does not.
        """
        try:
            return self._ray.get(reference, timeout=timeout_s)
        except (self._ray.exceptions.RayError, TimeoutError) as error:
            raise DeviceError(f"the cluster did not start a worker: {error}") from error

    def agent(self, group: Any, bundle: int, node: Node, name: str, public: str) -> Any:
        """An actor in a bundle; it may still be starting."""
        strategies = self._ray.util.scheduling_strategies
        placed = strategies.PlacementGroupSchedulingStrategy(group, bundle)
        options = {"num_cpus": _A_LITTLE, "max_restarts": 0, "scheduling_strategy": placed}
        return self._ray.remote(Agent).options(**options).remote(name, node.address, public)

    def kill(self, agent: Any) -> None:
        self._ray.kill(agent)

    def _place(self, instance: int, ranks: Sequence[RankPlan]) -> list[Spot]:
        self._give_up(instance)
        until_s = time.monotonic() + _PLACE_LIMIT_S
        is_first = instance not in self._was_placed
        load = Counter(at for others in self._workers_at.values() for at in others)
        while True:
            nodes = self.nodes()
            heard = nodes if is_first else self._without_avoided(nodes)
            chosen = choose_nodes(ranks, heard, load, only_named=is_first)
            if chosen is not None and (group := self._reserve(chosen)) is not None:
                self._groups[instance] = group
                self._was_placed.add(instance)
                return [
                    _RaySpot(self, self._cluster, group, bundle, node)
                    for bundle, node in enumerate(chosen)
                ]
            if time.monotonic() > until_s:
                raise DeviceError(f"no node of the cluster took instance {instance}")
            time.sleep(_LOOK_EVERY_S)

    def _reserve(self, nodes: Sequence[Node]) -> Any | None:
        bundles = [{"CPU": _A_LITTLE, f"node:{node.address}": _A_LITTLE} for node in nodes]
        group = self._ray.util.placement_group(bundles, strategy="SPREAD")
        if group.wait(_ASK_S / 6):
            return group
        self._ray.util.remove_placement_group(group)
        return None

    def _give_up(self, instance: int) -> None:
        if (group := self._groups.pop(instance, None)) is not None:
            self._ray.util.remove_placement_group(group)

    def _without_avoided(self, nodes: Sequence[Node]) -> list[Node]:
        now = time.monotonic()
        return [node for node in nodes if self._avoided_until_s.get(node.id, 0.0) < now]


class _RaySpot:
    is_child = False

    def __init__(
        self, launcher: RayLauncher, cluster: ClusterNet, group: Any, bundle: int, node: Node
    ) -> None:
        self.address = node.address
        self.num_cpus: int | None = node.num_cpus
        self._launcher = launcher
        self._cluster = cluster
        self._group, self._bundle, self._node = group, bundle, node

    async def start(self, launch: Launch, codec: WorkerCodec) -> Running:
        try:
            link, pid, agent, launch = await asyncio.to_thread(self._start, launch)
        except ShoalError:
            self._launcher.avoid(self._node)
            raise

        def give_up(is_lost: bool) -> None:
            if is_lost:
                self._launcher.avoid(self._node)
            self._launcher.kill(agent)

        running = RemoteWorker(link, codec, pid, f"{self._node.name} ({self.address})", give_up)
        running.send_frame(codec.encode(launch))
        return running

    def _start(self, launch: Launch) -> tuple[AgentLink, int, Any, Launch]:
        public, secret = (half.decode() for half in zmq.curve_keypair())
        call, name = self._launcher.call, launch.name
        agent = self._launcher.agent(self._group, self._bundle, self._node, name, public)
        agent_public, agent_address = call(agent.introduce.remote())
        if isinstance(launch, LaunchWorker):
            launch = self._with_model(launch, agent)
        keys = MeshKeys(EXECUTOR, secret, {EXECUTOR: public, name: agent_public})
        mesh = Mesh(keys, self._cluster.here)
        try:
            mesh.connect(name, agent_address)
            pid = call(agent.start.remote(mesh.address, launch.num_threads, launch.module))
        except ShoalError:
            mesh.close()
            raise
        return AgentLink(mesh, name), int(pid), agent, launch

    def _with_model(self, launch: LaunchWorker, agent: Any) -> LaunchWorker:
        """Told where the model is on its machine."""
        options = launch.options
        found, complaint = self._launcher.call(
            agent.find_model.remote(options.model_path, self._cluster.model, options.fingerprint),
            _FETCH_S,
        )
        if complaint:
            raise ConfigError(f"{launch.name}: {complaint}")
        return msgspec.structs.replace(launch, options=replace(options, model_path=found))


def choose_nodes(
    ranks: Sequence[RankPlan],
    nodes: Sequence[Node],
    num_workers: Mapping[str, int],
    *,
    only_named: bool = False,
) -> list[Node] | None:
    """A node for each rank: the one it names, else the idlest; None: there is none.

    Args:
        num_workers: by address, that run there.

    Raises:
        ConfigError: with `only_named`: a rank names a node that is not there.
    """
    load = Counter(num_workers)
    chosen = []
    for rank in ranks:
        named = [node for node in nodes if node.is_called(rank.host or "")]
        if only_named and not named:
            there = ", ".join(f"{node.name} ({node.address})" for node in nodes)
            raise ConfigError(
                f"the plan names host {rank.host!r}, but the cluster has {there}; let it join "
                "(shoal join), or name another"
            )
        able = named or [node for node in nodes if node.num_gpus or rank.device == "cpu"]
        if not able:
            return None
        best = min(able, key=lambda node: (load[node.address], node.address))
        load[best.address] += 1
        chosen.append(best)
    return chosen


def node_of(described: Mapping[str, Any]) -> Node:
    """What Ray says of a node."""
    resources = described["Resources"]
    return Node(
        id=described["NodeID"],
        name=described["NodeName"],
        address=described["NodeManagerAddress"],
        num_cpus=int(resources.get("CPU", 1)),
        num_gpus=int(resources.get("GPU", 0)),
    )


def connect(cluster: ClusterNet) -> Any:
    """Ray, as a driver of the cluster.

    Raises:
        ConfigError: it is not installed, or the cluster is not there.
    """
    os.environ.update(ray_environment(Path(cluster.token_file)))
    try:
        import ray
        import ray.util.scheduling_strategies
    except ImportError as error:
        raise ConfigError(
            f"a cluster needs Ray, which cannot be imported ({error}); install it: "
            "pip install 'shoal[ray]'"
        ) from error
    try:
        ray.init(
            address=cluster.address,
            _node_ip_address=cluster.here,
            log_to_driver=False,
            configure_logging=False,
        )
    except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
        raise ConfigError(
            f"the cluster at {cluster.address} cannot be used ({error}); is it up? "
            "`shoal down` and `shoal up` start it afresh"
        ) from error
    return ray


def ray_environment(token_file: Path) -> dict[str, str]:
    """What Ray's processes are told, wherever they are started."""
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_file),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_prestart_worker_first_driver": "0",
        # Agents ask for no GPU of Ray's, and their workers use those that the plan names.
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1",
    }
