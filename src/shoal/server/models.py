"""/v1/models and /version: what is served."""

from __future__ import annotations

from importlib.metadata import version

import msgspec
from fastapi import APIRouter
from starlette.responses import Response

from shoal.server.config import ServerContext
from shoal.server.respond import check_model
from shoal.server.responses import ModelCard, ModelList


def model_routes(context: ServerContext) -> APIRouter:
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


def _json(body: object) -> Response:
    return Response(msgspec.json.encode(body), media_type="application/json")
