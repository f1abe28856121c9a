"""Log-probabilities in the shapes of chat, of completions and of vLLM's prompt_logprobs.

Knows nothing of requests or streams.
"""

from __future__ import annotations

from collections.abc import Sequence

from shoal.core.request import TokenLogprobs
from shoal.server.responses import (
    ChatLogprob,
    ChatLogprobs,
    CompletionLogprobs,
    PromptLogprob,
    PromptLogprobs,
    TopLogprob,
)
from shoal.text import Tokenizer

_LOWEST = -9999.0
"""What OpenAI sends for minus infinity, which JSON cannot say."""


def chat_logprobs(found: Sequence[TokenLogprobs], tokenizer: Tokenizer) -> ChatLogprobs:
    return ChatLogprobs(
        [
            ChatLogprob(
                token=tokenizer.token_text(entry.token_id),
                logprob=_finite(entry.logprob),
                bytes=list(tokenizer.token_bytes(entry.token_id)),
                top_logprobs=[
                    TopLogprob(
                        token=tokenizer.token_text(token_id),
                        logprob=_finite(logprob),
                        bytes=list(tokenizer.token_bytes(token_id)),
                    )
                    for token_id, logprob in entry.top
                ],
            )
            for entry in found
        ]
    )


def completion_logprobs(
    found: Sequence[TokenLogprobs], offsets: Sequence[int], tokenizer: Tokenizer
) -> CompletionLogprobs:
    """`offsets`: where each token's text begins in the completion's text."""
    return CompletionLogprobs(
        tokens=[tokenizer.token_text(entry.token_id) for entry in found],
        token_logprobs=[_finite(entry.logprob) for entry in found],
        top_logprobs=[
            {
                # The chosen token is always told, and last, so that it wins a tie of spellings.
                tokenizer.token_text(token_id): _finite(logprob)
                for token_id, logprob in (*entry.top, (entry.token_id, entry.logprob))
            }
            for entry in found
        ],
        text_offset=list(offsets),
    )


def with_prompt(
    first_token_id: int,
    prompt: CompletionLogprobs,
    output: CompletionLogprobs,
    tokenizer: Tokenizer,
) -> CompletionLogprobs:
    """Echoed prompt and output in one; nothing predicts the first token of a prompt.

    `prompt` has an offset for every token of the prompt, and the rest for all but the first.
    """
    return CompletionLogprobs(
        tokens=[tokenizer.token_text(first_token_id), *prompt.tokens, *output.tokens],
        token_logprobs=[None, *prompt.token_logprobs, *output.token_logprobs],
        top_logprobs=[None, *prompt.top_logprobs, *output.top_logprobs],
        text_offset=[*prompt.text_offset, *output.text_offset],
    )


def prompt_logprobs(found: Sequence[TokenLogprobs], tokenizer: Tokenizer) -> PromptLogprobs:
    """By token id; the first token of a prompt has none."""
    return [None, *(_candidates(entry, tokenizer) for entry in found)]


def _candidates(entry: TokenLogprobs, tokenizer: Tokenizer) -> dict[str, PromptLogprob]:
    ranked = [(token_id, logprob, i + 1) for i, (token_id, logprob) in enumerate(entry.top)]
    return {
        str(token_id): PromptLogprob(_finite(logprob), rank, tokenizer.token_text(token_id))
        for token_id, logprob, rank in (*ranked, (entry.token_id, entry.logprob, entry.rank))
    }


def _finite(logprob: float) -> float:
    return max(logprob, _LOWEST)
