"""`create_app`, `create_proxy_app`: one HTTP app over one router. Two can live side by side."""

from __future__ import annotations

import random
from collections.abc import Callable

from fastapi import APIRouter, FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send

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
from shoal.server.proxy import PROMPTS, ProxyEndpoints
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

    app = _assembled(context, health_routes(context, why_not))
    app.on_the_way = _surrounded(ProxyEndpoints(context), context)
    return app


def _assembled(context: EdgeContext, *routes: APIRouter) -> _App:
    """With what every app has: its router's metrics begin to be watched."""
    metrics = context.metrics
    metrics.watch_replicas(context.router.stats)
    metrics.watch_router(context.router.replicas)
    metrics.watch_hedges(lambda: context.router.hedges)
    metrics.watch_entrance(lambda: context.router.entrance)
    app = _App(title="shoal", redirect_slashes=False)
    install_error_handlers(app)
    for each in (*routes, model_routes(context), replica_routes(context)):
        app.include_router(each)
    app.add_middleware(_surrounded, context=context)
    return app


def _surrounded(app: ASGIApp, context: EdgeContext) -> ASGIApp:
    """By what every request goes through, from the last to the first."""
    limited = BodyLimit(app, max_bytes=context.config.max_body_bytes)
    guarded = BearerAuth(limited, api_keys=context.config.api_keys)
    return Envelope(guarded, rng=context.rng, metrics=context.metrics)


class _App(FastAPI):
    """Keeps the server's own `send`: Starlette wraps it before any middleware of ours sees it.

    Attributes:
        on_the_way: answers what is proxied, before FastAPI's own layers, of which there are five.
    """

    on_the_way: ASGIApp | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope.setdefault("state", {})[SEND_BODY] = send
        if self.on_the_way is not None and _is_for_upstreams(scope):
            await self.on_the_way(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)


def _is_for_upstreams(scope: Scope) -> bool:
    return scope.get("path") in PROMPTS and scope.get("method") == "POST"
