"""`shoal route`: the router alone, before servers that speak OpenAI's API."""

from __future__ import annotations

import contextlib

import typer

from shoal.cli import options, router_options
from shoal.core.errors import ConfigError

MAX_WAITING = 2048
"""More than of an engine: what waits are only bodies, and upstreams have queues of their own."""


def route(
    upstream: router_options.Upstream = None,
    upstream_key: router_options.UpstreamKey = None,
    model_name: router_options.ModelName = None,
    host: options.Host = "127.0.0.1",
    port: options.Port = 8000,
    api_key: options.ApiKey = None,
    router_policy: router_options.RouterPolicy = "predicted",
    hedging: router_options.Hedging = True,
    slo: router_options.RouterSlo = None,
    max_waiting: options.MaxWaiting = None,
    drain_timeout: options.DrainTimeout = 30.0,
    request_timeout: options.RequestTimeout = None,
    config: options.Config = None,
) -> None:
    """Route requests to servers that run elsewhere: vLLM, SGLang, llama.cpp, shoal."""
    del config
    from shoal.cli.http_server import bind
    from shoal.cli.routing import RouteSettings, run
    from shoal.cli.upstreams import read_names, read_upstreams
    from shoal.core.latency import Slo
    from shoal.policy.routing import policy_named

    if not upstream:
        raise ConfigError("there is no --upstream; name at least one, as http://HOST:PORT")
    policy_named(router_policy)
    api_keys = tuple(api_key or ())
    settings = RouteSettings(
        upstreams=tuple(read_upstreams(upstream, upstream_key or ())),
        names=tuple(read_names(model_name or ())),
        host=host,
        api_keys=api_keys,
        policy=router_policy,
        hedging=hedging,
        slo=Slo.parse(slo) if slo else None,
        max_waiting=max_waiting or MAX_WAITING,
        drain_timeout_s=drain_timeout,
        request_timeout_s=request_timeout,
    )
    with contextlib.closing(bind(host, port, api_keys)) as sock:
        raise typer.Exit(run(settings, sock))
