"""What an upstream refuses: the client's to read, unless another one answers, or it has begun."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from test_upstream_answers import NUM_KNOWN
from test_upstreams import in_loop, saying
from upstream_fakes import (
    CHAT,
    STREAM_HEAD,
    Asked,
    FakeUpstream,
    chat,
    chunked,
    event,
    events_of,
    fronting,
    listening,
    text_of,
    until,
    whole,
)

from shoal.core.request import ErrorInfo, SamplingParams
from shoal.router.upstream.address import parse_address
from shoal.router.upstream.attempts import Attempt, UpstreamLimits
from shoal.router.upstream.checks import CheckError, generates
from shoal.router.upstream.connection import Pool
from shoal.router.upstream.records import Call, ProxiedOutput, ProxiedRequest

COMPLAINT = {"error": {"message": "too long", "code": 400}}


class Told:
    """Hears of one attempt."""

    def __init__(self) -> None:
        self.outputs: list[ProxiedOutput] = []
        self.errors: list[ErrorInfo] = []
        self.num_settled = 0

    def said(self, output: ProxiedOutput) -> None:
        self.outputs.append(output)

    def again(self, attempt: Attempt) -> None:
        raise AssertionError("no connection was idle")

    def failed(self, attempt: Attempt, error: ErrorInfo) -> None:
        self.errors.append(error)

    def held(self, attempt: Attempt, *, is_held: bool) -> None:
        raise AssertionError("nobody is slow")

    def settled(self, attempt: Attempt) -> None:
        self.num_settled += 1


def attempt_at(
    told: Told, limits: UpstreamLimits | None = None, *, ids: tuple[int, ...] = (), **call: Any
) -> Attempt:
    given = {"path": CHAT, "fields": {}, "model": "m", "is_stream": True, "may_continue": True}
    request = ProxiedRequest(
        request_id="r",
        prompt_ids=(1,),
        sampling=SamplingParams(seed=1),
        output_ids=ids,
        call=Call(**{**given, **call}),
    )
    limits = limits or UpstreamLimits()
    return Attempt(request, told, limits, name="theirs", model="m", continuation="same")


def answer(attempt: Attempt, status: int, body: bytes, kind: bytes = b"application/json") -> None:
    attempt.head(status, {b"content-type": kind})
    attempt.body(body)
    attempt.flush()
    attempt.over()


def refuse(attempt: Attempt) -> None:
    answer(attempt, 400, json.dumps(COMPLAINT).encode())


def refuse_in_a_stream(attempt: Attempt) -> None:
    data = b"data: " + json.dumps(COMPLAINT).encode() + b"\n\ndata: [DONE]\n\n"
    answer(attempt, 200, data, b"text/event-stream")


@pytest.mark.parametrize("refuses", [refuse, refuse_in_a_stream])
@in_loop
async def test_a_refusal_is_an_error_in_the_upstreams_own_words(
    refuses: Callable[[Attempt], None],
) -> None:
    told = Told()
    refuses(attempt_at(told))
    (output,) = told.outputs
    assert (output.finish, output.status, output.is_refusal) == ("error", 400, True)
    assert output.error is not None
    assert output.error.status == 400
    assert json.loads(output.data) == COMPLAINT
    assert (told.errors, told.num_settled) == ([], 1)


@pytest.mark.parametrize("refuses", [refuse, refuse_in_a_stream])
@in_loop
async def test_who_refuses_what_has_begun_has_failed_at_it(
    refuses: Callable[[Attempt], None],
) -> None:
    told = Told()
    refuses(attempt_at(told, ids=(7, 8)))
    assert told.outputs == []
    (error,) = told.errors
    assert error.status == 502


@in_loop
async def test_an_answer_of_another_kind_than_asked_for_is_no_refusal() -> None:
    told = Told()
    answer(attempt_at(told, is_stream=False, may_continue=False), 400, b"")
    assert told.outputs[0].is_refusal, "though it has no words"
    told = Told()
    answer(attempt_at(told, is_stream=False, may_continue=False), 200, b'{"choices":[]}')
    assert not told.outputs[0].is_refusal


@in_loop
async def test_a_response_that_has_begun_has_less_time_than_one_that_has_not() -> None:
    told = Told()
    attempt = attempt_at(told, UpstreamLimits(answer_s=600.0, quiet_s=0.05))
    attempt.head(200, {b"content-type": b"text/event-stream"})
    await until(lambda: told.errors != [], limit_s=10.0)
    assert told.errors[0].code == "upstream_timeout"
    told = Told()
    attempt_at(told, UpstreamLimits(answer_s=600.0, quiet_s=0.01))
    await asyncio.sleep(0.1)
    assert told.errors == [], "nothing has come yet"


@pytest.mark.parametrize("tells_ids", [True, False])
@in_loop
async def test_whose_stream_a_client_has_is_who_said_something_first(tells_ids: bool) -> None:
    """Another attempt may have read its own beginning meanwhile."""
    told = Told()
    one = attempt_at(told, may_continue=tells_ids)
    call = one.request.call
    other = Attempt(
        one.request, told, UpstreamLimits(), name="other", model="m", continuation="same"
    )
    chunk = '{"id":"%s","choices":[{"index":0,"delta":{"content":"%s"},"token_ids":[%s]}]}'
    for attempt, name in ((one, "one"), (other, "other")):
        attempt.head(200, {b"content-type": b"text/event-stream"})
        attempt.body(b"data: %b\n\n" % (chunk % (name, "", "")).encode())
        attempt.flush()
    assert (told.outputs, call.preamble) == ([], None)
    one.body(b"data: %b\n\n" % (chunk % ("one", "Hi", "7")).encode())
    one.flush()
    assert call.may_continue == tells_ids
    assert call.is_of("same") == tells_ids
    assert not call.is_of("other")
    assert call.preamble == (b'data: {"id":"one",' if tells_ids else None)


@pytest.mark.parametrize("stream", [False, True])
@in_loop
async def test_a_second_attempt_that_is_refused_does_not_end_the_first(stream: bool) -> None:
    """Which was only late."""
    one, other = FakeUpstream(), FakeUpstream()
    refused = asyncio.Event()
    good = whole(200, {"id": "good", "choices": []})
    if stream:
        end = event("", finish="stop") + b"data: [DONE]\n\n"
        good = STREAM_HEAD + chunked(event("good")) + chunked(end) + b"0\r\n\r\n"

    async def refuse(asked: Asked, writer: asyncio.StreamWriter) -> None:
        writer.write(whole(400, COMPLAINT))
        await writer.drain()
        refused.set()

    async def be_late(asked: Asked, writer: asyncio.StreamWriter) -> None:
        # Whoever hears this one first keeps it.
        slow = one if asked in one.asked else other
        slow.script, (one if slow is other else other).script = None, refuse
        await refused.wait()
        await asyncio.sleep(0.1)
        writer.write(good)

    async with listening(one, other), fronting(one.url, other.url, hedging=True) as front:
        for _ in range(NUM_KNOWN):
            await front.http.post(CHAT, json=chat(stream=stream))
        one.script = other.script = be_late
        found = await front.http.post(CHAT, json=chat(stream=stream))
        assert refused.is_set()
        assert found.status_code == 200
        said = text_of(events_of(found.text)) if stream else found.json()["id"]
        assert said == "good"


@in_loop
async def test_when_all_refuse_the_client_reads_why() -> None:
    upstreams = [FakeUpstream(script=saying(whole(400, COMPLAINT))) for _ in range(2)]
    async with listening(*upstreams), fronting(*(each.url for each in upstreams)) as front:
        for stream in (False, True):
            found = await front.http.post(CHAT, json=chat(stream=stream))
            assert (found.status_code, found.json()) == (400, COMPLAINT)
        metrics = (await front.http.get("/metrics")).text
        assert 'shoal_requests_finished_total{finished_reason="upstream_400"} 2.0' in metrics


@pytest.mark.parametrize("said", [{"error": {"message": "no weights"}}, b"<html>", b""])
@in_loop
async def test_who_answers_a_check_with_an_error_generates_nothing(said: object) -> None:
    upstream = FakeUpstream(check=said)
    async with listening(upstream):
        address = parse_address(upstream.url)
        pool = Pool(address)
        with pytest.raises(CheckError, match="was answered with"):
            await generates(address, pool, "theirs", [CHAT], 5.0)
        upstream.check = {"error": None, "choices": [], "usage": None}
        assert await generates(address, pool, "theirs", [CHAT], 5.0) == CHAT
        pool.close()


@in_loop
async def test_an_answer_of_several_prompts_is_passed_on_when_the_first_one_ends() -> None:
    def choice(index: int, text: str, finish: str | None = None) -> bytes:
        choices = [{"index": index, "text": text, "finish_reason": finish}]
        return b"data: " + json.dumps({"model": "theirs", "choices": choices}).encode() + b"\n\n"

    go_on = asyncio.Event()

    async def two(asked: Asked, writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM_HEAD + chunked(choice(0, "a", "stop") + choice(1, "b")))
        await writer.drain()
        await go_on.wait()
        writer.write(chunked(choice(1, "c", "stop") + b"data: [DONE]\n\n") + b"0\r\n\r\n")

    upstream = FakeUpstream(script=two)
    body = {"prompt": ["x", "y"], "stream": True}
    async with (
        listening(upstream),
        fronting(upstream.url) as front,
        front.http.stream("POST", "/v1/completions", json=body) as response,
    ):
        said = ""
        async for text in response.aiter_text():
            said += text
            if '"b"' in said:
                go_on.set()
    assert [json.loads(each)["choices"][0]["text"] for each in events_of(said)[:-1]] == [*"abc"]
