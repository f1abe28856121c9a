"""The `openai` client, unmodified, against a real server."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import openai
import pydantic
import pytest
from openai.types.chat import ChatCompletionMessageParam
from server_process import StartServer

MODEL = "smollm2-135m"
HELLO: list[ChatCompletionMessageParam] = [
    {"role": "system", "content": "You answer in one short sentence."},
    {"role": "user", "content": "What is the capital of France?"},
]


@pytest.fixture(scope="module")
def ai(server_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server_url}/v1", api_key="none", max_retries=0) as ai:
        yield ai


def test_models(ai: openai.OpenAI) -> None:
    assert [model.id for model in ai.models.list()] == [MODEL]
    assert ai.models.retrieve(MODEL).object == "model"


def test_text_and_its_ids_give_the_same(ai: openai.OpenAI) -> None:
    prompt = "Once upon a time"
    asked = ai.completions.create(
        model=MODEL,
        prompt=prompt,
        max_tokens=8,
        temperature=0,
        extra_body={"return_token_ids": True},
    )
    ids: list[int] = asked.choices[0].prompt_token_ids  # type: ignore[attr-defined]
    [text], [again] = (
        [choice.text for choice in answer.choices]
        for answer in (
            asked,
            ai.completions.create(model=MODEL, prompt=ids, max_tokens=8, temperature=0),
        )
    )
    assert text == again
    assert text.strip()
    assert asked.usage is not None
    assert (asked.usage.prompt_tokens, asked.usage.completion_tokens) == (len(ids), 8)


def test_lists_of_prompts(ai: openai.OpenAI) -> None:
    answer = ai.completions.create(
        model=MODEL, prompt=["One two three", "Red green"], max_tokens=4, temperature=0
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    by_ids = ai.completions.create(
        model=MODEL, prompt=[[1, 2, 3], [4, 5]], max_tokens=1, temperature=0
    )
    assert len(by_ids.choices) == 2


def test_echo_with_logprobs(ai: openai.OpenAI) -> None:
    prompt = "The quick brown fox jumps over the lazy"
    [choice] = ai.completions.create(
        model=MODEL, prompt=prompt, max_tokens=2, temperature=0, echo=True, logprobs=2
    ).choices
    logprobs = choice.logprobs
    assert choice.text.startswith(prompt)
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.text_offset is not None
    assert "".join(logprobs.tokens) == choice.text
    assert logprobs.token_logprobs[0] is None
    assert all(value <= 0 for value in logprobs.token_logprobs[1:])
    for token, offset in zip(logprobs.tokens, logprobs.text_offset, strict=True):
        assert choice.text[offset:].startswith(token)


def test_chat(ai: openai.OpenAI) -> None:
    answer = ai.chat.completions.create(model=MODEL, messages=HELLO, temperature=0)
    [choice] = answer.choices
    assert choice.message.role == "assistant"
    assert "Paris" in (choice.message.content or "")
    assert choice.finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_stream_with_usage_says_the_same(ai: openai.OpenAI) -> None:
    body: dict[str, Any] = {"model": MODEL, "messages": HELLO, "temperature": 0, "max_tokens": 12}
    whole = ai.chat.completions.create(**body)
    chunks = list(
        ai.chat.completions.create(**body, stream=True, stream_options={"include_usage": True})
    )
    *parts, last = chunks
    assert last.choices == []
    assert last.usage is not None
    assert whole.usage is not None
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    assert parts[0].choices[0].delta.role == "assistant"
    text = "".join(part.choices[0].delta.content or "" for part in parts)
    assert text == whole.choices[0].message.content
    assert parts[-1].choices[0].finish_reason == whole.choices[0].finish_reason


def test_chat_logprobs(ai: openai.OpenAI) -> None:
    [choice] = ai.chat.completions.create(
        model=MODEL, messages=HELLO, temperature=0, max_tokens=4, logprobs=True, top_logprobs=5
    ).choices
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert len(choice.logprobs.content) == 4
    for token in choice.logprobs.content:
        assert len(token.top_logprobs) == 5
        assert token.top_logprobs[0].token == token.token, "greedy takes the likeliest"
        assert sum(math.exp(top.logprob) for top in token.top_logprobs) <= 1.0001


def test_seeds_and_n(ai: openai.OpenAI) -> None:
    def sample(seed: int, n: int) -> list[str]:
        answer = ai.completions.create(
            model=MODEL, prompt="My favourite", max_tokens=12, temperature=1, seed=seed, n=n
        )
        return [choice.text for choice in answer.choices]

    three = sample(7, 3)
    assert len(set(three)) == 3
    assert sample(7, 1) == three[:1]
    assert sample(8, 1) == three[1:2]


def test_stop_strings_are_cut(ai: openai.OpenAI) -> None:
    [choice] = ai.completions.create(
        model=MODEL, prompt="1, 2, 3, 4, 5,", max_tokens=40, temperature=0, stop=[" 8"]
    ).choices
    assert choice.finish_reason == "stop"
    assert "7" in choice.text
    assert "8" not in choice.text


def test_parse_with_a_schema(ai: openai.OpenAI) -> None:
    class Person(pydantic.BaseModel):
        name: str
        age: int

    answer = ai.chat.completions.parse(
        model=MODEL,
        messages=[{"role": "user", "content": "Anna is 30 years old. Give her name and age."}],
        response_format=Person,
        temperature=0,
        max_tokens=100,
    )
    assert isinstance(answer.choices[0].message.parsed, Person)


def test_a_cut_stream_continues_with_the_same_tokens(ai: openai.OpenAI) -> None:
    body: dict[str, Any] = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 24}
    body |= {"seed": 3, "temperature": 0.9, "frequency_penalty": 0.5}
    whole = ai.completions.create(**body, extra_body={"return_token_ids": True})
    ids: list[int] = whole.choices[0].token_ids  # type: ignore[attr-defined]
    for cut in (1, 11, len(ids)):
        rest = ai.completions.create(
            **body, extra_body={"output_token_ids": ids[:cut], "return_token_ids": True}
        )
        assert rest.choices[0].token_ids == ids[cut:]  # type: ignore[attr-defined]
        assert rest.choices[0].finish_reason == whole.choices[0].finish_reason
        assert rest.usage is not None
        assert rest.usage.completion_tokens == len(ids)


def test_errors_have_their_types(ai: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        ai.chat.completions.create(model="gpt-5", messages=HELLO)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as tools:
        ai.chat.completions.create(
            model=MODEL,
            messages=HELLO,
            tools=[{"type": "function", "function": {"name": "f"}}],
        )
    assert (tools.value.code, tools.value.param) == ("unsupported_parameter", "tools")
    with pytest.raises(openai.BadRequestError) as too_long:
        ai.completions.create(model=MODEL, prompt="hello " * 200_000)
    assert too_long.value.code == "context_length_exceeded"
    # A stream that is refused is refused with a true status.
    with pytest.raises(openai.BadRequestError):
        ai.completions.create(model=MODEL, prompt="a", max_tokens=10**6, stream=True)


def test_raw_headers(ai: openai.OpenAI) -> None:
    raw = ai.completions.with_raw_response.create(
        model=MODEL, prompt="a", max_tokens=1, extra_headers={"X-Request-Id": "mine-1"}
    )
    assert raw.headers["x-request-id"] == "mine-1"
    assert raw.parse().choices


def test_keys_and_a_full_queue(start_server: StartServer) -> None:
    server = start_server("--api-key", "secret", "--max-num-seqs", "1", "--max-waiting", "1")
    base = f"{server.url}/v1"
    with (
        openai.OpenAI(base_url=base, api_key="wrong", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError) as refused,
    ):
        stranger.models.list()
    assert refused.value.code == "invalid_api_key"
    with openai.OpenAI(base_url=base, api_key="secret", max_retries=0) as ai:
        with pytest.raises(openai.RateLimitError) as full:
            ai.completions.create(
                model=MODEL, prompt="a", n=8, max_tokens=200, extra_body={"ignore_eos": True}
            )
        assert full.value.code == "queue_full"
        assert int(full.value.response.headers["retry-after"]) >= 1
        # The other seven were cancelled with it: there is room again.
        assert ai.completions.create(model=MODEL, prompt="a", max_tokens=2).choices
