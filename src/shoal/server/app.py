"""`create_app`: one HTTP app over one router. Two of them can live side by side."""

from __future__ import annotations

import random
from collections.abc import Callable

from fastapi import FastAPI
from starlette.types import Receive, Scope, Send

from shoal.core.clock import Clock
from shoal.observe import ServingMetrics
from shoal.server.auth import BearerAuth
from shoal.server.chat import chat_routes
from shoal.server.completions import completion_routes
from shoal.server.config import Router, ServerConfig, ServerContext
from shoal.server.errors import install_error_handlers
from shoal.server.health import health_routes
from shoal.server.limits import BodyLimit
from shoal.server.middleware import Envelope
from shoal.server.models import model_routes
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
    metrics.watch_replicas(router.stats)
    app = _App(title="shoal", redirect_slashes=False)
    install_error_handlers(app)
    for make_routes in (
        chat_routes,
        completion_routes,
        tokenize_routes,
        model_routes,
        health_routes,
        replica_routes,
    ):
        app.include_router(make_routes(context))
    # The last one added is the outermost.
    app.add_middleware(BodyLimit, max_bytes=config.max_body_bytes)
    app.add_middleware(BearerAuth, api_keys=config.api_keys)
    app.add_middleware(Envelope, rng=rng, metrics=metrics)
    return app


class _App(FastAPI):
    """Keeps the server's own `send`: Starlette wraps it before any middleware of ours sees it."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope.setdefault("state", {})[SEND_BODY] = send
        await super().__call__(scope, receive, send)
