"""What `shoal serve` runs: engine processes, a router and an HTTP server, until told to stop.

The engines are started before anything else is imported here, so that their loading runs
beside ours. This process holds no torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import logging
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import uvicorn
import uvloop

from shoal.cli.up import cluster_folder
from shoal.cluster.folder import Record
from shoal.cluster.raylet import is_alive
from shoal.core.clock import MonotonicClock
from shoal.core.errors import ConfigError
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
_CONNECTIONS_GRACE_S = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeSettings:
    """What `shoal serve` was told.

    Attributes:
        replicas: an engine for each; None: on the one device that `engine` names.
        hosts: of a lab, that ranks of the replicas name.
        drain_timeout_s: after SIGTERM, how long running requests may take.
        watchdog: how long an engine may be quiet before it is ended and started again.
        record: a folder for recordings of what router and engines decide.
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


def bind(host: str, port: int, api_keys: tuple[str, ...]) -> socket.socket:
    """A listening socket.

    Raises:
        ConfigError: the port is taken, or the address is beyond loopback and there is no key.
    """
    if not api_keys and not _is_loopback(host):
        raise ConfigError(
            f"--host {host} can be reached from other machines, but no API key is set; "
            f"set SHOAL_API_KEY (or --api-key), or use --host 127.0.0.1"
        )
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, proto)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except socket.gaierror as error:
        raise ConfigError(f"--host {host} is not an address of this machine: {error}") from error
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"port {port} on {host} is taken; stop what uses it, or choose another --port"
            ) from error
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}") from error
    sock.listen(2048)
    return sock


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
        max_homeless=settings.engine.max_waiting,
        roles=roles,
        moves_kv=len(names) > 1,
    )
    recorder = None
    if settings.record is not None:
        recorder = Recorder(settings.record, "router", what="router", config=config, seed=seed)
    state = RouterState(config, random.Random(seed))
    async with Router(state, list(clients), clock, recorder) as router:
        stopping = _Stopping(settings, router, clients)
        server = _HttpServer(
            uvicorn.Config(
                _make_app(settings, router),
                log_level="warning",
                access_log=False,
                timeout_graceful_shutdown=_CONNECTIONS_GRACE_S,
                server_header=False,
            )
        )
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
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    url = f"http://{host}:{port}"
    print(
        f"ready      {info.load_s:.1f} s; {settings.served_model_names[0]} at {url}/v1 "
        f"(try: curl {url}/v1/models)",
        file=sys.stderr,
        flush=True,
    )


class _HttpServer(uvicorn.Server):
    """uvicorn without its own signal handlers: stopping is ours to order."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Stopping:
    """First signal: drain, then leave. Second: leave at once."""

    def __init__(
        self,
        settings: ServeSettings,
        router: Router,
        clients: list[EngineClient],
    ) -> None:
        self.server: uvicorn.Server | None = None
        self._settings = settings
        self._router = router
        self._clients = clients
        self._task: asyncio.Task[None] | None = None
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signum, self._on_signal, signum)

    @property
    def begun(self) -> bool:
        return self._task is not None

    def _on_signal(self, signum: signal.Signals) -> None:
        if self._task is None:
            self._task = asyncio.create_task(self._drain())
            return
        for client in self._clients:
            client.kill()
        os._exit(128 + signum)

    async def _drain(self) -> None:
        print(
            f"stopping: no new requests; waiting up to {self._settings.drain_timeout_s:g} s for "
            f"{self._router.num_in_flight} running (signal again to leave at once)",
            file=sys.stderr,
            flush=True,
        )
        await self._router.drain(self._settings.drain_timeout_s)
        if self.server is not None:
            self.server.should_exit = True


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


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
