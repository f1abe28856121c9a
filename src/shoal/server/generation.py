"""Completions of one HTTP request: token ids from the router → updates of text.

    router.generate ──Output──▶ TextStream ──Update──▶ (merged by arrival) ──▶ a response

A stop string found in the text ends a completion and cancels its request. Knows nothing of
OpenAI's shapes.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Literal

import msgspec

from shoal.core.errors import UnavailableError
from shoal.core.request import GenerateRequest, Output, SamplingParams, TokenLogprobs
from shoal.server.config import ServerContext
from shoal.server.express import Express
from shoal.text import TextStream


class Update(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """News of one completion. A msgspec struct, since one is made for every token.

    Attributes:
        index: which completion of the request.
        text: new text; may be empty while a character or a stop string is half there.
        token_ids, logprobs: new tokens, a stop token among them.
        offsets: where the text of each token begins in the whole output, in characters.
        finish: set in the last update.
        stop_reason: the stop string or token id that ended it; None for the model's own EOS.
    """

    index: int
    text: str = ""
    token_ids: tuple[int, ...] = ()
    offsets: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    num_cached_tokens: int = 0
    finish: Literal["stop", "length"] | None = None
    stop_reason: str | int | None = None


class Usage:
    """Tokens of one HTTP request: each prompt counts once, carried output tokens count."""

    def __init__(self, requests: Sequence[GenerateRequest], num_per_prompt: int) -> None:
        self._num_per_prompt = num_per_prompt
        self.prompt_tokens = sum(len(r.prompt_ids) for r in requests[::num_per_prompt])
        self.completion_tokens = sum(len(r.output_ids) for r in requests)
        self.cached_tokens = 0

    def add(self, update: Update) -> None:
        self.completion_tokens += len(update.token_ids)
        if update.index % self._num_per_prompt == 0:
            self.cached_tokens += update.num_cached_tokens


def updates(
    requests: Sequence[GenerateRequest],
    context: ServerContext,
    *,
    prompt_only: bool = False,
    express: Express | None = None,
) -> AsyncGenerator[Update, None]:
    """Updates of all completions as they come; closing it cancels what still runs.

    Raises RequestError when any of them is refused or fails: the rest are cancelled.

    Args:
        prompt_only: no output is wanted, only what was asked about the prompts.
        express: of a single request; what it sends is in no update.
    """
    if express is not None:
        (request,) = requests
        return _completion(0, request, context, express)
    complete = _prompt_only if prompt_only else _completion
    streams = [complete(i, request, context) for i, request in enumerate(requests)]
    return streams[0] if len(streams) == 1 else _merged(streams)


async def _merged(
    streams: Sequence[AsyncGenerator[Update, None]],
) -> AsyncGenerator[Update, None]:
    # Bounded, so a slow client holds back the pumps, not a growing pile of updates.
    queue: _Queue = asyncio.Queue(maxsize=len(streams))
    pumps = [asyncio.create_task(_pump(stream, queue)) for stream in streams]
    try:
        num_open = len(pumps)
        while num_open:
            item = await queue.get()
            if isinstance(item, Update):
                yield item
            elif item is None:
                num_open -= 1
            else:
                raise item
    finally:
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


_Queue = asyncio.Queue[Update | Exception | None]


async def _pump(stream: AsyncGenerator[Update, None], queue: _Queue) -> None:
    """Every update, then None; or the exception that ended them, for the reader to raise."""
    end = None
    try:
        async with aclosing(stream):
            async for update in stream:
                await queue.put(update)
    except Exception as error:  # noqa: BLE001
        end = error
    await queue.put(end)


async def _completion(
    index: int, request: GenerateRequest, context: ServerContext, express: Express | None = None
) -> AsyncGenerator[Update, None]:
    text = TextStream(context.tokenizer, request.sampling, request.prompt_ids, request.output_ids)
    if text.stop is not None:
        # A continued request that was cut right at its end.
        yield Update(index=index, finish="stop", stop_reason=text.stop)
        return
    timer = context.metrics.completion(len(request.prompt_ids), context.clock.now())
    reason = "cancelled"
    last = None
    take = None if express is None else express.begin(text, timer)
    try:
        async with aclosing(context.router.generate(request, take)) as outputs:
            async for output in outputs:
                if output.error is not None:
                    reason = output.error.code
                    raise output.error.to_exception()
                update = _update(index, output, text, request.sampling)
                if update.token_ids:
                    timer.tokens(len(update.token_ids), context.clock.now())
                if update.finish is not None:
                    reason, last = update.finish, update
                    break
                yield update
        assert last is not None, "the router ended a request without a finish"
        # Out here the router has let go of the request before the client hears of its end.
        yield last
    finally:
        timer.finished(reason, context.clock.now())


async def _prompt_only(
    index: int, request: GenerateRequest, context: ServerContext
) -> AsyncGenerator[Update, None]:
    """What a completion says of its prompt; the one token it takes to learn that is dropped."""
    told = Update(index=index)
    async with aclosing(_completion(index, request, context)) as found:
        async for update in found:
            if update.prompt_logprobs or update.num_cached_tokens:
                told = update
    yield Update(
        index=index,
        prompt_logprobs=told.prompt_logprobs,
        num_cached_tokens=told.num_cached_tokens,
        finish="length",
    )


def _update(index: int, output: Output, text: TextStream, params: SamplingParams) -> Update:
    delta = text.push(output.token_ids, stop_token=output.stop_token_id is not None)
    new_text, stop = delta.text, delta.stop
    if output.finish is not None and stop is None:
        rest = text.finish()
        new_text, stop = new_text + rest.text, rest.stop
    finish = output.finish if stop is None else "stop"
    if finish == "cancelled" or finish == "error":
        raise UnavailableError(
            "The server stopped before this request was done; send it again",
            code="draining",
            retry_after_s=_RETRY_AFTER_S,
        )
    by_token = output.stop_token_id in params.stop_token_ids
    return Update(
        index=index,
        text=new_text,
        # What the engine produced behind a stop string is not part of the output.
        token_ids=output.token_ids[: delta.num_tokens],
        offsets=delta.offsets,
        logprobs=output.logprobs[: delta.num_tokens],
        prompt_logprobs=output.prompt_logprobs,
        num_cached_tokens=output.num_cached_tokens or 0,
        finish=finish,
        stop_reason=output.stop_token_id if stop is None and by_token else stop,
    )


_RETRY_AFTER_S = 5.0
