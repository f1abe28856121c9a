"""What `shoal route` runs: a router, its upstreams and an HTTP server, until told to stop."""

from __future__ import annotations

import asyncio
import logging
import random
import socket
import sys
import time
from dataclasses import dataclass

import uvloop

from shoal.cli.http_server import Stopping, http_server, url_of
from shoal.cli.upstreams import Upstream
from shoal.core.clock import MonotonicClock
from shoal.core.latency import Slo
from shoal.observe import ServingMetrics
from shoal.router.driver import Router
from shoal.router.records import RouterConfig
from shoal.router.state import RouterState
from shoal.router.upstream.client import UpstreamClient
from shoal.router.upstream.door import Door
from shoal.server import EdgeContext, ServerConfig, create_proxy_app

_HOMELESS_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteSettings:
    """What `shoal route` was told.

    Attributes:
        names: of the model: public, and what upstreams may call it; none: as they do.
    """

    upstreams: tuple[Upstream, ...]
    names: tuple[tuple[str, str], ...] = ()
    host: str = "127.0.0.1"
    api_keys: tuple[str, ...] = ()
    policy: str = "predicted"
    hedging: bool = True
    slo: Slo | None = None
    max_waiting: int = 2048
    drain_timeout_s: float = 30.0
    request_timeout_s: float | None = None


def run(settings: RouteSettings, sock: socket.socket) -> int:
    """Route until a signal; the exit status."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_route(settings, sock))


async def _route(settings: RouteSettings, sock: socket.socket) -> int:
    door, clock, rng = Door(settings.names), MonotonicClock(), random.SystemRandom()
    clients = [UpstreamClient(each.address, door) for each in settings.upstreams]
    config = RouterConfig(
        replicas=tuple(client.name for client in clients),
        homeless_timeout_s=_HOMELESS_S,
        policy=settings.policy,
        speeds={each.address.name: each.speed for each in settings.upstreams if each.speed},
        slo=settings.slo,
        hedging=settings.hedging,
        max_waiting=settings.max_waiting,
        # What stands for a prompt's tokens is not all that an answer depends on.
        collapse=False,
    )
    state = RouterState(config, random.Random(rng.getrandbits(63)))
    async with Router(state, list(clients), clock) as router:
        stopping = Stopping(router, settings.drain_timeout_s, lambda: None)
        await _until_named(door, stopping)
        if stopping.begun:
            return 0
        context = EdgeContext(
            config=ServerConfig(
                served_model_names=door.names,
                api_keys=settings.api_keys,
                request_timeout_s=settings.request_timeout_s,
            ),
            router=router,
            metrics=ServingMetrics(),
            clock=clock,
            rng=rng,
            wall_clock=time.time,
        )
        server = stopping.server = http_server(create_proxy_app(context))
        url = url_of(settings.host, sock.getsockname()[1])
        print(
            f"ready      {door.names[0]} at {url}/v1, from {len(clients)} upstreams",
            file=sys.stderr,
            flush=True,
        )
        await server.serve(sockets=[sock])
    return 0


async def _until_named(door: Door, stopping: Stopping) -> None:
    """Until it is known what to call the model, or we are told to stop."""
    naming = asyncio.create_task(door.named())
    while not naming.done() and not stopping.begun:
        await asyncio.wait({naming}, timeout=0.1)
    naming.cancel()
