"""`shoal route` before upstreams that play a script: what clients see, whatever upstreams do."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import Callable, Coroutine
from functools import wraps
from typing import Any

import httpx
import pytest
from upstream_fakes import (
    CHAT,
    STREAM_HEAD,
    Asked,
    FakeUpstream,
    Script,
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

from shoal.router.upstream.address import parse_address
from shoal.router.upstream.attempts import UpstreamLimits
from shoal.router.upstream.checks import look
from shoal.router.upstream.connection import MAX_HEAD_BYTES, Pool

SAID = "t0 t1 t2 t3 t4 "


def in_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    @wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        asyncio.run(test(*args, **kwargs))

    return run


def saying(data: bytes, *, closes: bool = False) -> Script:
    async def script(asked: Asked, writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        await writer.drain()
        if closes:
            writer.close()

    return script


def first_bad(bad: bytes, *, closes: bool = True) -> tuple[FakeUpstream, FakeUpstream]:
    return FakeUpstream(script=saying(bad, closes=closes)), FakeUpstream()


async def ask_until_both_were(
    http: httpx.AsyncClient, bad: FakeUpstream, body: dict[str, Any]
) -> list[httpx.Response]:
    """Answers, of which an upstream that is bad was asked for one at least."""
    answers = []
    for _ in range(8):
        answers.append(await http.post(CHAT, json=body))
        if bad.asked:
            break
    assert bad.asked, "the bad one was never asked"
    return answers


@in_loop
async def test_streams_and_whole_answers_come_through() -> None:
    upstream = FakeUpstream()
    async with listening(upstream), fronting(upstream.url, names=(("public", "theirs"),)) as front:
        response = await front.http.post(
            CHAT, json=chat(stream=True, temperature=0.25, odd=[1, {"x": None}])
        )
        *chunks, done = events_of(response.text)
        assert response.headers["content-type"].startswith("text/event-stream")
        assert text_of(chunks) == SAID
        assert done == "[DONE]"
        assert {json.loads(each)["model"] for each in chunks} == {"public"}
        asked = upstream.asked[0]
        assert asked.body == chat(
            stream=True, temperature=0.25, odd=[1, {"x": None}], model="theirs"
        )
        answer = await front.http.post(CHAT, json=chat(model="public"))
        assert answer.json()["model"] == "public"
        assert answer.json()["usage"]["completion_tokens"] == 2
        models = (await front.http.get("/v1/models")).json()
        assert [each["id"] for each in models["data"]] == ["public"]
        assert (await front.http.get("/ready")).status_code == 200
        assert (
            "shoal_time_to_first_token_seconds_count 1.0" in (await front.http.get("/metrics")).text
        )


@in_loop
async def test_of_a_client_only_its_fields_go_on() -> None:
    upstream = FakeUpstream()
    async with (
        listening(upstream),
        fronting(upstream.url, keys={upstream.url: "sk-theirs"}, api_keys=("ours",)) as front,
    ):
        headers = {"Authorization": "Bearer ours", "Cookie": "a=b", "X-Forwarded-For": "1.2.3.4"}
        body = b'{"model":"x","messages":[],"model":"theirs"}'
        answer = await front.http.post(CHAT, content=body, headers=headers)
        assert answer.status_code == 200
        assert (await front.http.post(CHAT, json=chat())).status_code == 401
        sent = upstream.asked[0].headers
        assert sent["authorization"] == "Bearer sk-theirs"
        assert sent.keys() - {""} == {
            *("host", "accept-encoding", "user-agent", "authorization"),
            *("content-type", "content-length"),
        }
        for path in ("/v1/embeddings", "/v1/chat/completions/../x", "/http://x/"):
            answer = await front.http.post(path, json=chat(), headers=headers)
            assert answer.status_code in (404, 405)
        assert len(upstream.asked) == 1


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"[]", 400, "invalid_json"),
        (b"{", 400, "invalid_json"),
        (b"{}", 400, "missing_field"),
        (json.dumps(chat(stream="yes")).encode(), 400, "invalid_value"),
        (json.dumps(chat(n=10**6)).encode(), 400, "invalid_value"),
        (json.dumps(chat(model="other")).encode(), 404, "model_not_found"),
    ],
)
@in_loop
async def test_what_cannot_be_passed_on_is_refused(body: bytes, status: int, code: str) -> None:
    upstream = FakeUpstream()
    async with listening(upstream), fronting(upstream.url) as front:
        answer = await front.http.post(CHAT, content=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
        assert not upstream.asked


GOOD_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
BAD: dict[str, bytes] = {
    "garbage": b"\x00\x01\x02 what\r\n\r\n",
    "500": whole(500, {"error": {"message": "CUDA"}}),
    "429": whole(429, {}, "retry-after: 7"),
    "401": whole(401, {}),
    "redirect": whole(302, b"", "location: http://127.0.0.1:1/"),
    "gzip": whole(200, gzip.compress(b"{}"), "content-encoding: gzip"),
    "no json": whole(200, b"<html>"),
    "head without end": b"HTTP/1.1 200 OK\r\n" + b"x: " + b"y" * (MAX_HEAD_BYTES + 1000),
    "nothing": b"",
    "cut short": b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{",
    "switches": b"HTTP/1.1 101 Switching\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n",
}
BAD_STREAMS: dict[str, bytes] = {
    **{name: answer for name, answer in BAD.items() if name != "no json"},
    "whole in place of stream": whole(200, {"choices": []}),
    "error first": STREAM_HEAD + chunked(b'data: {"error":{"message":"no"}}\n\n'),
    "ends before it begins": STREAM_HEAD + b"0\r\n\r\n",
    "role, then gone": STREAM_HEAD
    + chunked(b'data: {"choices":[{"delta":{"role":"assistant"}}]}\n\n'),
    "half an event": STREAM_HEAD + chunked(event("x")[:30]),
    "one event, endless": STREAM_HEAD + chunked(b"data: " + b"x" * 2**21),
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
@in_loop
async def test_another_upstream_answers_what_one_failed_at(bad: bytes) -> None:
    failing, good = first_bad(bad)
    async with listening(failing, good), fronting(failing.url, good.url) as front:
        for answer in await ask_until_both_were(front.http, failing, chat()):
            assert answer.status_code == 200
            assert answer.json()["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize("bad", BAD_STREAMS.values(), ids=BAD_STREAMS)
@in_loop
async def test_a_stream_that_has_not_begun_is_another_upstreams(bad: bytes) -> None:
    failing, good = first_bad(bad)
    async with listening(failing, good), fronting(failing.url, good.url) as front:
        for answer in await ask_until_both_were(front.http, failing, chat(stream=True)):
            assert answer.status_code == 200
            assert text_of(events_of(answer.text)) == SAID


BREAKS: dict[str, bytes] = {
    "closes": b"",
    "closes in mid-event": chunked(event("never")[:40]),
    "error": chunked(b'data: {"error":{"message":"CUDA"}}\n\n'),
    "no end": b"0\r\n\r\n",
    "not chunks": b"zz\r\n",
}


@pytest.mark.parametrize("rest", BREAKS.values(), ids=BREAKS)
@in_loop
async def test_a_stream_that_breaks_ends_in_an_error_and_in_nothing_else(rest: bytes) -> None:
    async def breaks(asked: Asked, writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM_HEAD + chunked(event("said ")))
        await until(lambda: failing.url.endswith(heard()))
        writer.write(rest)
        await writer.drain()
        writer.close()

    failing, other = FakeUpstream(script=breaks), FakeUpstream()
    async with listening(failing, other), fronting(failing.url, other.url) as front:

        def heard() -> str:
            """Whose tokens came."""
            stats = front.router.stats().items()
            return next((name for name, each in stats if each.output_tokens % 6), "nobody")

        answers = await ask_until_both_were(front.http, failing, chat(stream=True))
        *chunks, error = events_of(answers[-1].text)
        assert text_of(chunks) == "said "
        assert json.loads(error)["error"]["type"] == "server_error"


@in_loop
async def test_a_clients_mistake_is_told_as_the_upstream_tells_it() -> None:
    complaint = {"error": {"message": "temperature is too high", "code": "x"}}
    upstream = FakeUpstream(script=saying(whole(422, complaint)))
    other = FakeUpstream(script=saying(whole(422, complaint)))
    async with listening(upstream, other), fronting(upstream.url, other.url) as front:
        for stream in (False, True):
            answer = await front.http.post(CHAT, json=chat(stream=stream))
            assert (answer.status_code, answer.json()) == (422, complaint)
        assert len(upstream.asked) + len(other.asked) == 2


@in_loop
async def test_when_all_are_busy_the_client_hears_when_to_come_again() -> None:
    busy = [FakeUpstream(script=saying(BAD["429"])) for _ in range(2)]
    async with listening(*busy), fronting(*(each.url for each in busy)) as front:
        answer = await front.http.post(CHAT, json=chat(stream=True))
        assert answer.status_code == 429
        assert answer.headers["retry-after"] == "7"
        assert answer.json()["error"]["code"] == "upstream_busy"
        assert all(each.asked for each in busy)


@in_loop
async def test_an_upstream_that_is_gone_is_left_out_and_comes_back() -> None:
    leaving, staying = FakeUpstream(), FakeUpstream()
    async with listening(staying):
        async with listening(leaving):
            front_of = fronting(leaving.url, staying.url)
            front = await front_of.__aenter__()
        try:
            name = leaving.url.removeprefix("http://")
            for _ in range(4):
                assert (await front.http.post(CHAT, json=chat())).status_code == 200
            async with listening(leaving):
                await until(lambda: front.router.replicas()[name].is_alive)
                leaving.works = False
                num_checks = leaving.num_checks
                leaving.script = saying(b"", closes=True)
                while front.router.replicas()[name].is_alive:
                    assert (await front.http.post(CHAT, json=chat())).status_code == 200
                    await asyncio.sleep(0.01)
                assert leaving.num_checks > num_checks
                leaving.works, leaving.script = True, None
                await until(lambda: front.router.replicas()[name].is_alive)
        finally:
            await front_of.__aexit__(None, None, None)


@in_loop
async def test_a_client_that_hangs_up_is_heard_of_upstream() -> None:
    upstream = FakeUpstream(num_tokens=10_000, delay_s=0.005)
    async with listening(upstream), fronting(upstream.url) as front:
        for _stream in (True, False):
            async with front.http.stream("POST", CHAT, json=chat(stream=True)) as response:
                async for _ in response.aiter_bytes():
                    break
            await until(lambda: front.router.num_in_flight == 0)
        await until(lambda: upstream.num_gone == 2)


@in_loop
async def test_a_reader_that_stops_holds_the_upstream_back() -> None:
    num_sent = 0
    big = event("x" * 50_000)

    async def endless(asked: Asked, writer: asyncio.StreamWriter) -> None:
        nonlocal num_sent
        writer.write(STREAM_HEAD)
        while True:
            writer.write(chunked(big))
            await writer.drain()
            num_sent += 1

    upstream, other = FakeUpstream(script=endless), FakeUpstream(script=endless)
    async with (
        listening(upstream, other),
        fronting(upstream.url, other.url, stall_timeout_s=3.0, hedging=True) as front,
    ):
        host, _, port = front.url.removeprefix("http://").partition(":")
        _reader, writer = await asyncio.open_connection(host, int(port), limit=1024)
        body = json.dumps(chat(stream=True)).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        # Nothing is read: it is dropped at last, with no more sent than buffers hold.
        await until(lambda: front.router.num_in_flight == 1)
        await until(lambda: front.router.num_in_flight == 0)
        assert 0 < num_sent < 1000
        assert len(upstream.asked) + len(other.asked) == 1
        assert front.router.hedges.doubted == 0, "which says nothing of the upstream"
        writer.close()


@in_loop
async def test_silence_ends_an_attempt() -> None:
    upstream = FakeUpstream(num_tokens=1000, delay_s=30.0)
    limits = UpstreamLimits(answer_s=0.2, quiet_s=0.2)
    async with listening(upstream), fronting(upstream.url, limits=limits) as front:
        answer = await front.http.post(CHAT, json=chat(stream=True))
        assert answer.status_code == 504
        assert answer.json()["error"]["code"] == "upstream_timeout"


@in_loop
async def test_connections_are_used_again_and_one_that_was_closed_costs_nothing() -> None:
    num_connections = 0

    async def once(asked: Asked, writer: asyncio.StreamWriter) -> None:
        writer.write(whole(200, {"choices": []}))
        await writer.drain()
        if len(upstream.asked) == 3:
            writer.close()  # without a word

    upstream = FakeUpstream(script=once)
    async with listening(upstream), fronting(upstream.url) as front:
        num_connections = len(upstream.writers)
        for _ in range(6):
            assert (await front.http.post(CHAT, json=chat())).status_code == 200
        assert len(upstream.writers) <= num_connections + 1
        assert len(upstream.asked) == 6


@in_loop
async def test_who_serves_another_model_is_not_let_in() -> None:
    ours, other = FakeUpstream(), FakeUpstream(model="other")
    async with listening(ours, other):
        names: tuple[tuple[str, str], ...] = (("theirs", "theirs"),)
        async with fronting(ours.url, other.url, names=names, num_ready=1) as front:
            for _ in range(4):
                assert (await front.http.post(CHAT, json=chat())).status_code == 200
            assert not other.asked
            views = front.router.replicas()
            assert [each.is_alive for each in views.values()] == [True, False]
        names = (*names, ("theirs", "other"))
        async with fronting(ours.url, other.url, names=names) as front:
            while not other.asked:
                answer = await front.http.post(CHAT, json=chat())
                assert answer.json()["model"] == "theirs"
            assert other.asked[0].body["model"] == "other"


@in_loop
async def test_responses_are_passed_on_if_the_upstream_has_them() -> None:
    created = b'event: response.created\ndata: {"type":"response.created"}\n\n'
    delta = b'event: response.output_text.delta\ndata: {"delta":"Hi"}\n\n'
    completed = b'event: response.completed\ndata: {"response":{}}\n\n'
    stream = STREAM_HEAD + b"".join(map(chunked, (created, delta, completed))) + b"0\r\n\r\n"
    upstream = FakeUpstream(script=saying(stream))
    async with listening(upstream), fronting(upstream.url) as front:
        answer = await front.http.post("/v1/responses", json={"input": "Hi", "stream": True})
        assert answer.content == created + delta + completed
        assert upstream.asked[0].body == {"input": "Hi", "stream": True, "model": "theirs"}


@in_loop
async def test_an_upstream_is_shown_and_drained_like_any_replica() -> None:
    one, other = FakeUpstream(), FakeUpstream()
    async with listening(one, other), fronting(one.url, other.url, api_keys=("k",)) as front:
        front.http.headers["Authorization"] = "Bearer k"
        name = one.url.removeprefix("http://")
        shown = (await front.http.post(f"/admin/replicas/{name}/drain")).json()["replicas"]
        assert shown[name]["drained"]
        for _ in range(4):
            assert (await front.http.post(CHAT, json=chat())).status_code == 200
        assert (len(one.asked), len(other.asked)) == (0, 4)


@in_loop
async def test_a_connection_is_the_next_requests_once_a_stream_is_over() -> None:
    upstream = FakeUpstream(num_tokens=20, delay_s=0.01)
    limits = UpstreamLimits(end_s=0.05)
    async with listening(upstream), fronting(upstream.url, limits=limits) as front:
        num_connections = len(upstream.writers)
        for _ in range(3):
            answer = await front.http.post(CHAT, json=chat(stream=True))
            assert events_of(answer.text)[-1] == "[DONE]"
        assert len(upstream.writers) <= num_connections + 1


@in_loop
async def test_a_checks_connection_is_the_next_requests_too() -> None:
    upstream = FakeUpstream()
    async with listening(upstream):
        address = parse_address(upstream.url)
        pool = Pool(address)
        await look(address, pool, 5.0)
        connection = pool.idle()
        assert connection is not None
        assert connection.is_open
        pool.close()


@in_loop
async def test_who_does_not_end_after_its_end_loses_the_connection() -> None:
    async def endless(asked: Asked, writer: asyncio.StreamWriter) -> None:
        end = event("", finish="stop") + b"data: [DONE]\n\n"
        writer.write(STREAM_HEAD + chunked(event("a") + end))
        await until(lambda: upstream.readers[-1].at_eof())

    upstream = FakeUpstream(script=endless)
    limits = UpstreamLimits(end_s=0.05)
    async with listening(upstream), fronting(upstream.url, limits=limits) as front:
        answer = await front.http.post(CHAT, json=chat(stream=True))
        assert text_of(events_of(answer.text)) == "a"
        await until(lambda: upstream.readers[-1].at_eof())
