"""The real small model through the whole engine, held to transformers and to itself.

«The same tokens»: fp32, up to the first position where the two best scores lie within 1e-3.
Greedy decoding of transformers is checked by one forward pass over prompt and output: as
long as each token is the argmax after the ones before it, it is what greedy decoding gives.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from shoal import LLM, SamplingParams
from shoal.core.request import Grammar
from shoal.llm import Completion

pytestmark = pytest.mark.slow

PROMPTS = [
    prompt["text"]
    for prompt in json.loads((Path(__file__).parent / "prompts.json").read_text())["prompts"]
]
GREEDY = SamplingParams(temperature=0.0, max_tokens=128, ignore_eos=True)
SAMPLED = SamplingParams(
    temperature=0.9,
    top_p=0.95,
    top_k=50,
    repetition_penalty=1.1,
    presence_penalty=0.2,
    max_tokens=48,
    min_tokens=8,
    seed=1234,
)
MARGIN = 1e-3
NUM_CROWD, EVERY = 32, 5


@pytest.fixture(scope="module")
def llm(smollm2_gguf: Path) -> Iterator[LLM]:
    with LLM(str(smollm2_gguf), dtype="float32", max_model_len=2048) as llm:
        yield llm


@pytest.fixture(scope="module")
def crowd(llm: LLM) -> list[Completion]:
    """Of the first prompts, all at once."""
    return llm.generate(PROMPTS[:NUM_CROWD], GREEDY)


def assert_greedy(reference: torch.nn.Module, completion: Completion) -> None:
    """Every output token is transformers' argmax, up to a tie."""
    prompt, output = completion.prompt_ids, completion.token_ids
    with torch.inference_mode():
        logits_TV: Tensor = reference(torch.tensor([prompt + output])).logits[0]
    scores_TV = logits_TV[len(prompt) - 1 : -1]
    best = scores_TV.topk(2)
    for i, token_id in enumerate(output):
        if best.values[i, 0] - best.values[i, 1] < MARGIN:
            return
        assert token_id == best.indices[i, 0], f"token {i} of {len(output)} differs"


def same_until_tie(llm: LLM, got: Completion, want: Completion, params: SamplingParams) -> None:
    """Equal, or different first where the two candidates' scores were within the margin."""
    if got.token_ids == want.token_ids:
        return
    pairs = zip(got.token_ids, want.token_ids, strict=False)
    first = next(i for i, (a, b) in enumerate(pairs) if a != b)
    prefix = want.token_ids[:first]
    probe = replace(params, max_tokens=first + 1, min_tokens=0, temperature=0.0, logprobs=20)
    (scored,) = llm.generate([list(want.prompt_ids)], probe, output_ids=[prefix])
    logprobs = dict(scored.choices[0].logprobs[0].top)
    gap = abs(logprobs.get(got.token_ids[first], 9.0) - logprobs.get(want.token_ids[first], -9.0))
    assert gap < MARGIN, f"tokens differ at {first}, scores {gap:.4f} apart"


def test_greedy_tokens_in_a_crowd_are_those_of_transformers(
    crowd: list[Completion], smollm2_reference: torch.nn.Module
) -> None:
    assert len(crowd) == NUM_CROWD
    for completion in crowd:
        assert len(completion.token_ids) == 128
        assert_greedy(smollm2_reference, completion)


def test_greedy_tokens_alone_are_those_in_a_crowd(llm: LLM, crowd: list[Completion]) -> None:
    """No row depends on its batch, to the bit (test_compiled.py): a few prompts tell for all."""
    for index in range(0, NUM_CROWD, EVERY):
        (alone,) = llm.generate(PROMPTS[index], GREEDY)
        assert alone.token_ids == crowd[index].token_ids


def test_a_seed_gives_its_tokens_alone_and_in_a_crowd(llm: LLM) -> None:
    others = [replace(SAMPLED, seed=i, temperature=1.0 + i / 10) for i in range(8)]
    crowd = llm.generate([*PROMPTS[:8], PROMPTS[8]], [*others, SAMPLED])
    (alone,) = llm.generate(PROMPTS[8], SAMPLED)
    same_until_tie(llm, crowd[8], alone, SAMPLED)
    (again,) = llm.generate(PROMPTS[8], SAMPLED)
    assert again.token_ids == alone.token_ids
    (other,) = llm.generate(PROMPTS[8], replace(SAMPLED, seed=99))
    assert other.token_ids != alone.token_ids


