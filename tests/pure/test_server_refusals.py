"""What is refused, in OpenAI's shape, naming the field; and nothing reaches the router."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from server_fakes import MAX_MODEL_LEN, FakeRouter, ask, client

from shoal.core.request import ErrorInfo

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def router() -> FakeRouter:
    return FakeRouter()


@pytest.fixture(scope="module")
def http(router: FakeRouter) -> Iterator[httpx.Client]:
    with client(router) as http:
        yield http


@pytest.mark.parametrize(
    ("body", "param"),
    [({"x\ud800": 1}, r"x\ud800"), ({"messages": [{"\ud800": 1}]}, r"\ud800")],
)
def test_a_field_that_no_utf8_can_spell(
    body: dict[str, Any], param: str, http: httpx.Client
) -> None:
    text = json.dumps({"messages": HELLO, **body}).encode()
    response = http.post(
        "/v1/chat/completions", content=text, headers={"Content-Type": "application/json"}
    )
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def schema_format(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


CHAT: list[tuple[dict[str, Any], str, str]] = [
    ({"tools": [{"type": "function"}]}, "unsupported_parameter", "tools"),
    ({"tool_choice": "required"}, "unsupported_parameter", "tool_choice"),
    ({"functions": [{}]}, "unsupported_parameter", "functions"),
    ({"audio": {}}, "unsupported_parameter", "audio"),
    ({"modalities": ["text", "audio"]}, "unsupported_parameter", "modalities"),
    ({"web_search_options": {}}, "unsupported_parameter", "web_search_options"),
    ({"prediction": {}}, "unsupported_parameter", "prediction"),
    ({"reasoning_effort": "high"}, "unsupported_parameter", "reasoning_effort"),
    ({"service_tier": "flex"}, "unsupported_parameter", "service_tier"),
    ({"store": True}, "unsupported_parameter", "store"),
    ({"guided_json": {}}, "unsupported_parameter", "guided_json"),
    ({"temprature": 1}, "unknown_parameter", "temprature"),
    ({"stream_options": {"x": 1}, "stream": True}, "unknown_parameter", "x"),
    ({"stream_options": {"include_usage": True}}, "invalid_value", "stream_options"),
    ({"messages": []}, "invalid_value", "messages"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "invalid_value", "messages[0].role"),
    ({"messages": [{"role": "user", "content": 5}]}, "invalid_value", "messages[0].content"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "text": ""}]}]},
        "invalid_value",
        "messages[0].content[0].type",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "unsupported_parameter",
        "image_url",
    ),
    (
        {"messages": [{"role": "assistant", "tool_calls": [1]}]},
        "unsupported_parameter",
        "tool_calls",
    ),
    ({"top_logprobs": 2}, "invalid_value", "top_logprobs"),
    ({"top_logprobs": 21, "logprobs": True}, "invalid_value", "top_logprobs"),
    ({"max_tokens": 1, "max_completion_tokens": 1}, "invalid_value", "max_tokens"),
    ({"max_tokens": MAX_MODEL_LEN}, "context_length_exceeded", "max_tokens"),
    (
        {"max_completion_tokens": MAX_MODEL_LEN},
        "context_length_exceeded",
        "max_completion_tokens",
    ),
    (
        {"messages": [{"role": "user", "content": "x" * 2 * MAX_MODEL_LEN}]},
        "context_length_exceeded",
        "messages",
    ),
    ({"response_format": {"type": "xml"}}, "invalid_value", "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "missing_field", "response_format.json_schema"),
    (
        {"response_format": schema_format({"a": "x" * 70_000})},
        "invalid_json_schema",
        "response_format",
    ),
    (
        {"continue_final_message": True, "add_generation_prompt": True},
        "invalid_messages",
        "continue_final_message",
    ),
    ({"model": "gpt-5"}, "model_not_found", "model"),
]

COMPLETION: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": ""}, "empty_prompt", "prompt"),
    ({"prompt": []}, "empty_prompt", "prompt"),
    ({"prompt": [[]]}, "empty_prompt", "prompt"),
    ({"prompt": ["a", 5]}, "invalid_value", "prompt[1]"),
    ({"prompt": [1, "a"]}, "invalid_value", "prompt[1]"),
    ({"prompt": [262]}, "invalid_token_id", "prompt"),
    ({"prompt": [-1]}, "invalid_token_id", "prompt"),
    ({"prompt": [2**70]}, "invalid_token_id", "prompt"),
    ({"prompt": [1] * MAX_MODEL_LEN}, "context_length_exceeded", "prompt"),
    ({"prompt": "x" * 1_000_000}, "context_length_exceeded", "prompt"),
    ({"prompt": ["a"] * 129}, "too_many_completions", "prompt"),
    ({"n": 10_000}, "too_many_completions", "n"),
    ({"n": 0}, "invalid_value", "n"),
    ({"n": "2"}, "invalid_value", "n"),
    ({"best_of": 2}, "unsupported_parameter", "best_of"),
    ({"suffix": "x"}, "unsupported_parameter", "suffix"),
    ({"max_tokens": 0}, "invalid_value", "max_tokens"),
    ({"max_tokens": 10**9}, "context_length_exceeded", "max_tokens"),
    ({"temperature": -1}, "invalid_value", "temperature"),
    ({"top_p": 0}, "invalid_value", "top_p"),
    ({"top_k": -2}, "invalid_value", "top_k"),
    ({"seed": 2**64}, "invalid_value", "seed"),
    ({"logprobs": 21}, "invalid_value", "logprobs"),
    ({"min_tokens": 17}, "invalid_value", "min_tokens"),
    ({"stop": ["x"] * 17}, "invalid_value", "stop"),
    ({"stop": "x" * 257}, "invalid_value", "stop"),
    ({"stop": [""]}, "invalid_value", "stop[0]"),
    ({"stop_token_ids": [999]}, "invalid_token_id", "stop_token_ids"),
    ({"logit_bias": {"x": 1}}, "invalid_value", "logit_bias"),
    ({"logit_bias": {"1": 101}}, "invalid_value", "logit_bias"),
    ({"logit_bias": {"262": 1}}, "invalid_token_id", "logit_bias"),
    ({"logit_bias": {str(i): 1 for i in range(1025)}}, "invalid_value", "logit_bias"),
    ({"output_token_ids": [1], "n": 2}, "invalid_value", "output_token_ids"),
    ({"output_token_ids": [999]}, "invalid_token_id", "output_token_ids"),
    (
        {"output_token_ids": [1], "continuation": "another"},
        "other_continuation",
        "continuation",
    ),
    ({"prompt_logprobs": 1, "stream": True}, "invalid_value", "prompt_logprobs"),
    ({"priority": 2**31}, "invalid_value", "priority"),
    # 450 tokens x 128 x 20 are more than a million entries.
    (
        {"prompt": [1] * 450, "n": 128, "prompt_logprobs": 19},
        "too_many_logprobs",
        "prompt_logprobs",
    ),
    ({"prompt": [[1] * 450] * 128, "echo": True, "logprobs": 19}, "too_many_logprobs", "logprobs"),
]

CASES = [("/v1/chat/completions", {"messages": HELLO}, *case) for case in CHAT] + [
    ("/v1/completions", {"prompt": "hello"}, *case) for case in COMPLETION
]


@pytest.mark.parametrize(
    ("path", "valid", "change", "code", "param"),
    CASES,
    ids=[f"{path[4:8]}-{str(change)[:40]}" for path, _, change, _, _ in CASES],
)
def test_refused_by_name(
    http: httpx.Client,
    router: FakeRouter,
    path: str,
    valid: dict[str, Any],
    change: dict[str, Any],
    code: str,
    param: str,
) -> None:
    router.requests.clear()
    response = http.post(path, json={**valid, **change})
    error = response.json()["error"]
    assert (error["code"], error["param"]) == (code, param)
    assert response.status_code == (404 if code == "model_not_found" else 400)
    kind = "not_found_error" if code == "model_not_found" else "invalid_request_error"
    assert error["type"] == kind
    assert error["message"]
    assert router.requests == []


JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    ("content", "headers", "code"),
    [
        ("{bad", JSON, "invalid_json"),
        ("", JSON, "invalid_request"),
        ("null", JSON, "invalid_request"),
        ('{"prompt": "a"}', {"content-type": "text/plain"}, "invalid_request"),
        ("[" * 100_000, JSON, "invalid_request"),
        ("[]", JSON, "invalid_value"),
        ('{"prompt": "\\ud800"}', JSON, "invalid_unicode"),
        ('{"prompt": "a", "temperature": NaN}', JSON, "invalid_value"),
        ("{" + ",".join(f'"a{i}":1' for i in range(100_000)) + "}", JSON, "unknown_parameter"),
        ('{"prompt": [' + ",".join(["null"] * 1_000_000) + "]}", JSON, "invalid_value"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_bodies_that_are_not_requests(
    http: httpx.Client, content: str, headers: dict[str, str], code: str
) -> None:
    response = http.post("/v1/completions", content=content, headers=headers)
    assert (response.status_code, response.json()["error"]["code"]) == (400, code)
    assert len(response.text) < 1000


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/v1/completions", 405), ("POST", "/nowhere", 404)]
)
def test_wrong_doors_answer_in_the_same_shape(
    http: httpx.Client, method: str, path: str, status: int
) -> None:
    response = http.request(method, path)
    assert response.status_code == status
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("status", "retry_after_s", "kind", "retry_after"),
    [
        (429, 1.2, "rate_limit_error", "2"),
        (503, 5.0, "server_error", "5"),
        (504, None, "server_error", None),
        (400, None, "invalid_request_error", None),
    ],
)
def test_the_routers_refusals_are_true_statuses(
    stream: bool, status: int, retry_after_s: float | None, kind: str, retry_after: str | None
) -> None:
    """Also of a stream: no headers go out before the first token."""
    refusal = ErrorInfo(
        status=status, code="why", message="because", param="field", retry_after_s=retry_after_s
    )
    router = FakeRouter(refusal=refusal)
    response = ask(router, "POST", "/v1/completions", {"prompt": ["a", "b"], "stream": stream})
    assert response.status_code == refusal.status
    assert response.headers.get("retry-after") == retry_after
    assert response.json()["error"] == {
        "message": refusal.message,
        "type": kind,
        "param": refusal.param,
        "code": refusal.code,
    }
    assert router.num_running == 0


def test_without_a_replica() -> None:
    router = FakeRouter(info=None, ready=False)
    response = ask(router, "POST", "/v1/completions", {"prompt": "a"})
    assert response.status_code == 503
    assert response.headers["retry-after"] == "5"
    assert ask(router, "GET", "/v1/models").json()["data"][0]["max_model_len"] is None
