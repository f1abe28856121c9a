"""/v1/chat/completions: messages in, the assistant's answer out."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import APIRouter, Request
from msgspec import UNSET, UnsetType
from starlette.responses import Response

from shoal.core.errors import InvalidRequestError
from shoal.server.config import ServerContext
from shoal.server.generation import Update
from shoal.server.logprobs import chat_logprobs, prompt_logprobs
from shoal.server.openai_types import ChatRequest
from shoal.server.prompts import chat_prompt
from shoal.server.respond import (
    Job,
    UsageField,
    check_common,
    check_room,
    request_label,
    respond,
    tenant,
)
from shoal.server.responses import (
    ChatBody,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatDelta,
    ChatLogprobs,
    ChatMessageBody,
    UsageBody,
)
from shoal.server.sampling import (
    check_token_ids,
    generate_requests,
    output_budget,
    sampling_params,
)


def chat_routes(context: ServerContext) -> APIRouter:
    """The endpoint, for one app."""
    routes = APIRouter()

    @routes.post("/v1/chat/completions", response_class=Response)
    async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
        return await _create(body, request, context)

    return routes


async def _create(body: ChatRequest, request: Request, context: ServerContext) -> Response:
    info = check_common(body, context, num_prompts=1)
    check_room(request, body.priority, context)
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequestError(
            "top_logprobs needs logprobs=true", code="invalid_value", param="top_logprobs"
        )
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise InvalidRequestError(
            "max_tokens and max_completion_tokens mean the same; send one of them",
            code="invalid_value",
            param="max_tokens",
        )
    vocab_size = context.tokenizer.vocab_size
    check_token_ids(body.output_token_ids or (), vocab_size, "output_token_ids")
    prompt = await chat_prompt(body, body.messages, context, info.max_model_len)
    params = sampling_params(
        body,
        model_defaults=context.config.default_sampling,
        vocab_size=vocab_size,
        max_tokens=output_budget(
            body.max_completion_tokens or body.max_tokens,
            default=None,
            prompt_len=len(prompt),
            max_model_len=info.max_model_len,
            param="messages",
            limit_param="max_tokens" if body.max_tokens else "max_completion_tokens",
        ),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    completion_id = f"chatcmpl-{context.rng.getrandbits(128):032x}"
    job = Job(
        requests=generate_requests(
            body,
            [prompt],
            params,
            request_id=completion_id,
            tenant=tenant(request),
            timeout_s=context.config.request_timeout_s,
        ),
        num_per_prompt=params.n,
        label=request_label(request),
    )
    return respond(body, job, ChatShape(body, completion_id, prompt, context), context)


class ChatShape:
    """chat.completion and chat.completion.chunk."""

    def __init__(
        self, body: ChatRequest, completion_id: str, prompt: tuple[int, ...], context: ServerContext
    ) -> None:
        self._body = body
        self._id = completion_id
        self._prompt = prompt
        self._tokenizer = context.tokenizer
        self._model = body.model or context.config.served_model_names[0]
        self._created = int(context.wall_clock())
        self._begun: set[int] = set()

    def chunk(self, update: Update, usage: UsageField) -> ChatChunk:
        first_ever = not self._begun
        first = update.index not in self._begun
        self._begun.add(update.index)
        with_ids = self._body.return_token_ids
        choice = ChatChunkChoice(
            index=update.index,
            delta=ChatDelta("assistant" if first else UNSET, update.text),
            logprobs=self._logprobs(update),
            finish_reason=update.finish,
            stop_reason=UNSET if update.finish is None else update.stop_reason,
            token_ids=update.token_ids if self._body.shows_token_ids else UNSET,
        )
        prompt = self._prompt if with_ids and first_ever else UNSET
        return self._chunk([choice], usage, prompt)

    def usage_chunk(self, usage: UsageBody) -> ChatChunk:
        return self._chunk([], usage)

    def body(self, completions: Sequence[Update], usage: UsageBody) -> ChatBody:
        with_ids = self._body.return_token_ids
        return ChatBody(
            id=self._id,
            created=self._created,
            model=self._model,
            choices=[
                ChatChoice(
                    index=update.index,
                    message=ChatMessageBody(update.text),
                    logprobs=self._logprobs(update),
                    finish_reason=update.finish,
                    stop_reason=update.stop_reason,
                    token_ids=update.token_ids if self._body.shows_token_ids else UNSET,
                )
                for update in completions
            ],
            usage=usage,
            prompt_logprobs=UNSET
            if self._body.prompt_logprobs is None
            else prompt_logprobs(completions[0].prompt_logprobs, self._tokenizer),
            prompt_token_ids=self._prompt if with_ids else UNSET,
        )

    def _chunk(
        self,
        choices: list[ChatChunkChoice],
        usage: UsageField,
        prompt: tuple[int, ...] | UnsetType = UNSET,
    ) -> ChatChunk:
        return ChatChunk(
            id=self._id,
            created=self._created,
            model=self._model,
            choices=choices,
            usage=usage,
            prompt_token_ids=prompt,
        )

    def _logprobs(self, update: Update) -> ChatLogprobs | None:
        return chat_logprobs(update.logprobs, self._tokenizer) if self._body.logprobs else None
