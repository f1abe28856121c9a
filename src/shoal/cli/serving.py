"""What `shoal serve` runs: engine processes, a router and an HTTP server, until told to stop.

The engines are started before anything else is imported here, so that their loading runs
beside ours. This process holds no torch.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import random
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import uvloop

from shoal.cli.expected_speeds import expected_speeds
from shoal.cli.http_server import Stopping, http_server, url_of
from shoal.cli.up import cluster_folder
from shoal.cluster.folder import Record
from shoal.cluster.raylet import is_alive
from shoal.core.clock import MonotonicClock
from shoal.core.errors import ConfigError
from shoal.core.latency import Slo
from shoal.core.options import EngineOptions
from shoal.core.plan import ReplicaPlan
from shoal.core.record import Recorder
from shoal.lab.folder import state_of_environment
from shoal.model.spec import read_spec
from shoal.plan_file import Parallelism, device_share, plan_table
from shoal.router.driver import Router
from shoal.router.engine_client import EngineClient
from shoal.router.records import RouterConfig
from shoal.router.state import RouterState
from shoal.router.watchdog import WatchdogLimits
from shoal.wire.kv_messages import make_kv_keys
from shoal.wire.messages import ClusterNet, HostNet, Loading

log = logging.getLogger(__name__)

_READY_POLL_S = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeSettings:
    """What `shoal serve` was told.

    Attributes:
        replicas: an engine for each; None: on the one device that `engine` names.
        hosts: of a lab, that ranks of the replicas name.
        drain_timeout_s: after SIGTERM, how long running requests may take.
        watchdog: how long an engine may be quiet before it is ended and started again.
        record: a folder for recordings of what router and engines decide.
        router_policy, hedging, collapse, slo: of the router.
        cluster: a file that knows its devices.
    """

    engine: EngineOptions
    served_model_names: tuple[str, ...]
    host: str = "127.0.0.1"
    api_keys: tuple[str, ...] = ()
    replicas: tuple[ReplicaPlan | None, ...] = (None,)
    hosts: Mapping[str, HostNet] = field(default_factory=dict)
    drain_timeout_s: float = 30.0
    request_timeout_s: float | None = None
    chat_template: str | None = None
    watchdog: WatchdogLimits = field(default_factory=WatchdogLimits)
    record: Path | None = None
    router_policy: str = "predicted"
    hedging: bool = True
    collapse: bool = True
    slo: Slo | None = None
    cluster: Path | None = None


def plan_replicas(parallelism: Parallelism, path: Path) -> tuple[ReplicaPlan | None, ...]:
    """What each engine runs; said in a table, unless each runs on one device.

    Raises:
        ConfigError: a plan that fits neither the model nor this machine.
    """
    if parallelism.is_plain:
        return (None,) * parallelism.data_parallel_size
    replicas = parallelism.replicas(read_spec(path))
    for line in plan_table(replicas):
        print(line, file=sys.stderr)
    return replicas


def plan_hosts(replicas: tuple[ReplicaPlan | None, ...], model: str) -> dict[str, HostNet]:
    """Hosts that ranks name: of the cluster that is up here, or of the lab that this runs in.

    Args:
        model: as the user called it, for nodes that must find it themselves.

    Raises:
        ConfigError: ranks name hosts, and there is neither.
    """
    named = {
        rank.host
        for replica in replicas
        for instance in (replica.instances if replica is not None else ())
        for rank in instance.ranks
        if rank.host is not None
    }
    cluster = cluster_here()
    if not named or cluster is None:
        return lab_hosts(replicas)
    if not cluster.is_head:
        raise ConfigError(
            f"this machine only joined the cluster; serve from its head ({cluster.head})"
        )
    token = str(cluster_folder().token)
    net = ClusterNet(cluster.head, token, cluster.address, model)
    return {host: HostNet((), "", net) for host in named}


def cluster_here() -> Record | None:
    """The cluster that `shoal up` or `shoal join` started here; None: none, or this is a lab."""
    if state_of_environment(os.environ) is not None:
        return None
    record = cluster_folder().read_record()
    return record if record is not None and is_alive(record) else None


def lab_hosts(replicas: tuple[ReplicaPlan | None, ...]) -> dict[str, HostNet]:
    """Hosts of the lab that this process runs in.

    Raises:
        ConfigError: ranks name hosts, and there is no lab that has them.
    """
    lab = state_of_environment(os.environ)
    hosts = lab.hosts if lab is not None else {}
    for replica in replicas:
        for instance in replica.instances if replica is not None else ():
            for rank in instance.ranks:
                if rank.host is not None and rank.host not in hosts:
                    raise ConfigError(
                        f"the plan names host {rank.host!r}, and neither a lab nor a cluster is up "
                        "here; start one with `shoal lab up` or `shoal up`, or remove the host"
                    )
    return {name: HostNet(host.command, host.address) for name, host in hosts.items()}


def start_engines(settings: ServeSettings) -> list[EngineClient]:
    """Engine processes; they load by themselves."""
    count = len(settings.replicas)
    command = [sys.executable, "-m", "shoal.cli.engine_process"]
    options = _shared_out(settings)
    replicas = {f"replica-{index}": plan for index, plan in enumerate(settings.replicas)}
    has_routes = any(plan is not None and len(plan.routes) > 1 for plan in settings.replicas)
    kv_keys = make_kv_keys(replicas) if count > 1 or has_routes else {}
    return [
        EngineClient(
            name,
            command,
            options,
            _Announcer(name, count),
            settings.watchdog,
            replica,
            settings.hosts,
            kv_keys.get(name),
            None if settings.record is None else str(settings.record.absolute()),
        )
        for name, replica in replicas.items()
    ]


def _shared_out(settings: ServeSettings) -> EngineOptions:
    """The options of each engine, where several share cores and memory."""
    options, count = settings.engine, len(settings.replicas)
    planned = [replica for replica in settings.replicas if replica is not None]
    if planned:
        return replace(options, device_share=device_share(planned))
    if count == 1:
        return options
    threads = options.num_threads or max((os.cpu_count() or 1) // count, 1)
    return replace(options, num_threads=threads, device_share=1.0 / count)


def run(settings: ServeSettings, sock: socket.socket, clients: list[EngineClient]) -> int:
    """Serve until a signal; the exit status."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_serve(settings, sock, clients))


