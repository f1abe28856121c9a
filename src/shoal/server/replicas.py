"""/admin/replicas: how each replica stands, what its Steps take, and taking one out of
service while requests run.

    GET  /admin/replicas
    GET  /admin/replicas/NAME/steps      what its latest Steps held, and took (shoal probe --from)
    POST /admin/replicas/NAME/drain      its requests move to others, with their KV
    POST /admin/replicas/NAME/resume
    POST /admin/replicas/NAME/instances/N/drain, resume
                                         the same of an instance that has a stand-in

Only for who holds an API key: without one a page in a browser could post here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Literal

import msgspec
from fastapi import APIRouter
from starlette.responses import Response

from shoal.core.request import ErrorInfo
from shoal.core.stats import EngineStats, InstanceStats, ReplicaView
from shoal.server.config import EdgeContext
from shoal.server.errors import error_response

_NO_KEY = ErrorInfo(
    status=403,
    code="no_api_key",
    message="/admin needs a server with an API key; set SHOAL_API_KEY (or --api-key).",
)


def replica_routes(context: EdgeContext) -> APIRouter:
    """The endpoints, for one app."""
    routes = APIRouter()
    router = context.router

    def refusal(name: str) -> Response | None:
        if not context.config.api_keys:
            return error_response(_NO_KEY)
        if name not in router.replicas():
            names = ", ".join(router.replicas())
            message = f"There is no replica {name[:64]!r}; there are {names}."
            return error_response(ErrorInfo(status=404, code="no_such_replica", message=message))
        return None

    @routes.get("/admin/replicas", response_class=Response)
    async def show_replicas() -> Response:
        return error_response(_NO_KEY) if not context.config.api_keys else _shown(context)

    @routes.get("/admin/replicas/{name}/steps", response_class=Response)
    async def steps(name: str) -> Response:
        if (refused := refusal(name)) is not None:
            return refused
        body = msgspec.json.encode(router.steps(name))
        return Response(body, media_type="application/json")

    @routes.post("/admin/replicas/{name}/drain", response_class=Response)
    async def drain(name: str) -> Response:
        if (refused := refusal(name)) is not None:
            return refused
        others = (each for other, each in router.replicas().items() if other != name)
        if not any(each.is_alive and not each.is_drained for each in others):
            message = f"No other replica takes requests; start or resume one before {name} drains."
            return error_response(ErrorInfo(status=409, code="last_replica", message=message))
        router.drain_replica(name)
        return _shown(context)

    @routes.post("/admin/replicas/{name}/resume", response_class=Response)
    async def resume(name: str) -> Response:
        if (refused := refusal(name)) is not None:
            return refused
        router.resume_replica(name)
        return _shown(context)

    @routes.post("/admin/replicas/{name}/instances/{instance}/{what}", response_class=Response)
    async def of_instance(name: str, instance: int, what: Literal["drain", "resume"]) -> Response:
        if (refused := refusal(name)) is not None:
            return refused
        known = {each.instance: each for each in router.stats()[name].instances}
        if instance not in known:
            message = f"{name} has no instance {instance} that another one could stand in for."
            return error_response(ErrorInfo(status=404, code="no_such_instance", message=message))
        if what == "drain" and not _has_stand_in(known[instance], known.values()):
            message = f"No other instance of its stage runs; start or resume one before {instance}."
            return error_response(ErrorInfo(status=409, code="last_instance", message=message))
        router.drain_instance(name, instance, is_drained=what == "drain")
        return _shown(context)

    return routes


def _has_stand_in(instance: InstanceStats, others: Iterable[InstanceStats]) -> bool:
    return any(
        each.stage == instance.stage and not each.is_down and not each.is_drained
        for each in others
        if each is not instance
    )


def _instances(stats: EngineStats) -> dict[str, object]:
    """Of a replica with several routes, as it last said."""
    found = {
        str(each.instance): {
            "stage": each.stage,
            "alive": not each.is_down,
            "drained": each.is_drained,
            "requests": each.num_running,
        }
        for each in stats.instances
    }
    return {"instances": found} if found else {}


def _prospect(replica: ReplicaView) -> dict[str, object]:
    """What the router expects of it."""
    if (prospect := replica.prospect) is None:
        return {}
    return {
        "slowness": {"prompts": prospect.prompts, "decoding": prospect.decoding},
        "share": prospect.share,
        "predicted_ttft_s": prospect.ttft_s,
    }


def _lag(replica: ReplicaView, stats: EngineStats) -> dict[str, object]:
    """Of one that has been slow for long, and which of its instances are."""
    if (lag := replica.lag) is None:
        return {}
    slow = {str(instance): times for instance, times in stats.slow}
    return {"replan_needed": {**asdict(lag), "slow_instances": slow}}


def _shown(context: EdgeContext) -> Response:
    stats = context.router.stats()
    found = {
        name: {
            "alive": each.is_alive,
            "drained": each.is_drained,
            "requests": each.num_requests,
            "sent": each.num_sent,
            **_prospect(each),
            **_lag(each, stats[name]),
            **_instances(stats[name]),
        }
        for name, each in context.router.replicas().items()
    }
    return Response(msgspec.json.encode({"replicas": found}), media_type="application/json")
