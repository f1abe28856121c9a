"""/v1/models and /version: what is served."""

from __future__ import annotations

from importlib.metadata import version

import msgspec
from fastapi import APIRouter
from msgspec import UNSET, UnsetType
from starlette.responses import Response

from shoal.router.upstream.card import ShoalCard
from shoal.server.config import EdgeContext
from shoal.server.respond import check_model
from shoal.server.responses import ModelCard, ModelList


def model_routes(context: EdgeContext) -> APIRouter:
    """The endpoints, for one app."""
    routes = APIRouter()
    created = int(context.wall_clock())

    def card(name: str) -> ModelCard:
        info = context.router.info
        return ModelCard(
            id=name,
            created=created,
            root=context.config.served_model_names[0],
            max_model_len=None if info is None else info.max_model_len,
            shoal=_carries(context),
        )

    @routes.get("/v1/models", response_class=Response)
    async def list_models() -> Response:
        return _json(ModelList([card(name) for name in context.config.served_model_names]))

    # Names may hold slashes, as on the Hugging Face hub.
    @routes.get("/v1/models/{model:path}", response_class=Response)
    async def retrieve_model(model: str) -> Response:
        check_model(model, context)
        return _json(card(model))

    @routes.get("/version", response_class=Response)
    async def tell_version() -> Response:
        return _json({"version": version("shoal")})

    return routes


def _carries(context: EdgeContext) -> ShoalCard | UnsetType:
    """What a `shoal route` before this server wants to know; left out while it is not known."""
    info, continuation = context.router.info, context.config.continuation
    if info is None or not continuation:
        return UNSET
    num_alive = sum(each.is_alive for each in context.router.replicas().values())
    return ShoalCard(
        continuation=continuation,
        max_num_seqs=num_alive * info.max_num_seqs,
        num_kv_blocks=num_alive * info.num_kv_blocks,
    )


def _json(body: object) -> Response:
    return Response(msgspec.json.encode(body), media_type="application/json")
