"""Prompts of a wanted length for a load test: random words or token ids, made from a seed.

With the server's /tokenize, words are kept that are one token each, so a prompt of n tokens
is n tokens long; without it four characters count as a token, and `exact` is False.

Knows nothing of arrivals' timing or of what comes back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import httpx

from shoal.core.workload import HASH_BLOCK_TOKENS, Arrival

CHARS_PER_TOKEN = 4.0

_REPEATS = 16
_TEXT = (
    "the of and to in is you that it he was for on are as with his they at be this have from "
    "or one had by word but not what all were we when your can said there use an each which she "
    "do how their if will up other about out many then them these so some her would make like "
    "him into time has look two more write go see number no way could people my than first water "
    "been call who oil its now find long down day did get come made may part"
)
_WORDS = tuple(_TEXT.split())


@dataclass(frozen=True, slots=True)
class PromptSource:
    """Makes prompts out of `units`: words (joined by spaces), or token ids.

    Attributes:
        tokens_per_unit: 1 where lengths are exact.
        overhead_tokens: what the server adds: BOS, the chat template.
    """

    units: Sequence[str] | Sequence[int]
    tokens_per_unit: float = 1.0
    overhead_tokens: int = 0
    exact: bool = True

    def prompt(self, arrival: Arrival, seed: str) -> str | list[int]:
        """The arrival's own text, or units that `seed` and its block hashes determine."""
        if arrival.prompt is not None:
            return arrival.prompt
        tokens = max(1, arrival.prompt_tokens - self.overhead_tokens)
        num_units = max(1, round(tokens / self.tokens_per_unit))
        per_block = max(1, round(HASH_BLOCK_TOKENS / self.tokens_per_unit))
        chosen: list[str | int] = []
        for block_hash in arrival.block_hashes:
            if len(chosen) >= num_units:
                break
            chosen += Random(f"block {block_hash}").choices(self.units, k=per_block)
        missing = num_units - len(chosen)
        chosen = chosen[:num_units] + Random(seed).choices(self.units, k=max(0, missing))
        if isinstance(self.units[0], int):
            return [unit for unit in chosen if isinstance(unit, int)]
        return "".join(f" {unit}" for unit in chosen).lstrip()


def token_id_source(vocab_size: int) -> PromptSource:
    """Prompts of random token ids, away from both ends, where special tokens live."""
    low = min(1000, vocab_size // 4)
    return PromptSource(range(low, max(low + 1, vocab_size * 3 // 4)))


async def word_source(client: httpx.AsyncClient, model: str, *, chat: bool) -> PromptSource:
    """Prompts of words, calibrated by the server's /tokenize where it has one."""

    async def count(word: str, repeats: int) -> int:
        text = " ".join([word] * repeats)
        content = {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
        reply = await client.post("/tokenize", json={"model": model, **content})
        reply.raise_for_status()
        return int(reply.json()["count"])

    try:
        once, twice = [await count(_WORDS[0], n * _REPEATS) for n in (1, 2)]
        overhead = 2 * once - twice
        single = [word for word in _WORDS if await count(word, _REPEATS) == _REPEATS + overhead]
        if single:
            return PromptSource(single, overhead_tokens=overhead)
    except (httpx.HTTPError, ValueError, KeyError, TypeError):
        pass  # no /tokenize, or one of another kind: the approximation says so itself
    mean_chars = sum(len(word) + 1 for word in _WORDS) / len(_WORDS)
    return PromptSource(_WORDS, tokens_per_unit=mean_chars / CHARS_PER_TOKEN, exact=False)
