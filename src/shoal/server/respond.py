"""From `GenerateRequest`s to an HTTP response, streamed or whole, whatever its shape.

Knows nothing of chat or completions: a `Shape` says how their JSON looks.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol

import msgspec
from fastapi import Request
from msgspec import UNSET, UnsetType
from starlette.responses import Response

from shoal.core.errors import InvalidRequestError, NotFoundError, UnavailableError
from shoal.core.request import GenerateRequest
from shoal.core.stats import EngineInfo
from shoal.server.config import EdgeContext, ServerContext
from shoal.server.express import Express
from shoal.server.generation import Update, Usage, updates
from shoal.server.openai_types import GenerationFields
from shoal.server.responses import PromptTokensDetails, UsageBody
from shoal.server.sse import BodyResponse, EventStream

UsageField = UsageBody | None | UnsetType


class Shape(Protocol):
    """How one endpoint's JSON looks; made anew for every request."""

    def chunk(self, update: Update, usage: UsageField) -> msgspec.Struct:
        """One event of a stream."""
        ...

    def usage_chunk(self, usage: UsageBody) -> msgspec.Struct:
        """The event that ends a stream with include_usage."""
        ...

    def body(self, completions: Sequence[Update], usage: UsageBody) -> msgspec.Struct:
        """The whole response; each completion is one update, finished."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What one HTTP request asks the router for.

    Attributes:
        num_per_prompt: n; the requests stand prompt by prompt.
        label: the X-Request-Id, for the log.
        prompt_only: only what there is to say of the prompts is wanted.
    """

    requests: tuple[GenerateRequest, ...]
    num_per_prompt: int
    label: str
    prompt_only: bool = False


def respond(body: GenerationFields, job: Job, shape: Shape, context: ServerContext) -> Response:
    """The response to a request; generation begins when the server sends it."""
    if not body.stream:
        return BodyResponse(lambda: _whole(job, shape, context))
    express = Express() if _is_plain(body, job) else None
    return EventStream(
        _events(body, job, shape, context, express),
        request_id=job.label,
        stall_timeout_s=context.config.stall_timeout_s,
        express=express,
    )


def check_common(body: GenerationFields, context: ServerContext, num_prompts: int) -> EngineInfo:
    """What can be refused before the prompt is looked at; the engine's limits otherwise."""
    check_model(body.model, context)
    num_choices = num_prompts * (1 if body.n is None else body.n)
    if num_choices > context.config.max_choices:
        raise InvalidRequestError(
            f"{num_prompts} prompts x n={body.n or 1} are {num_choices} completions; at most "
            f"{context.config.max_choices} can be asked for at once",
            code="too_many_completions",
            param="n" if num_prompts == 1 else "prompt",
        )
    if body.output_token_ids is not None and num_choices != 1:
        raise InvalidRequestError(
            "output_token_ids continues a single completion; send one prompt and n=1",
            code="invalid_value",
            param="output_token_ids",
        )
    if body.continuation not in (None, context.config.continuation):
        raise InvalidRequestError(
            "continuation is not this server's: the tokens are another model's; send the request "
            "to a server whose /v1/models says the same",
            code="other_continuation",
            param="continuation",
        )
    if body.stream_options is not None and not body.stream:
        raise InvalidRequestError(
            "stream_options is only for stream=true", code="invalid_value", param="stream_options"
        )
    if body.stream and body.prompt_logprobs is not None:
        raise InvalidRequestError(
            "prompt_logprobs is only for stream=false",
            code="invalid_value",
            param="prompt_logprobs",
        )
    info = context.router.info
    if info is None:
        raise UnavailableError(
            "No replica of the model is ready; try again soon",
            code="no_replica",
            retry_after_s=_NO_REPLICA_RETRY_S,
        )
    return info


def check_room(request: Request, priority: int, context: EdgeContext) -> None:
    """Raises QueueFullError if there is no room, before any work is put into the request."""
    full = context.router.why_full(tenant(request), priority)
    if full is not None:
        raise full


def check_model(model: str | None, context: EdgeContext) -> None:
    """Raises NotFoundError unless it is served under this name (or none was asked for)."""
    names = context.config.served_model_names
    if model is not None and model not in names:
        raise NotFoundError(
            f"The model {model[:128]!r} does not exist; this server has {', '.join(names)}",
            code="model_not_found",
            param="model",
        )


def request_label(request: Request) -> str:
    return str(request.scope["state"]["request_id"])


def tenant(request: Request) -> str:
    return str(request.scope.get("state", {}).get("tenant", ""))