def test_a_seed_gives_its_tokens_after_preemption(llm: LLM, smollm2_gguf: Path) -> None:
    params = [replace(SAMPLED, seed=i, max_tokens=60, min_tokens=60) for i in range(6)]
    want = llm.generate(PROMPTS[:6], params)
    # Room for about three of them at full length.
    kv_bytes = 2 * 30 * 3 * 64 * 4 * 16 * 40
    with LLM(
        str(smollm2_gguf), dtype="float32", max_model_len=512, kv_cache_memory_bytes=kv_bytes
    ) as small:
        got = small.generate(PROMPTS[:6], params)
        assert small.stats.preemptions > 0, "the test must reach preemption"
    for one, other in zip(got, want, strict=True):
        same_until_tie(llm, one, other, params[0])


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_stream_cut_anywhere_goes_on_the_same(llm: LLM, params: SamplingParams) -> None:
    params = replace(params, max_tokens=24, stop=("zzz never",))
    (want,) = llm.generate(PROMPTS[3], params)
    cuts: Sequence[int] = range(1, len(want.token_ids))
    rest = llm.generate(
        [list(want.prompt_ids)] * len(cuts),
        params,
        output_ids=[want.token_ids[:cut] for cut in cuts],
    )
    for cut, completion in zip(cuts, rest, strict=True):
        whole = replace(
            completion,
            choices=(
                replace(
                    completion.choices[0],
                    token_ids=want.token_ids[:cut] + completion.token_ids,
                ),
            ),
        )
        same_until_tie(llm, whole, want, params)
        assert completion.finish_reason == want.finish_reason


def test_a_stop_string_across_a_cut_still_stops(llm: LLM) -> None:
    (whole,) = llm.generate("Count: one, two, three, four,", replace(GREEDY, max_tokens=24))
    middle = whole.text[len(whole.text) // 2 :][:6]
    params = replace(GREEDY, max_tokens=24, stop=(middle,))
    (want,) = llm.generate("Count: one, two, three, four,", params)
    assert want.finish_reason == "stop"
    assert middle not in want.text
    for cut in range(1, len(want.token_ids)):
        (rest,) = llm.generate([list(want.prompt_ids)], params, output_ids=[want.token_ids[:cut]])
        assert want.token_ids[:cut] + rest.token_ids == want.token_ids
        assert rest.finish_reason == "stop"
        assert want.text.endswith(rest.text)


def test_json_follows_its_schema_and_so_does_its_continuation(llm: LLM) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer"}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    params = SamplingParams(
        temperature=0.7,
        seed=5,
        max_tokens=80,
        grammar=Grammar(kind="json_schema", schema=json.dumps(schema)),
    )
    (want,) = llm.generate("A person as JSON: ", params)
    assert want.finish_reason == "stop"
    assert set(json.loads(want.text)) == {"name", "age"}
    cut = len(want.token_ids) // 2
    (rest,) = llm.generate([list(want.prompt_ids)], params, output_ids=[want.token_ids[:cut]])
    assert want.token_ids[:cut] + rest.token_ids == want.token_ids


def test_a_repeated_prompt_is_found_in_the_cache(llm: LLM) -> None:
    prompt = list(llm.tokenizer.encode(" ".join(PROMPTS)))[:512]
    params = SamplingParams(temperature=0.0, max_tokens=4)
    (first,) = llm.generate([prompt], params)
    (second,) = llm.generate([prompt], params)
    assert second.choices[0].num_cached_tokens == 496
    assert second.token_ids == first.token_ids


def test_two_turns_of_a_chat_share_their_prefix(llm: LLM) -> None:
    turns = [{"role": "user", "content": PROMPTS[0]}]
    (answer,) = llm.chat(turns, replace(GREEDY, max_tokens=32, ignore_eos=False))
    turns += [
        {"role": "assistant", "content": answer.text},
        {"role": "user", "content": "And now in one sentence, please."},
    ]
    (second,) = llm.chat(turns, replace(GREEDY, max_tokens=8))
    assert llm.chat([]) == []
    assert second.choices[0].num_cached_tokens >= len(answer.prompt_ids) // 16 * 16
