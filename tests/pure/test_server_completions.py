"""/v1/completions, /tokenize and /detokenize over a scripted router."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest
from server_fakes import EOS, MAX_MODEL_LEN, FakeRouter, ask, client

from shoal.server.logprobs import with_prompt


def complete(router: FakeRouter, path: str = "/v1/completions", **body: Any) -> dict[str, Any]:
    response = ask(router, "POST", path, body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def events(router: FakeRouter, path: str = "/v1/completions", **body: Any) -> list[dict[str, Any]]:
    """The events of a stream, which must end in [DONE]."""
    response = ask(router, "POST", path, {**body, "stream": True})
    assert response.status_code == 200, response.text
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line[6:]) for line in lines[:-1]]


def test_text_in_text_out() -> None:
    answer = complete(FakeRouter(), prompt="hello")
    [choice] = answer["choices"]
    assert answer["object"] == "text_completion"
    assert answer["model"] == "tiny"
    assert (choice["text"], choice["finish_reason"]) == ("Hi there", "stop")
    # hel·l·o in, eight letters and EOS out.
    assert answer["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 9,
        "total_tokens": 12,
        "prompt_tokens_details": {"cached_tokens": 3},
    }


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [
        ("hello", [(257, 108, 111)]),
        (["he", "o"], [(256,), (111,)]),
        ([1, 2], [(1, 2)]),
        ([[1], [2, 3]], [(1,), (2, 3)]),
    ],
)
def test_prompts_come_as_text_or_ids(prompt: Any, ids: list[tuple[int, ...]]) -> None:
    router = FakeRouter()
    answer = complete(router, prompt=prompt)
    assert [request.prompt_ids for request in router.requests] == ids
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(ids)))
    assert answer["usage"]["prompt_tokens"] == sum(map(len, ids))


def test_every_completion_of_a_prompt_has_its_own_seed() -> None:
    router = FakeRouter()
    answer = complete(router, prompt=["a", "b"], n=2, seed=-1, max_tokens=2)
    seeds = {r.request_id.rpartition("-")[2]: r.sampling.seed for r in router.requests}
    assert seeds == {"0": 2**64 - 1, "1": 0, "2": 2**64 - 1, "3": 0}
    assert [choice["text"] for choice in answer["choices"]] == ["Hi"] * 4
    # A prompt counts once, and so do its cached tokens.
    assert answer["usage"]["prompt_tokens"] == 2
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 6
    assert answer["usage"]["completion_tokens"] == 8


def test_fields_reach_the_engine() -> None:
    router = FakeRouter()
    complete(
        router,
        prompt="a",
        max_tokens=7,
        temperature=0.5,
        top_k=-1,
        top_p=0.9,
        min_p=0.1,
        presence_penalty=1,
        frequency_penalty=-1,
        repetition_penalty=1.5,
        logit_bias={"65": 3.5},
        seed=5,
        stop=["x", "y"],
        stop_token_ids=[66],
        min_tokens=2,
        ignore_eos=True,
        priority=-3,
        cache_salt="mine",
    )
    [request] = router.requests
    params = request.sampling
    assert (request.priority, request.salt) == (-3, "/mine")
    assert (params.n, params.max_tokens, params.min_tokens) == (1, 7, 2)
    assert (params.temperature, params.top_k, params.top_p, params.min_p) == (0.5, 0, 0.9, 0.1)
    assert (params.presence_penalty, params.frequency_penalty) == (1, -1)
    assert (params.repetition_penalty, params.seed, params.ignore_eos) == (1.5, 5, True)
    assert (params.stop, params.stop_token_ids) == (("x", "y"), (66,))
    assert params.logit_bias == ((65, 3.5),)


def test_what_is_left_open_is_as_the_models_config_says() -> None:
    router = FakeRouter()
    for own in ({}, {"temperature": 0, "top_k": -1}):
        body = {"prompt": "a", **own}
        defaults = {"temperature": 0.6, "top_k": 20}
        ask(router, "POST", "/v1/completions", body, default_sampling=defaults)
    chosen = [(r.sampling.temperature, r.sampling.top_k) for r in router.requests]
    assert chosen == [(0.6, 20), (0.0, 0)]


def test_only_a_default_is_cut_to_the_context() -> None:
    router = FakeRouter()
    complete(router, prompt="a")
    complete(router, prompt="a" * (MAX_MODEL_LEN - 5))
    assert [r.sampling.max_tokens for r in router.requests] == [16, 5]


def test_echo_and_logprobs_line_up_with_the_text() -> None:
    [choice] = complete(FakeRouter(), prompt="hello", echo=True, logprobs=3)["choices"]
    logprobs = choice["logprobs"]
    assert choice["text"] == "helloHi there"
    assert logprobs["tokens"] == ["hel", "l", "o", *"Hi there", "</s>"]
    assert logprobs["token_logprobs"] == [None] + [-1.5] * 11
    assert logprobs["top_logprobs"][:2] == [None, {"m": -0.25, "l": -1.5, "\0": -9999.0}]
    for token, offset in zip(logprobs["tokens"][:-1], logprobs["text_offset"], strict=False):
        assert choice["text"][offset:].startswith(token)


@pytest.mark.parametrize("stream", [False, True])
def test_echo_alone_scores_a_prompt(stream: bool) -> None:
    """As evaluation harnesses ask: max_tokens=0 gives the prompt and nothing after it."""
    body = {"prompt": ["hello", "he"], "echo": True, "logprobs": 1, "max_tokens": 0}
    if stream:
        *chunks, last = events(FakeRouter(), **body, stream_options={"include_usage": True})
        choices, usage = [choice for chunk in chunks for choice in chunk["choices"]], last["usage"]
    else:
        answer = complete(FakeRouter(), **body)
        choices, usage = answer["choices"], answer["usage"]
    choices.sort(key=lambda choice: choice["index"])
    assert [choice["text"] for choice in choices] == ["hello", "he"]
    assert [choice["finish_reason"] for choice in choices] == ["length", "length"]
    assert choices[0]["logprobs"]["tokens"] == ["hel", "l", "o"]
    assert choices[0]["logprobs"]["token_logprobs"] == [None, -1.5, -1.5]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (4, 0)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("include_usage", [False, True])
def test_chunks_differ_in_their_text_alone(path: str, include_usage: bool) -> None:
    """They are put together from parts; what JSON must escape is in the text here."""
    text = '"quoted" \\ back\n\tslash \x00\x1f é€😀 \u2028 </s>'
    router = FakeRouter(answer=tuple(text.encode()))
    body: dict[str, Any] = {"max_tokens": 100, "n": 2}
    body |= (
        {"prompt": "a"}
        if path == "/v1/completions"
        else {"messages": [{"role": "user", "content": "a"}]}
    )
    stream = events(router, path, **body, stream_options={"include_usage": include_usage})
    chunks = [event for event in stream if event["choices"]]
    for index in range(2):
        mine = [chunk for chunk in chunks if chunk["choices"][0]["index"] == index]
        middle = [_without_text(chunk) for chunk in mine[1:-1]]
        assert len(middle) > 20
        assert all(chunk == middle[0] for chunk in middle)
        assert middle[0].keys() == mine[0].keys()
        assert middle[0]["choices"][0].keys() <= mine[-1]["choices"][0].keys()
        assert "".join(_text(chunk) for chunk in mine) == text


def _text(chunk: dict[str, Any]) -> str:
    (choice,) = chunk["choices"]
    text: str = choice["delta"].get("content", "") if "delta" in choice else choice["text"]
    return text


def _without_text(chunk: dict[str, Any]) -> dict[str, Any]:
    (choice,) = chunk["choices"]
    name = "delta" if "delta" in choice else "text"
    if name == "delta":
        assert choice["delta"].keys() == {"content"}
    return {**chunk, "choices": [{**choice, name: None}]}


def test_without_echo_offsets_begin_at_the_output() -> None:
    [choice] = complete(FakeRouter(), prompt="hello", logprobs=0, max_tokens=2)["choices"]
    assert choice["logprobs"] == {
        "tokens": ["H", "i"],
        "token_logprobs": [-1.5, -1.5],
        "top_logprobs": [{"H": -1.5}, {"i": -1.5}],
        "text_offset": [0, 1],
    }


def test_token_ids_and_prompt_logprobs_on_request() -> None:
    answer = complete(
        FakeRouter(), prompt=[104, 105], max_tokens=1, return_token_ids=True, prompt_logprobs=1
    )
    [choice] = answer["choices"]
    assert (choice["prompt_token_ids"], choice["token_ids"]) == ([104, 105], [72])
    assert choice["prompt_logprobs"] == [
        None,
        {
            "106": {"logprob": -0.25, "rank": 1, "decoded_token": "j"},
            "105": {"logprob": -1.5, "rank": 2, "decoded_token": "i"},
        },
    ]


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("echo", [False, True])
def test_a_stream_says_what_the_whole_says(n: int, echo: bool) -> None:
    body = {"prompt": ["he", "o"], "n": n, "echo": echo, "logprobs": 1, "return_token_ids": True}
    whole = complete(FakeRouter(), **body)
    stream = events(FakeRouter(), **body, stream_options={"include_usage": True})
    assert stream[-1]["choices"] == []
    assert stream[-1]["usage"] == whole["usage"]
    assert all(event["usage"] is None for event in stream[:-1])
    for want in whole["choices"]:
        parts = [c for event in stream for c in event["choices"] if c["index"] == want["index"]]
        assert "".join(part["text"] for part in parts) == want["text"]
        assert [i for part in parts for i in part["token_ids"]] == want["token_ids"]
        for name, values in want["logprobs"].items():
            assert [v for part in parts for v in part["logprobs"][name]] == values
        assert [part["finish_reason"] for part in parts[:-1]] == [None] * (len(parts) - 1)
        assert parts[-1]["finish_reason"] == want["finish_reason"]


def test_usage_so_far_in_every_chunk() -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    stream = events(FakeRouter(), prompt="a", max_tokens=3, stream_options=options)
    assert [event["usage"]["completion_tokens"] for event in stream] == [1, 2, 3, 3]


def test_a_stop_string_ends_the_text_and_the_request() -> None:
    router = FakeRouter()
    [choice] = complete(router, prompt="a", stop=["zz", "the"])["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("Hi ", "stop")
    assert choice["stop_reason"] == "the"
    assert len(router.left) == 1


def test_half_a_stop_string_is_told_in_the_end() -> None:
    stream = events(FakeRouter(), prompt="a", stop="rex")
    texts = [event["choices"][0]["text"] for event in stream]
    assert "".join(texts) == "Hi there"


def test_a_stop_token_is_named_and_not_shown() -> None:
    router = FakeRouter()
    [choice] = complete(router, prompt="a", stop_token_ids=[EOS])["choices"]
    assert (choice["text"], choice["stop_reason"]) == ("Hi there", EOS)


@pytest.mark.parametrize("cut", range(1, 9))
def test_a_cut_stream_is_continued(cut: int) -> None:
    """Also inside "the", where a stop string is half there."""
    body = {"prompt": "a", "stop": "er", "return_token_ids": True, "logprobs": 0}
    whole = complete(FakeRouter(), **body)
    seen = events(FakeRouter(), **body)[:cut]
    ids = [i for event in seen for i in event["choices"][0]["token_ids"]]
    router = FakeRouter()
    rest = complete(router, **body, output_token_ids=ids)
    [choice], [want] = rest["choices"], whole["choices"]
    text = "".join(event["choices"][0]["text"] for event in seen) + choice["text"]
    assert text == want["text"] == "Hi th"
    assert ids + choice["token_ids"] == want["token_ids"]
    offsets = [o for event in seen for o in event["choices"][0]["logprobs"]["text_offset"]]
    assert offsets + choice["logprobs"]["text_offset"] == want["logprobs"]["text_offset"]
    assert choice["finish_reason"] == want["finish_reason"]
    assert rest["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    # Cut right behind the stop string: there is nothing left to ask the router for.
    assert len(router.requests) == (0 if len(ids) == 7 else 1)


def test_characters_of_several_tokens_come_whole() -> None:
    router = FakeRouter(answer=tuple("aé日".encode()))
    stream = events(router, prompt="a")
    assert [event["choices"][0]["text"] for event in stream] == ["a", "é", "日", ""]


def test_tokenize_and_back() -> None:
    with client(FakeRouter()) as http:
        text = http.post("/tokenize", json={"prompt": "hello", "return_token_strs": True}).json()
        chat = http.post(
            "/tokenize", json={"messages": [{"role": "user", "content": "hello"}]}
        ).json()
        back = http.post("/detokenize", json={"tokens": chat["tokens"]}).json()
        neither = http.post("/tokenize", json={})
    assert text == {
        "count": 3,
        "max_model_len": MAX_MODEL_LEN,
        "tokens": [257, 108, 111],
        "token_strs": ["hel", "l", "o"],
    }
    assert back == {"prompt": "<s>user: hello</s><s>assistant: "}
    assert (neither.status_code, neither.json()["error"]["param"]) == (400, "prompt")


def test_models() -> None:
    with client(FakeRouter()) as http:
        listed = http.get("/v1/models").json()
        alias = http.get("/v1/models/org/alias").json()
        missing = http.get("/v1/models/gpt-5")
    assert [card["id"] for card in listed["data"]] == ["tiny", "org/alias"]
    assert alias["max_model_len"] == MAX_MODEL_LEN
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize("stream", [False, True])
def test_big_bodies_are_encoded_off_the_event_loop(
    stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = []
    monkeypatch.setattr(
        "shoal.server.completions.with_prompt",
        lambda *args: threads.append(threading.current_thread()) or with_prompt(*args),
    )
    prompt = list(range(10, 110))
    response = ask(
        FakeRouter(),
        "POST",
        "/v1/completions",
        {"prompt": prompt, "echo": True, "logprobs": 1, "max_tokens": 1, "stream": stream},
    )
    assert response.status_code == 200
    assert threads != []
    assert threading.main_thread() not in threads
