"""Prompts → token ids: text, ids, or messages through the model's chat template.

Long text is tokenised in a thread, and text that cannot fit the context is refused unseen.
Knows nothing of sampling.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import TypeVar

from shoal.core.errors import InvalidRequestError, ModelError
from shoal.server.config import ServerContext
from shoal.server.openai_types import ChatFields, ChatMessage, CompletionRequest
from shoal.server.sampling import check_token_ids

_LONG_CHARS = 4096
"""Text above this would hold the event loop for more than about a millisecond."""

T = TypeVar("T")


async def completion_prompts(
    body: CompletionRequest, context: ServerContext, max_model_len: int
) -> list[tuple[int, ...]]:
    """Token ids of every prompt of the body."""
    prompt = body.prompt
    if isinstance(prompt, str):
        prompt = [prompt]
    if not prompt:
        raise _empty_prompt()
    if isinstance(prompt[0], int):
        prompt = [prompt]
    return [
        _checked_ids(item, context)
        if isinstance(item, list)
        else await _text_prompt(str(item), body.add_special_tokens, context, max_model_len)
        for item in prompt
    ]


def num_prompts(body: CompletionRequest) -> int:
    """How many prompts the body holds, before any of them is looked at."""
    prompt = body.prompt
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        return 1
    return len(prompt)


def given_texts(body: CompletionRequest) -> list[str | None]:
    """Each prompt as it was given, if it was given as text."""
    if isinstance(body.prompt, str):
        return [body.prompt]
    if num_prompts(body) == 1 and not isinstance(body.prompt[0], str):
        return [None]
    texts = [prompt if isinstance(prompt, str) else None for prompt in body.prompt]
    return texts[: num_prompts(body)]


async def chat_prompt(
    body: ChatFields, messages: Sequence[ChatMessage], context: ServerContext, limit: int | None
) -> tuple[int, ...]:
    """Token ids of the messages, rendered; `limit`: tokens they may have."""
    template = context.tokenizer.require_chat_template()
    spoken = [message.as_template_input() for message in messages]
    _refuse_hopeless([message["content"] for message in spoken], context, limit, "messages")
    answer = body.add_generation_prompt

    def render() -> str:
        return template.render(
            spoken,
            now=datetime.fromtimestamp(context.wall_clock()),
            add_generation_prompt=not body.continue_final_message if answer is None else answer,
            continue_final_message=body.continue_final_message,
            template_kwargs=body.chat_template_kwargs,
        )

    try:
        text = await _off_loop(sum(len(message["content"]) for message in spoken), render)
    except ModelError as error:
        # The template worked when the model was loaded; these messages are too much for it.
        raise InvalidRequestError(
            str(error), code="chat_template_failed", param="messages"
        ) from error
    # Templates write the BOS themselves.
    return await encode(text, context, add_special_tokens=bool(body.add_special_tokens))


async def encode(text: str, context: ServerContext, *, add_special_tokens: bool) -> tuple[int, ...]:
    """Token ids of a text, in a thread if it is long."""
    ids = await _off_loop(
        len(text),
        lambda: context.tokenizer.encode(text, add_special_tokens=add_special_tokens),
    )
    return tuple(ids)


async def _text_prompt(
    text: str, add_special_tokens: bool, context: ServerContext, max_model_len: int
) -> tuple[int, ...]:
    _refuse_hopeless([text], context, max_model_len, "prompt")
    ids = await encode(text, context, add_special_tokens=add_special_tokens)
    if not ids:
        raise _empty_prompt()
    return ids


def _checked_ids(ids: list[int], context: ServerContext) -> tuple[int, ...]:
    if not ids:
        raise _empty_prompt()
    check_token_ids(ids, context.tokenizer.vocab_size, "prompt")
    return tuple(ids)


def _refuse_hopeless(
    texts: Sequence[str], context: ServerContext, limit: int | None, param: str
) -> None:
    """Refuses text that would not fit even if all its tokens were the longest there are."""
    at_least = sum(map(context.tokenizer.fewest_tokens, texts))
    if limit is not None and at_least > limit:
        raise InvalidRequestError(
            f"This model's maximum context length is {limit} tokens. However, the prompt has "
            f"{sum(map(len, texts))} characters, which is at least {at_least} tokens. Shorten it.",
            code="context_length_exceeded",
            param=param,
        )


async def _off_loop(num_chars: int, work: Callable[[], T]) -> T:
    return await asyncio.to_thread(work) if num_chars > _LONG_CHARS else work()


def _empty_prompt() -> InvalidRequestError:
    return InvalidRequestError(
        "The prompt is empty; it needs at least one token", code="empty_prompt", param="prompt"
    )
