"""/v1/chat/completions over a scripted router."""

from __future__ import annotations

import json
from typing import Any

import pytest
from server_fakes import MAX_MODEL_LEN, FakeRouter, tiny_tokenizer
from test_server_completions import complete, events

PATH = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello"}]


def prompt_of(router: FakeRouter) -> str:
    [request] = router.requests
    return tiny_tokenizer().decode(request.prompt_ids, skip_special_tokens=False)


def test_messages_go_through_the_template() -> None:
    router = FakeRouter()
    answer = complete(
        router,
        PATH,
        messages=[
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "a"}]},
            {"role": "assistant", "content": "b", "refusal": None, "tool_calls": None},
            {"role": "user", "content": "c"},
        ],
    )
    assert prompt_of(router) == (
        "<s>system: be brief</s><s>user: a</s><s>assistant: b</s><s>user: c</s><s>assistant: "
    )
    [choice] = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Hi there", "refusal": None}
    assert choice["finish_reason"] == "stop"
    assert answer["object"] == "chat.completion"


def test_the_final_message_can_be_continued() -> None:
    router = FakeRouter()
    messages = [*HELLO, {"role": "assistant", "content": "Well"}]
    complete(router, PATH, messages=messages, continue_final_message=True)
    assert prompt_of(router) == "<s>user: hello</s><s>assistant: Well"


def test_an_answer_may_fill_the_context() -> None:
    router = FakeRouter()
    complete(router, PATH, messages=HELLO)
    [request] = router.requests
    assert request.sampling.max_tokens == MAX_MODEL_LEN - len(request.prompt_ids)


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_either_name_bounds_the_answer(name: str) -> None:
    [choice] = complete(FakeRouter(), PATH, messages=HELLO, **{name: 2})["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("Hi", "length")


def test_logprobs() -> None:
    [choice] = complete(
        FakeRouter(answer=(0xC3, 0xA9)),
        PATH,
        messages=HELLO,
        logprobs=True,
        top_logprobs=1,
        max_tokens=1,
    )["choices"]
    assert choice["logprobs"] == {
        "content": [
            {
                "token": "bytes:\\xc3",
                "logprob": -1.5,
                "bytes": [0xC3],
                "top_logprobs": [{"token": "bytes:\\xc4", "logprob": -0.25, "bytes": [0xC4]}],
            }
        ],
        "refusal": None,
    }


def test_every_choice_of_a_stream_begins_with_its_role() -> None:
    stream = events(FakeRouter(), PATH, messages=HELLO, n=3, return_token_ids=True)
    assert all(event["object"] == "chat.completion.chunk" for event in stream)
    assert [event.get("prompt_token_ids") is not None for event in stream[:2]] == [True, False]
    for index in range(3):
        parts = [c for event in stream for c in event["choices"] if c["index"] == index]
        assert [part["delta"].get("role") for part in parts[:2]] == ["assistant", None]
        assert "".join(part["delta"]["content"] for part in parts) == "Hi there"
        assert [part["finish_reason"] for part in parts].count("stop") == 1
    # Interleaved as they come, not one after the other.
    assert {event["choices"][0]["index"] for event in stream[:3]} == {0, 1, 2}
    assert "usage" not in stream[0]


def test_formats_become_grammars() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    router = FakeRouter()
    for response_format in (
        {"type": "text"},
        {"type": "json_object"},
        {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}},
    ):
        complete(router, PATH, messages=HELLO, response_format=response_format)
    plain, free, strict = (request.sampling.grammar for request in router.requests)
    assert plain is None
    assert free is not None
    assert free.kind == "json_object"
    assert strict is not None
    assert (strict.kind, json.loads(strict.schema)) == ("json_schema", schema)


@pytest.mark.parametrize(
    "quiet",
    [
        {"tools": []},
        {"tool_choice": "none"},
        {"store": False},
        {"service_tier": "auto"},
        {"modalities": ["text"]},
        {"parallel_tool_calls": True},
        {"logit_bias": None, "stop": None, "audio": None, "functions": None},
        {"user": "me", "metadata": {"a": "b"}, "safety_identifier": "c", "prompt_cache_key": "d"},
    ],
    ids=str,
)
def test_what_asks_for_nothing_is_let_through(quiet: dict[str, Any]) -> None:
    assert complete(FakeRouter(), PATH, messages=HELLO, **quiet)["choices"]


def test_null_is_not_set_whatever_the_field() -> None:
    router = FakeRouter()
    unset = dict.fromkeys(
        ("priority", "continue_final_message", "temperature", "stop", "seed", "tools", "user")
    )
    complete(router, PATH, messages=[{**HELLO[0], "name": None}], **unset)
    [request] = router.requests
    assert (request.priority, request.sampling.temperature) == (0, 1.0)
    assert prompt_of(router).endswith("<s>assistant: ")
