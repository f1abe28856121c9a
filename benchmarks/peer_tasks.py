"""What is timed: prompts of random token ids from a seed, the same for every engine in a round.

    common   what every engine does: single stream, 16 requests, prefill
    growth   what grows: a step at a short and at a long context, 16 requests against 64

Knows nothing of engines.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

TaskSet = Literal["common", "growth"]

FIRST_PROMPT_TOKENS = 8
_KV_SLACK = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Tokens, but for `batch`, `crowd` (requests) and `prefill_repeats`."""

    single_prompt: int = 32
    single_tokens: int = 128
    batch: int = 16
    crowd: int = 64
    batch_prompt: int = 128
    batch_tokens: int = 128
    prefill: int = 512
    prefill_repeats: int = 3
    short_context: int = 100
    long_context: int = 4000
    step_tokens: int = 33

    def at_most(self, max_positions: int) -> Sizes:
        """The same, with a long context that the model can hold."""
        longest = max_positions - self.step_tokens - _KV_SLACK
        values = {name: getattr(self, name) for name in self.__slots__}
        return Sizes(**{**values, "long_context": min(self.long_context, longest)})


QUICK = Sizes(
    single_tokens=32,
    batch_prompt=32,
    batch_tokens=32,
    prefill=128,
    prefill_repeats=1,
    long_context=1000,
)


def tasks_of(task_set: TaskSet, sizes: Sizes, vocab_size: int, seed: str) -> dict[str, Any]:
    """The parts of a worker's job that say what to run and how much room it takes."""
    rng = random.Random(seed)
    # Low ids are where vocabularies keep special tokens; some keep them at the end.
    low, high = min(1000, vocab_size // 4), vocab_size * 4 // 5

    def prompt(length: int) -> list[int]:
        return [rng.randrange(low, high) for _ in range(length)]

    common = task_set == "common"
    tasks = _common(sizes, prompt) if common else _growth(sizes, prompt)
    requests = sizes.batch if common else sizes.crowd
    per_request = sizes.batch_prompt + sizes.batch_tokens + _KV_SLACK
    longest = max(
        sizes.single_prompt + sizes.single_tokens,
        sizes.batch_prompt + sizes.batch_tokens,
        sizes.prefill + 1,
        0 if common else sizes.long_context + sizes.step_tokens,
    )
    return {
        "first_prompt": prompt(FIRST_PROMPT_TOKENS),
        "max_batch": requests,
        "max_len": longest + _KV_SLACK,
        "kv_tokens": max(requests * per_request, longest + _KV_SLACK),
        "tasks": tasks,
    }


def _common(sizes: Sizes, prompt: Callable[[int], list[int]]) -> list[dict[str, Any]]:
    single = [prompt(sizes.single_prompt)]
    prefills = [[prompt(sizes.prefill)] for _ in range(sizes.prefill_repeats)]
    return [
        _task("single", sizes.single_tokens, [prompt(sizes.single_prompt)], [single]),
        _task("prefill", 1, [prompt(sizes.prefill)], prefills),
        _batch("batch", sizes.batch, sizes, prompt, warm_up=True),
    ]


def _growth(sizes: Sizes, prompt: Callable[[int], list[int]]) -> list[dict[str, Any]]:
    def step(name: str, context: int) -> dict[str, Any]:
        # The middle of the timed steps sees `context` tokens.
        return _task(name, sizes.step_tokens, [], [[prompt(context - sizes.step_tokens // 2)]])

    return [
        _batch("batch", sizes.batch, sizes, prompt, warm_up=True),
        _batch("crowd", sizes.crowd, sizes, prompt, warm_up=False),
        step("short", sizes.short_context),
        step("long", sizes.long_context),
    ]


def _batch(
    name: str, num: int, sizes: Sizes, prompt: Callable[[int], list[int]], *, warm_up: bool
) -> dict[str, Any]:
    prompts = [prompt(sizes.batch_prompt) for _ in range(num)]
    before = [prompt(sizes.batch_prompt) for _ in range(num)] if warm_up else []
    return _task(name, sizes.batch_tokens, before, [prompts])


def _task(
    name: str, num_tokens: int, warm_up: list[list[int]], repeats: list[list[list[int]]]
) -> dict[str, Any]:
    return {"name": name, "num_tokens": num_tokens, "warm_up": warm_up, "repeats": repeats}
