"""The short way of a token (server/express.py) says what the long way says, and holds as much."""

from __future__ import annotations

import json
import random
import re
import time
from typing import Any

import httpx
import pytest
from server_fakes import FakeRouter, ask, client, make_app, running, wait_until
from test_server_streams import LOST, data, send

SPLIT = tuple('Grüße, 漢字 🙂 "quotes" \\ and\n\ttabs \x00'.encode())
"""A token per byte, so that characters come in pieces."""
LONG_NAME = "m" * 20_000
"""It stands in every chunk: a few hundred fill the sockets."""


def plain(text: str) -> list[str]:
    """The events of a stream, but for the id that is new each time."""
    return [re.sub(r'"id":"[^"]*"', '"id":""', event) for event in data(text)]


def body_of(path: str, **fields: Any) -> dict[str, Any]:
    prompt: dict[str, Any] = {"prompt": "a"}
    if "chat" in path:
        prompt = {"messages": [{"role": "user", "content": "a"}]}
    return {**prompt, "stream": True, "max_tokens": 100, **fields}


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("usage", [False, True])
@pytest.mark.parametrize("stops", [False, True])
def test_both_ways_say_the_same(path: str, usage: bool, stops: bool) -> None:
    body = body_of(path, max_tokens=100 if stops else len(SPLIT) - 3)
    if usage:
        body["stream_options"] = {"include_usage": True}
    router = FakeRouter(answer=SPLIT)
    with client(router) as http:
        short = http.post(path, json=body).text
    # Without a socket there is no short way.
    bare = FakeRouter(answer=SPLIT)
    long = ask(bare, "POST", path, body).text
    assert plain(short) == plain(long)
    assert router.num_taken > len(SPLIT) - 6
    assert bare.num_taken == 0
    if usage:
        told = json.loads(data(short)[-2])["usage"]
        assert told["completion_tokens"] == len(SPLIT) + 1 if stops else body["max_tokens"]


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 2},
        {"stop": "zz"},
        {"logprobs": 1},
        {"return_token_ids": True},
        {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_what_tells_more_than_text_goes_the_long_way(fields: dict[str, Any]) -> None:
    router = FakeRouter()
    with client(router) as http:
        text = http.post("/v1/completions", json=body_of("/v1/completions", **fields)).text
    assert data(text)[-1] == "[DONE]"
    assert router.num_taken == 0


def test_metrics_count_both_ways_alike() -> None:
    router = FakeRouter(answer=SPLIT)
    with running(make_app(router)) as url:
        httpx.post(f"{url}/v1/completions", json=body_of("/v1/completions"))
        text = httpx.get(f"{url}/metrics").text
    num_tokens = len(SPLIT) + 1
    assert router.num_taken
    assert f"shoal_inter_token_latency_seconds_count {num_tokens - 1}.0" in text
    assert f"shoal_request_generation_tokens_sum {num_tokens}.0" in text


def test_an_error_behind_the_short_way_is_the_last_event() -> None:
    router = FakeRouter(answer=SPLIT, failure=LOST, failure_at=20)
    with client(router) as http:
        *chunks, error, end = data(
            http.post("/v1/completions", json=body_of("/v1/completions")).text
        )
    assert router.num_taken == 19
    assert (json.loads(error)["error"]["code"], end) == ("replica_lost", "[DONE]")
    said = "".join(json.loads(chunk)["choices"][0]["text"] for chunk in chunks)
    # What of a character had come is no text yet.
    assert said == bytes(SPLIT[:20]).decode(errors="ignore")


def test_connections_are_used_again() -> None:
    router = FakeRouter(answer=SPLIT)
    with client(router) as http:
        texts = [
            http.post("/v1/completions", json=body_of("/v1/completions")).text for _ in range(5)
        ]
    assert all(plain(text) == plain(texts[0]) for text in texts)


def slow_body() -> dict[str, Any]:
    return body_of("/v1/completions", max_tokens=480)


def test_a_client_that_stops_reading_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    router = FakeRouter(answer=tuple(b"x" * 480))
    config = {"stall_timeout_s": 0.3, "served_model_names": (LONG_NAME,)}
    with running(make_app(router, **config)) as url:
        sock = send(url, slow_body())
        wait_until(lambda: router.num_taken > 0)
        wait_until(lambda: router.num_running == 0)
        sock.close()
    assert router.left, "it should have been cancelled before its end"
    assert router.num_taken < 480
    assert "took nothing for 0.3 s" in caplog.text


def test_a_client_that_reads_slowly_gets_it_all() -> None:
    rng = random.Random(0)
    answer = tuple(rng.randrange(32, 127) for _ in range(480))
    router = FakeRouter(answer=answer)
    with running(make_app(router, served_model_names=(LONG_NAME,))) as url:
        sock = send(url, slow_body())
        wait_until(lambda: router.num_taken > 0)
        num_taken = -1
        while num_taken != router.num_taken:  # until the sockets are full
            num_taken = router.num_taken
            time.sleep(0.2)
        assert 0 < num_taken < 470
        received = bytearray()
        while not received.endswith(b"0\r\n\r\n"):
            received += sock.recv(1 << 16)
        sock.close()
    assert router.num_taken > num_taken, "the short way opens again"
    said = re.findall(rb'"text":("(?:[^"\\]|\\.)*")', bytes(received))
    assert "".join(map(json.loads, said)) == bytes(answer).decode()
