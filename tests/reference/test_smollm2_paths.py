"""The small model on the other paths: plain torch in fp32, and the precision users get.

test_smollm2.py runs in fp32 on the kernels that "auto" picks. Here: the same tokens on the kernels
that define them; then the checkpoint's own int4, whose scores are not those of fp32 but whose
tokens depend on nothing else either: not on company, not on a preemption.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_smollm2 import (
    GREEDY,
    PROMPTS,
    SAMPLED,
    assert_greedy,
    same_until_tie,
)

from shoal import LLM, SamplingParams

pytestmark = pytest.mark.slow

_FEW_BLOCKS_BYTES = 20 * 16 * (2 * 30 * 3 * 64 * 4)
"""Room for about three of six sequences at full length."""


@pytest.fixture(scope="module")
def plain(smollm2_gguf: Path) -> Iterator[LLM]:
    with LLM(str(smollm2_gguf), dtype="float32", kernels="reference", max_model_len=1024) as plain:
        yield plain


@pytest.fixture(scope="module")
def users(smollm2_gguf: Path) -> Iterator[LLM]:
    """As `shoal serve` opens it."""
    with LLM(str(smollm2_gguf), max_model_len=1024) as users:
        yield users


def test_plain_torch_gives_the_tokens_of_transformers(
    plain: LLM, smollm2_reference: torch.nn.Module
) -> None:
    params = replace(GREEDY, max_tokens=48)
    (alone,) = plain.generate(PROMPTS[0], params)
    for completion in [alone, *plain.generate(PROMPTS[:8], params)]:
        assert len(completion.token_ids) == 48
        assert_greedy(smollm2_reference, completion)


def test_plain_torch_gives_a_seeds_tokens_alone_and_in_a_crowd(plain: LLM) -> None:
    others = [replace(SAMPLED, seed=i, temperature=1.0 + i / 10) for i in range(4)]
    crowd = plain.generate([*PROMPTS[:4], PROMPTS[8]], [*others, SAMPLED])
    (alone,) = plain.generate(PROMPTS[8], SAMPLED)
    same_until_tie(plain, crowd[4], alone, SAMPLED)


def test_the_files_own_precision_mostly_agrees_with_fp32(
    users: LLM, plain: LLM, smollm2_gguf: Path
) -> None:
    """The weights are the same numbers: only what they are multiplied with is rounded."""
    texts = [list(users.tokenizer.encode(" ".join(PROMPTS[i : i + 6]))) for i in (0, 6, 12)]
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1)
    best = [
        [
            position.top[0]
            for each in llm.generate(texts, params)
            for position in each.choices[0].prompt_logprobs
        ]
        for llm in (users, plain)
    ]
    same = [one[0] == other[0] for one, other in zip(*best, strict=True)]
    gaps = [abs(one[1] - other[1]) for one, other in zip(*best, strict=True)]
    assert len(same) > 500
    # Measured: the same best token at 97%, the best one's score 0.035 apart.
    assert sum(same) / len(same) > 0.93
    assert 0 < sum(gaps) / len(gaps) < 0.08


def test_the_files_own_precision_gives_a_seeds_tokens_in_any_company(users: LLM) -> None:
    (alone,) = users.generate(PROMPTS[8], SAMPLED)
    others = [replace(SAMPLED, seed=i, temperature=1.0 + i / 10) for i in range(8)]
    crowd = users.generate([*PROMPTS[:8], PROMPTS[8]], [*others, SAMPLED])
    assert crowd[8].token_ids == alone.token_ids
    (other,) = users.generate(PROMPTS[8], replace(SAMPLED, seed=99))
    assert other.token_ids != alone.token_ids


def test_the_files_own_precision_gives_a_seeds_tokens_after_preemption(
    users: LLM, smollm2_gguf: Path
) -> None:
    params = [replace(SAMPLED, seed=i, max_tokens=60, min_tokens=60) for i in range(6)]
    want = users.generate(PROMPTS[:6], params)
    with LLM(
        str(smollm2_gguf), max_model_len=512, kv_cache_memory_bytes=_FEW_BLOCKS_BYTES
    ) as small:
        got = small.generate(PROMPTS[:6], params)
        assert small.stats.preemptions > 0, "the test must reach preemption"
    assert [each.token_ids for each in got] == [each.token_ids for each in want]