async def _whole(job: Job, shape: Shape, context: ServerContext) -> bytes:
    usage = Usage(job.requests, job.num_per_prompt)
    parts: list[list[Update]] = [[] for _ in job.requests]
    async with aclosing(updates(job.requests, context, prompt_only=job.prompt_only)) as news:
        async for update in news:
            usage.add(update)
            parts[update.index].append(update)

    def encode() -> bytes:
        return msgspec.json.encode(shape.body([_joined(part) for part in parts], _body(usage)))

    num_logprobs = sum(len(u.prompt_logprobs) + len(u.logprobs) for part in parts for u in part)
    return await asyncio.to_thread(encode) if num_logprobs > _MANY_LOGPROBS else encode()


def _is_plain(body: GenerationFields, job: Job) -> bool:
    """Whether all events of the stream but the first and the last tell new text and no more."""
    if len(job.requests) != 1 or job.prompt_only or _always_tells(body):
        return False
    params = job.requests[0].sampling
    # A stop string ends the output in the middle of what the engine gave.
    return params.logprobs is None and params.prompt_logprobs is None and not params.stop


def _always_tells(body: GenerationFields) -> bool:
    """Whether there is something to say of a token that shows no text."""
    return body.shows_token_ids or _continuous_usage(body)


def _continuous_usage(body: GenerationFields) -> bool:
    options = body.stream_options
    return options is not None and options.include_usage and options.continuous_usage_stats


async def _events(
    body: GenerationFields, job: Job, shape: Shape, context: ServerContext, express: Express | None
) -> AsyncGenerator[bytes, None]:
    usage = Usage(job.requests, job.num_per_prompt)
    include_usage = body.stream_options is not None and body.stream_options.include_usage
    continuous = _continuous_usage(body)
    texts = _TextChunks(shape, None if include_usage else UNSET)
    always_tells = _always_tells(body)
    begun: set[int] = set()
    news = updates(job.requests, context, prompt_only=job.prompt_only, express=express)
    async with aclosing(news):
        async for update in news:
            usage.add(update)
            # The first chunk goes out whatever it says: it is the client's first token.
            if update.index in begun and not (update.finish or update.logprobs or always_tells):
                if update.text:
                    yield texts.chunk(update.index, update.text)
                continue
            begun.add(update.index)
            field: UsageField = _body(usage) if continuous else None if include_usage else UNSET
            if update.prompt_logprobs:
                yield await asyncio.to_thread(_encoded_chunk, shape, update, field)
            else:
                chunk = _encoded_chunk(shape, update, field)
                if express is not None:
                    express.chunks_are(*texts.halves(update.index))
                yield chunk
    if include_usage:
        if express is not None:
            usage.completion_tokens += express.num_tokens
        yield msgspec.json.encode(shape.usage_chunk(_body(usage)))


class _TextChunks:
    """Chunks that tell nothing but new text, which nearly all do: made from two halves.

    All JSON but the text is the same from one to the next, so it is encoded once.
    """

    def __init__(self, shape: Shape, usage: UsageField) -> None:
        self._shape = shape
        self._usage = usage
        self._halves: dict[int, tuple[bytes, bytes]] = {}

    def chunk(self, index: int, text: str) -> bytes:
        """An event of the completion `index`, whose first one went out before."""
        before, after = self.halves(index)
        return b"%b%b%b" % (before, _ENCODER.encode(text), after)

    def halves(self, index: int) -> tuple[bytes, bytes]:
        """What stands before and after the text, a JSON string, in such an event."""
        halves = self._halves.get(index)
        if halves is None:
            whole = _encoded_chunk(self._shape, Update(index=index, text=_MARK), self._usage)
            before, _, after = whole.partition(msgspec.json.encode(_MARK))
            halves = self._halves[index] = (before, after)
        return halves


_MARK = "\x00"  # in no id and no model's name
_ENCODER = msgspec.json.Encoder()


def _encoded_chunk(shape: Shape, update: Update, usage: UsageField) -> bytes:
    return msgspec.json.encode(shape.chunk(update, usage))


def _joined(parts: Sequence[Update]) -> Update:
    """A completion's updates as one."""
    last = parts[-1]
    return Update(
        index=last.index,
        text="".join(part.text for part in parts),
        token_ids=tuple(token for part in parts for token in part.token_ids),
        offsets=tuple(offset for part in parts for offset in part.offsets),
        logprobs=tuple(entry for part in parts for entry in part.logprobs),
        prompt_logprobs=tuple(entry for part in parts for entry in part.prompt_logprobs),
        finish=last.finish,
        stop_reason=last.stop_reason,
    )


def _body(usage: Usage) -> UsageBody:
    return UsageBody(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        total_tokens=usage.prompt_tokens + usage.completion_tokens,
        prompt_tokens_details=PromptTokensDetails(usage.cached_tokens),
    )


_NO_REPLICA_RETRY_S = 5.0
_MANY_LOGPROBS = 64
"""Encoding more positions than this would hold the event loop for more than a few milliseconds."""
