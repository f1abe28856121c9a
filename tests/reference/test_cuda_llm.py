"""`LLM` on an NVIDIA GPU: the CUDA kernels and graphs, held to transformers and to themselves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_smollm2 import GREEDY, PROMPTS, SAMPLED, assert_greedy, same_until_tie

from shoal import LLM
from shoal.worker.runner import Worker

pytestmark = [pytest.mark.gpu, pytest.mark.slow]


def open_llm(path: Path, **options: object) -> LLM:
    settings = {"dtype": "float32", "max_model_len": 1024, "kernels": "cuda", **options}
    return LLM(str(path), device="cuda", **settings)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def llm(smollm2_gguf: Path) -> Iterator[LLM]:
    with open_llm(smollm2_gguf) as llm:
        yield llm


def test_greedy_tokens_are_those_of_transformers(llm: LLM, smollm2_gguf: Path) -> None:
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(
        smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32
    ).eval()
    (alone,) = llm.generate(PROMPTS[0], GREEDY)
    for completion in [alone, *llm.generate(PROMPTS[:12], GREEDY)]:
        assert_greedy(reference, completion)


def test_graphs_change_no_token(
    llm: LLM, smollm2_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = llm.generate(PROMPTS[:9], GREEDY)
    monkeypatch.setattr(Worker, "record_graphs", lambda *_args, **_options: 0)
    with open_llm(smollm2_gguf) as eager:
        got = eager.generate(PROMPTS[:9], GREEDY)
    for one, other in zip(got, want, strict=True):
        same_until_tie(llm, one, other, GREEDY)


def test_a_seed_gives_its_tokens_alone_and_in_a_crowd(llm: LLM) -> None:
    others = [replace(SAMPLED, seed=i, temperature=1.0 + i / 10) for i in range(8)]
    crowd = llm.generate([*PROMPTS[:8], PROMPTS[8]], [*others, SAMPLED])
    (alone,) = llm.generate(PROMPTS[8], SAMPLED)
    same_until_tie(llm, crowd[8], alone, SAMPLED)
    (again,) = llm.generate(PROMPTS[8], SAMPLED)
    assert again.token_ids == alone.token_ids


@pytest.mark.parametrize("quantize", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8", "fp8"])
def test_few_bits_on_the_gpu_match_the_reference_kernels(
    smollm2_gguf: Path, quantize: str, kv_cache_dtype: str
) -> None:
    """The same weights and KV in few bits, with the kernels that define what they mean."""
    options = {
        "dtype": "auto",
        "quantize": quantize,
        "kv_cache_dtype": kv_cache_dtype,
        "kv_cache_memory_bytes": 256 << 20,
    }
    params = replace(GREEDY, max_tokens=1, logprobs=5)
    with open_llm(smollm2_gguf, **options) as fast:
        got = fast.generate(PROMPTS[:6], params)
    with open_llm(smollm2_gguf, **options, kernels="reference") as plain:
        want = plain.generate(PROMPTS[:6], params)
    for one, other in zip(got, want, strict=True):
        # bf16 all through: the best five keep their order of magnitude.
        theirs = dict(other.choices[0].logprobs[0].top)
        best = one.choices[0].logprobs[0].top[0]
        assert best[0] in theirs
        assert abs(best[1] - theirs[best[0]]) < 0.2


def test_long_prompts_go_in_chunks_beside_decoding_rows(llm: LLM) -> None:
    prompt = list(llm.tokenizer.encode(" ".join(PROMPTS)))[:700]
    params = replace(GREEDY, max_tokens=8)
    (alone,) = llm.generate([prompt], params)
    crowd = llm.generate([*PROMPTS[:4], prompt], [GREEDY] * 4 + [params])
    same_until_tie(llm, crowd[4], alone, params)
