"""Whole answers of upstreams: sought elsewhere when late, counted, and told of rightly."""

from __future__ import annotations

import asyncio

import pytest
from test_upstreams import in_loop, saying
from upstream_fakes import CHAT, Asked, FakeUpstream, Front, chat, fronting, listening, until, whole

NUM_KNOWN = 16
"""Answers from which on it is known how they come."""


async def _samples(front: Front) -> dict[str, float]:
    lines = (await front.http.get("/metrics")).text.splitlines()
    pairs = (line.rpartition(" ") for line in lines if not line.startswith("#"))
    return {name: float(value) for name, _, value in pairs}


@in_loop
async def test_a_late_answer_is_asked_of_another_and_the_first_one_is_left() -> None:
    one, other = FakeUpstream(), FakeUpstream()
    gone = asyncio.Event()

    async def hang(asked: Asked, writer: asyncio.StreamWriter) -> None:
        # Whoever hears this one first keeps it.
        slow = one if asked in one.asked else other
        slow.script = None
        (one if slow is other else other).script = None
        await slow.readers[-1].read()
        gone.set()

    async with listening(one, other), fronting(one.url, other.url, hedging=True) as front:
        for _ in range(NUM_KNOWN):
            assert (await front.http.post(CHAT, json=chat())).status_code == 200
        num_asked = len(one.asked) + len(other.asked)
        one.script = other.script = hang
        answer = await front.http.post(CHAT, json=chat())
        assert answer.json()["usage"]["completion_tokens"] == 2
        assert len(one.asked) + len(other.asked) == num_asked + 2
        await asyncio.wait_for(gone.wait(), 30)
        samples = await _samples(front)
        assert (samples["shoal_hedge_made_total"], samples["shoal_hedge_won_total"]) == (1, 1)
        assert samples["shoal_hedge_doubts_total"] == 0
        await until(lambda: not any(each.num_requests for each in front.router.replicas().values()))


@in_loop
async def test_tokens_of_whole_answers_are_counted_and_mistakes_are_no_answers() -> None:
    upstream = FakeUpstream()
    async with listening(upstream), fronting(upstream.url) as front:
        for _ in range(3):
            await front.http.post(CHAT, json=chat())
        upstream.script = saying(whole(404, {"error": {"message": "no"}}))
        await front.http.post(CHAT, json=chat())
        samples = await _samples(front)
    assert samples["shoal_request_generation_tokens_sum"] == 3 * 2
    assert samples["shoal_request_generation_tokens_count"] == 4
    assert samples['shoal_requests_finished_total{finished_reason="stop"}'] == 3
    assert samples['shoal_requests_finished_total{finished_reason="upstream_404"}'] == 1
    assert samples["shoal_e2e_request_latency_seconds_count"] == 3
    # Nobody knows when their tokens were made.
    assert samples["shoal_time_to_first_token_seconds_count"] == 0
    assert samples["shoal_request_time_per_output_token_seconds_count"] == 0


@pytest.mark.parametrize(
    ("said", "complaint"),
    [
        (b"", "closed the connection"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n{", "closed the connection"),
        (b"what is that?\r\n\r\n", "answered with what is not HTTP: "),
        (b"HTTP/1.1 200 OK\r\n" + b"x: " + b"y" * 70_000, "answered with more than 65536 bytes of"),
        (
            b"HTTP/1.1 101 X\r\nupgrade: h2c\r\nconnection: upgrade\r\n\r\n",
            "switched protocols in its response",
        ),
    ],
)
@in_loop
async def test_what_an_upstream_did_reads_as_a_sentence(said: bytes, complaint: str) -> None:
    upstream = FakeUpstream(script=saying(said, closes=True))
    async with listening(upstream), fronting(upstream.url) as front:
        answer = await front.http.post(CHAT, json=chat())
    assert answer.status_code == 502
    name = upstream.url.removeprefix("http://")
    assert answer.json()["error"]["message"].startswith(f"the upstream {name} {complaint}")


DEEP = b"[" * 100_000 + b"]" * 100_000


@pytest.mark.parametrize(
    "body",
    [
        b'{"messages": ' + DEEP + b"}",
        b'{"messages": [], "max_tokens": ' + b"9" * 5000 + b"}",
        b'{"messages": [], "max_tokens": 1e400}',
        b'{"messages": [], "seed": ' + DEEP + b"}",
        b'{"messages": "\xff"}',
    ],
)
@in_loop
async def test_what_cannot_be_read_is_the_clients_mistake(body: bytes) -> None:
    upstream = FakeUpstream()
    async with listening(upstream), fronting(upstream.url) as front:
        answer = await front.http.post(CHAT, content=body)
        assert answer.status_code == 400
        assert answer.json()["error"]["type"] == "invalid_request_error"
        assert not upstream.asked


@in_loop
async def test_a_name_that_nobody_serves_is_not_repeated_at_length() -> None:
    upstream = FakeUpstream()
    async with listening(upstream), fronting(upstream.url) as front:
        answer = await front.http.post(CHAT, json=chat(model="m" * 100_000))
    assert answer.status_code == 404
    assert len(answer.content) < 1000


@pytest.mark.parametrize(
    ("answer", "is_good"),
    [
        ({"error": {"message": "out of memory", "code": 500}}, False),
        ({"object": "error", "error": "no"}, False),
        (b'{"choices": ' + DEEP + b"}", False),
        ({"error": None, "choices": [], "usage": None}, True),
        ({"choices": [], "usage": {"completion_tokens": "many"}}, True),
        ({"choices": [], "usage": {"completion_tokens": 10**30}}, True),
    ],
)
@in_loop
async def test_an_answer_that_is_an_error_is_none(answer: object, is_good: bool) -> None:
    upstream = FakeUpstream(script=saying(whole(200, answer)))
    async with listening(upstream), fronting(upstream.url) as front:
        found = await front.http.post(CHAT, json=chat())
    assert found.status_code == (200 if is_good else 502)
    assert is_good or found.json()["error"]["code"] == "upstream_failed"
