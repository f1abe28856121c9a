"""`create_app`, `create_proxy_app`: one HTTP app over one router. Two can live side by side."""

from __future__ import annotations

import random
from collections.abc import Callable

from fastapi import APIRouter, FastAPI
from starlette.types import Receive, Scope, Send

from shoal.core.clock import Clock
from shoal.observe import ServingMetrics
from shoal.server.auth import BearerAuth
from shoal.server.chat import chat_routes
from shoal.server.completions import completion_routes
from shoal.server.config import EdgeContext, Router, ServerConfig, ServerContext
from shoal.server.errors import install_error_handlers
from shoal.server.health import Readiness, health_routes
from shoal.server.limits import BodyLimit
from shoal.server.middleware import Envelope
from shoal.server.models import model_routes
from shoal.server.proxy import ProxyEndpoints
from shoal.server.replicas import replica_routes
from shoal.server.sse import SEND_BODY
from shoal.server.tokenize import tokenize_routes
from shoal.text import Tokenizer


def create_app(
    *,
    config: ServerConfig,
    router: Router,
    tokenizer: Tokenizer,
    metrics: ServingMetrics,
    clock: Clock,
    rng: random.Random,
    wall_clock: Callable[[], float],
) -> FastAPI:
    """The ASGI app.

    Args:
        metrics: this app's own; it starts to watch the router's replicas.
        clock: the one the router reads too.
        rng: draws ids.
        wall_clock: seconds since 1970.
    """
    context = ServerContext(
        config=config,
        router=router,
        tokenizer=tokenizer,
        metrics=metrics,
        clock=clock,
        rng=rng,
        wall_clock=wall_clock,
    )
    return _assembled(
        context,
        chat_routes(context),
        completion_routes(context),
        tokenize_routes(context),
        health_routes(context, Readiness(context).why_not),
    )


def create_proxy_app(context: EdgeContext) -> FastAPI:
    """The ASGI app of a router whose replicas are upstreams."""

    async def why_not() -> str | None:
        # What is in service has lately generated something: its client sees to it.
        return None if context.router.ready else "no upstream is in service"

    return _assembled(context, health_routes(context, why_not), proxies=True)


def _assembled(context: EdgeContext, *routes: APIRouter, proxies: bool = False) -> FastAPI:
    """With what every app has: its router's metrics begin to be watched."""
    config, metrics = context.config, context.metrics
    metrics.watch_replicas(context.router.stats)
    metrics.watch_router(context.router.replicas)
    metrics.watch_hedges(lambda: context.router.hedges)
    metrics.watch_entrance(lambda: context.router.entrance)
    app = _App(title="shoal", redirect_slashes=False)
    install_error_handlers(app)
    for each in (*routes, model_routes(context), replica_routes(context)):
        app.include_router(each)
    # The last one added is the outermost.
    if proxies:
        app.add_middleware(ProxyEndpoints, context=context)
    app.add_middleware(BodyLimit, max_bytes=config.max_body_bytes)
    app.add_middleware(BearerAuth, api_keys=config.api_keys)
    app.add_middleware(Envelope, rng=context.rng, metrics=metrics)
    return app


class _App(FastAPI):
    """Keeps the server's own `send`: Starlette wraps it before any middleware of ours sees it."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope.setdefault("state", {})[SEND_BODY] = send
        await super().__call__(scope, receive, send)
