"""/tokenize and /detokenize, in vLLM's shapes."""

from __future__ import annotations

import msgspec
from fastapi import APIRouter
from starlette.responses import Response

from shoal.core.errors import InvalidRequestError
from shoal.server.config import ServerContext
from shoal.server.openai_types import DetokenizeRequest, TokenizeRequest
from shoal.server.prompts import chat_prompt, encode
from shoal.server.respond import check_model
from shoal.server.responses import DetokenizeBody, TokenizeBody
from shoal.server.sampling import check_token_ids


def tokenize_routes(context: ServerContext) -> APIRouter:
    """The endpoints, for one app."""
    routes = APIRouter()

    @routes.post("/tokenize", response_class=Response)
    async def tokenize(body: TokenizeRequest) -> Response:
        check_model(body.model, context)
        ids = await _ids(body, context)
        info = context.router.info
        answer = TokenizeBody(
            count=len(ids),
            max_model_len=None if info is None else info.max_model_len,
            tokens=ids,
            token_strs=list(map(context.tokenizer.token_text, ids))
            if body.return_token_strs
            else None,
        )
        return Response(msgspec.json.encode(answer), media_type="application/json")

    @routes.post("/detokenize", response_class=Response)
    async def detokenize(body: DetokenizeRequest) -> Response:
        check_model(body.model, context)
        check_token_ids(body.tokens, context.tokenizer.vocab_size, "tokens")
        answer = DetokenizeBody(context.tokenizer.decode(body.tokens, skip_special_tokens=False))
        return Response(msgspec.json.encode(answer), media_type="application/json")

    return routes


async def _ids(body: TokenizeRequest, context: ServerContext) -> tuple[int, ...]:
    if body.messages is not None and body.prompt is None:
        return await chat_prompt(body, body.messages, context, limit=None)
    if body.prompt is not None and body.messages is None:
        special = body.add_special_tokens is not False
        return await encode(body.prompt, context, add_special_tokens=special)
    raise InvalidRequestError(
        "Send either prompt or messages", code="missing_field", param="prompt"
    )