async def _serve(settings: ServeSettings, sock: socket.socket, clients: list[EngineClient]) -> int:
    clock, seed = MonotonicClock(), random.SystemRandom().getrandbits(63)
    names = tuple(client.name for client in clients)
    roles = {name: plan.role for name, plan in zip(names, settings.replicas, strict=True) if plan}
    config = RouterConfig(
        replicas=names,
        max_waiting=settings.engine.max_waiting * len(names),
        roles=roles,
        moves_kv=len(names) > 1,
        policy=settings.router_policy,
        speeds=expected_speeds(settings.replicas, settings.engine, settings.cluster),
        slo=settings.slo,
        hedging=settings.hedging,
        collapse=settings.collapse,
    )
    recorder = None
    if settings.record is not None:
        recorder = Recorder(settings.record, "router", what="router", config=config, seed=seed)
    state = RouterState(config, random.Random(seed))
    async with Router(state, list(clients), clock, recorder) as router:
        stopping = Stopping(router, settings.drain_timeout_s, lambda: _kill(clients))
        server = http_server(_make_app(settings, router))
        stopping.server = server
        serving = asyncio.create_task(server.serve(sockets=[sock]))
        launched = await _launched(router, clients, serving)
        if launched:
            _say_ready(settings, router, sock.getsockname()[1])
        elif not stopping.begun:
            for client in clients:
                print(f"error: {client.failure}", file=sys.stderr)
            server.should_exit = True
        await serving
        return 0 if launched or stopping.begun else 1


def _make_app(settings: ServeSettings, router: Router) -> Any:
    from shoal.model.generation_config import read_default_sampling
    from shoal.observe import ServingMetrics
    from shoal.server import ServerConfig, create_app
    from shoal.text import load_tokenizer

    path = Path(settings.engine.model_path)
    tokenizer = load_tokenizer(path, chat_template=settings.chat_template)
    config = ServerConfig(
        served_model_names=settings.served_model_names,
        api_keys=settings.api_keys,
        request_timeout_s=settings.request_timeout_s,
        default_sampling=read_default_sampling(path),
        continuation=_continuation(settings),
    )
    return create_app(
        config=config,
        router=router,
        tokenizer=tokenizer,
        metrics=ServingMetrics(),
        clock=MonotonicClock(),
        rng=random.SystemRandom(),
        wall_clock=time.time,
    )


def _kill(clients: list[EngineClient]) -> None:
    for client in clients:
        client.kill()


def _continuation(settings: ServeSettings) -> str:
    """Of the checkpoint, and of what turns messages into its tokens."""
    if not settings.engine.fingerprint:
        return ""
    parts = f"{settings.engine.fingerprint}\0{settings.chat_template or ''}"
    return hashlib.sha256(parts.encode()).hexdigest()[:32]


async def _launched(
    router: Router, clients: list[EngineClient], serving: asyncio.Task[None]
) -> bool:
    """Wait until a replica can serve; False if none ever will, or the server has stopped."""
    while router.info is None:
        if serving.done() or all(client.failure is not None for client in clients):
            return False
        await asyncio.sleep(_READY_POLL_S)
    return True


def _say_ready(settings: ServeSettings, router: Router, port: int) -> None:
    info = router.info
    assert info is not None
    url = url_of(settings.host, port)
    print(
        f"ready      {info.load_s:.1f} s; {settings.served_model_names[0]} at {url}/v1 "
        f"(try: curl {url}/v1/models)",
        file=sys.stderr,
        flush=True,
    )


class _Announcer:
    """Prints what an engine says while it loads."""

    def __init__(self, name: str, count: int) -> None:
        self._prefix = f"{name}: " if count > 1 else ""
        self._bar_shown = False

    def __call__(self, news: Loading) -> None:
        if news.line:
            self._clear_bar()
            print(f"{self._prefix}{news.line}", file=sys.stderr, flush=True)
        elif sys.stderr.isatty() and news.total_bytes:
            share = news.done_bytes / news.total_bytes
            bar = "█" * int(share * 30)
            print(f"\rweights    {bar:<30} {share:4.0%}", end="", file=sys.stderr, flush=True)
            self._bar_shown = True

    def _clear_bar(self) -> None:
        if self._bar_shown:
            print("\r\033[K", end="", file=sys.stderr)
            self._bar_shown = False
