"""/v1/completions: prompts as text or token ids in, what follows them out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fastapi import APIRouter, Request
from msgspec import UNSET
from starlette.responses import Response

from shoal.core.errors import InvalidRequestError
from shoal.core.request import SamplingParams
from shoal.server.config import ServerContext
from shoal.server.generation import Update
from shoal.server.logprobs import completion_logprobs, prompt_logprobs, with_prompt
from shoal.server.openai_types import CompletionRequest
from shoal.server.prompts import completion_prompts, given_texts, num_prompts
from shoal.server.respond import (
    Job,
    UsageField,
    check_common,
    check_room,
    request_label,
    respond,
    tenant,
)
from shoal.server.responses import CompletionBody, CompletionChoice, CompletionLogprobs, UsageBody
from shoal.server.sampling import (
    check_token_ids,
    generate_requests,
    output_budget,
    sampling_params,
)
from shoal.text import TextStream

DEFAULT_MAX_TOKENS = 16
"""OpenAI's, and vLLM's."""


def completion_routes(context: ServerContext) -> APIRouter:
    """The endpoint, for one app."""
    routes = APIRouter()

    @routes.post("/v1/completions", response_class=Response)
    async def create_completion(body: CompletionRequest, request: Request) -> Response:
        return await _create(body, request, context)

    return routes


async def _create(body: CompletionRequest, request: Request, context: ServerContext) -> Response:
    info = check_common(body, context, num_prompts(body))
    check_room(request, body.priority, context)
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise InvalidRequestError(
            f"best_of is {body.best_of} and n is {body.n or 1}; shoal returns all it generates: "
            f"leave best_of out",
            code="unsupported_parameter",
            param="best_of",
        )
    prompt_only = body.max_tokens == 0
    if prompt_only and not body.echo:
        raise InvalidRequestError(
            "max_tokens is 0; it must be at least 1, unless echo=true asks for the prompt",
            code="invalid_value",
            param="max_tokens",
        )
    vocab_size = context.tokenizer.vocab_size
    check_token_ids(body.output_token_ids or (), vocab_size, "output_token_ids")
    prompts = await completion_prompts(body, context, info.max_model_len)
    params = sampling_params(
        body,
        model_defaults=context.config.default_sampling,
        vocab_size=vocab_size,
        max_tokens=output_budget(
            1 if prompt_only else body.max_tokens,
            DEFAULT_MAX_TOKENS,
            prompt_len=max(map(len, prompts)),
            max_model_len=info.max_model_len,
            param="prompt",
        ),
        logprobs=body.logprobs,
    )
    if body.echo and body.logprobs is not None:
        params = replace(params, prompt_logprobs=body.logprobs)
    completion_id = f"cmpl-{context.rng.getrandbits(128):032x}"
    job = Job(
        requests=generate_requests(
            body,
            prompts,
            params,
            request_id=completion_id,
            tenant=tenant(request),
            timeout_s=context.config.request_timeout_s,
        ),
        num_per_prompt=params.n,
        label=request_label(request),
        prompt_only=prompt_only,
    )
    return respond(
        body, job, CompletionShape(body, completion_id, prompts, params, context), context
    )


@dataclass(frozen=True, slots=True)
class _Echo:
    """A prompt as text, and where each of its tokens begins in it."""

    text: str = ""
    offsets: tuple[int, ...] = ()


class CompletionShape:
    """text_completion: chunks and whole bodies look the same."""

    def __init__(
        self,
        body: CompletionRequest,
        completion_id: str,
        prompts: Sequence[tuple[int, ...]],
        params: SamplingParams,
        context: ServerContext,
    ) -> None:
        self._body = body
        self._id = completion_id
        self._prompts = prompts
        self._n = params.n
        self._tokenizer = context.tokenizer
        self._model = body.model or context.config.served_model_names[0]
        self._created = int(context.wall_clock())
        self._begun: set[int] = set()
        self._echoes = [
            self._echo(prompt, text, params)
            for prompt, text in zip(prompts, given_texts(body), strict=True)
        ]

    def chunk(self, update: Update, usage: UsageField) -> CompletionBody:
        return self._completion([self._choice(update)], usage)

    def usage_chunk(self, usage: UsageBody) -> CompletionBody:
        return self._completion([], usage)

    def body(self, completions: Sequence[Update], usage: UsageBody) -> CompletionBody:
        return self._completion([self._choice(update) for update in completions], usage)

    def _completion(self, choices: list[CompletionChoice], usage: UsageField) -> CompletionBody:
        return CompletionBody(
            id=self._id,
            created=self._created,
            model=self._model,
            choices=choices,
            usage=usage,
        )

    def _choice(self, update: Update) -> CompletionChoice:
        first = update.index not in self._begun
        self._begun.add(update.index)
        prompt = self._prompts[update.index // self._n]
        echo = self._echoes[update.index // self._n]
        with_ids = self._body.return_token_ids
        return CompletionChoice(
            index=update.index,
            text=echo.text + update.text if first else update.text,
            logprobs=self._logprobs(update, prompt, echo, first),
            finish_reason=update.finish,
            stop_reason=update.stop_reason,
            prompt_logprobs=UNSET
            if self._body.prompt_logprobs is None
            else prompt_logprobs(update.prompt_logprobs, self._tokenizer),
            prompt_token_ids=prompt if with_ids and first else UNSET,
            token_ids=update.token_ids if self._body.shows_token_ids else UNSET,
        )

    def _logprobs(
        self, update: Update, prompt: tuple[int, ...], echo: _Echo, first: bool
    ) -> CompletionLogprobs | None:
        if self._body.logprobs is None:
            return None
        offsets = [len(echo.text) + offset for offset in update.offsets]
        output = completion_logprobs(update.logprobs, offsets, self._tokenizer)
        if not (self._body.echo and first):
            return output
        found = completion_logprobs(update.prompt_logprobs, echo.offsets, self._tokenizer)
        return with_prompt(prompt[0], found, output, self._tokenizer)

    def _echo(self, prompt: tuple[int, ...], text: str | None, params: SamplingParams) -> _Echo:
        if not self._body.echo:
            return _Echo()
        # Stop strings are for the output.
        stream = TextStream(self._tokenizer, replace(params, stop=()), ())
        delta = stream.push(prompt)
        decoded = delta.text + stream.finish().text
        return _Echo(decoded if text is None else text, delta.offsets)
