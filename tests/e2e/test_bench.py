"""`shoal bench` against a small server that streams with known delays and misbehaves on demand."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from typer.testing import CliRunner, Result

from shoal.cli.bench import measure
from shoal.cli.loadgen import LoadConfig, RequestRecord, run_load
from shoal.cli.main import app
from shoal.cli.stream_transport import StreamTransport
from shoal.core.errors import ConfigError
from shoal.core.workload import Arrival, Workload

FIRST_S, GAP_S = 0.05, 0.02


class FakeServer:
    """Counts a word as a token, and one more for BOS; says " x" in pieces of two tokens.

    The number of tokens asked for picks the behaviour: 413 is refused, 500 fails, 404 breaks
    off, 408 sends an error within the stream, 402 says nothing visible, 406 says what is no event
    of OpenAI's, 4 waits for company.
    """

    def __init__(self, *, ignore_eos: bool = True, tokenize: bool = True) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.ignore_eos = ignore_eos
        self.under_way = self.most_under_way = 0
        self.starts_with = 1  # so many must be under way before those of 4 tokens say a word
        routes = [
            Route("/v1/models", self.models),
            Route("/v1/completions", self.generate, methods=["POST"]),
            Route("/v1/chat/completions", self.generate, methods=["POST"]),
        ]
        if tokenize:
            routes.append(Route("/tokenize", self.tokenize, methods=["POST"]))
        self.app = Starlette(routes=routes)

    async def models(self, request: Request) -> Response:
        if request.headers.get("authorization") == "Bearer wrong":
            return JSONResponse({"error": {"message": "bad key"}}, 401)
        return JSONResponse({"data": [{"id": "fake"}]})

    async def tokenize(self, request: Request) -> Response:
        body = await request.json()
        text = body.get("prompt") or body["messages"][0]["content"]
        words = text.split(" ")
        # "people" is two tokens: calibration has to drop it.
        return JSONResponse({"count": 1 + sum(2 if w == "people" else 1 for w in words)})

    async def generate(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        tokens = body["max_tokens"]
        if "ignore_eos" in body and not self.ignore_eos:
            message = "unknown field: ignore_eos"
            return JSONResponse({"error": {"message": message}}, 400)
        if tokens in (413, 500):
            status = 429 if tokens == 413 else 500
            return JSONResponse({"error": {"message": f"status {status}"}}, status)
        return StreamingResponse(self.stream(body, tokens), media_type="text/event-stream")

    async def stream(self, body: dict[str, Any], tokens: int) -> AsyncIterator[str]:
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            chat = "messages" in body

            def event(text: str, finish: str | None = None) -> str:
                choice = {"delta": {"content": text}} if chat else {"text": text}
                choices = [{**choice, "finish_reason": finish}]
                return f"data: {json.dumps({'choices': choices}, ensure_ascii=False)}\n\n"

            while tokens == 4 and self.most_under_way < self.starts_with:
                await asyncio.sleep(0.005)
            yield event("")
            await asyncio.sleep(FIRST_S)
            if tokens == 404:
                yield event(" x")
                return
            if tokens == 408:
                yield 'data: {"error": {"message": "replica died"}}\n\n'
                return
            if tokens == 406:
                yield 'data: {"choices": [null]}\n\n'
            for _ in range(0, 0 if tokens == 402 else tokens, 2):
                yield event(" x\u2028x")
                await asyncio.sleep(GAP_S)
            yield event("", "length")
            usage = {"prompt_tokens": 11, "completion_tokens": tokens}
            yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\n"
            yield "data: [DONE]\n\n"
        finally:
            self.under_way -= 1


class Running:
    def __init__(self, server: FakeServer) -> None:
        self.fake = server
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        config = uvicorn.Config(server.app, log_level="error", timeout_graceful_shutdown=1)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, args=([self.socket],))

    def __enter__(self) -> Running:
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self.thread.join(60)
        self.socket.close()


@pytest.fixture
def running() -> Iterator[Running]:
    with Running(FakeServer()) as server:
        yield server


def workload(*output_tokens: int, gap_s: float = 0.01, prompt_tokens: int = 20) -> Workload:
    return Workload(
        "test",
        tuple(
            Arrival(arrival_s=i * gap_s, prompt_tokens=prompt_tokens, output_tokens=tokens)
            for i, tokens in enumerate(output_tokens)
        ),
    )


def run(url: str, load: Workload, *, slo: dict[str, float] | None = None, **config: Any) -> Any:
    vocab_size = config.pop("vocab_size", None)
    return asyncio.run(
        measure(url, LoadConfig(model="", **config), load, slo=slo or {}, vocab_size=vocab_size)
    )


def test_latencies_are_those_of_the_server(running: Running) -> None:
    report = run(running.url, workload(*[8] * 10), slo={"ttft": 60.0, "tpot": 1e-9})
    assert report["model"] == "fake"
    assert report["requests"]["succeeded"] == 10
    assert report["tokens"] == {"prompt": 110, "output": 80, "counted_by": "usage"}
    ttft, itl = report["latency_s"]["ttft"], report["latency_s"]["itl"]
    # A machine at work on other things is late, but not by the factor of a wrong unit.
    assert FIRST_S <= ttft["p50"] < FIRST_S + 10
    assert 0 < itl["mean"] < GAP_S + 5
    # Four pieces of two tokens: three gaps over seven tokens.
    assert report["latency_s"]["tpot"]["mean"] == pytest.approx(itl["mean"] * 3 / 7, rel=0.01)
    assert report["latency_s"]["e2e"]["p50"] >= FIRST_S + 4 * GAP_S
    assert report["goodput"]["share"] == 0.0
    assert report["duration_s"] >= 0.09
    assert all("sent late" in note for note in report["notes"]), "all else is as it should be"


def test_prompts_are_as_long_as_asked(running: Running) -> None:
    run(running.url, workload(2, 2))
    texts = [body["prompt"] for body in running.fake.bodies[1:]]
    assert [len(text.split(" ")) for text in texts] == [19, 19]  # and BOS
    assert texts[0] != texts[1]
    assert "people" not in " ".join(texts)
    run(running.url, workload(2), vocab_size=5000)
    assert len(running.fake.bodies[-1]["prompt"]) == 20
    run(running.url, workload(2), chat=True)
    assert len(running.fake.bodies[-1]["messages"][0]["content"].split(" ")) == 19


def test_every_kind_of_failure_is_told_apart(running: Running) -> None:
    report = run(running.url, workload(2, 413, 500, 404, 408, 402, 413, 406), slo={"ttft": 60.0})
    assert report["requests"] == {
        "planned": 8,
        "finished": 8,
        "succeeded": 2,
        "refused": 2,
        "failed": 4,
    }
    assert {kind: found["count"] for kind, found in report["errors"].items()} == {
        "refused": 2,
        "http_500": 1,
        "truncated": 1,
        "stream": 2,
    }
    assert report["errors"]["refused"]["example"] == "status 429"
    assert report["errors"]["stream"]["example"] == "replica died"
    assert report["goodput"]["share"] == pytest.approx(2 / 8)


def test_a_request_past_its_deadline_is_a_timeout(running: Running) -> None:
    report = run(running.url, workload(2, 1000), timeout_s=3)  # which takes 10 s
    assert report["errors"]["timeout"]["count"] == 1
    assert report["requests"]["succeeded"] == 1


def test_arrivals_do_not_wait_for_answers_unless_limited(running: Running) -> None:
    running.fake.starts_with = 8
    assert run(running.url, workload(*[4] * 8, gap_s=0.0))["requests"]["succeeded"] == 8
    assert running.fake.most_under_way == 8
    running.fake.most_under_way, running.fake.starts_with = 0, 2
    limited = run(running.url, workload(*[4] * 8, gap_s=0.0), max_concurrency=2)
    assert running.fake.most_under_way == 2
    assert limited["delayed_by_concurrency_limit"] == 6
    assert any("held back 6 requests" in note for note in limited["notes"])
    # Their wait counts: the last of four waves is due as early as the first.
    assert limited["latency_s"]["ttft"]["max"] > 4 * FIRST_S


def test_connections_are_as_many_as_streams_and_used_again(running: Running) -> None:
    async def rounds() -> list[int]:
        transport, found = StreamTransport(), list[int]()
        async with httpx.AsyncClient(transport=transport, base_url=running.url) as client:
            for num_together in (20, 3, 20):
                config, records = LoadConfig(model="fake"), list[RequestRecord]()
                running.fake.most_under_way, running.fake.starts_with = 0, num_together
                load = workload(*[4] * num_together, gap_s=0.0)
                await run_load(client, config, load, lambda *_: "x", records)
                assert [each.error for each in records] == [None] * num_together
                found.append(transport.num_connections)
            # What breaks off leaves a connection that others can go on with.
            broken = list[RequestRecord]()
            await run_load(client, config, workload(404, 404), lambda *_: "x", broken)
            assert {each.error for each in broken} == {"truncated"}
        return [*found, transport.num_connections]

    assert asyncio.run(rounds()) == [20, 20, 20, 20]


def test_without_tokenize_lengths_are_approximate_and_say_so() -> None:
    with Running(FakeServer(tokenize=False)) as server:
        report = run(server.url, workload(2, prompt_tokens=400))
        prompt = server.fake.bodies[-1]["prompt"]
    assert len(prompt) == pytest.approx(1600, rel=0.15)
    assert any("prompt lengths are approximate" in note for note in report["notes"])


def test_a_server_without_ignore_eos_is_told_before_the_load() -> None:
    with Running(FakeServer(ignore_eos=False)) as server:
        with pytest.raises(ConfigError, match="--no-ignore-eos"):
            run(server.url, workload(2))
        assert len(server.fake.bodies) == 1
        assert run(server.url, workload(2), ignore_eos=False)["requests"]["succeeded"] == 1


# ---- the command -----------------------------------------------------------------------------


def shoal_bench(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", *arguments])


def test_command_with_a_trace(running: Running, tmp_path: Path) -> None:
    trace, out = tmp_path / "trace.csv", tmp_path / "report.json"
    rows = "".join(f"{i * 1000},{100 + i},50\n" for i in range(9))
    trace.write_text("timestamp_s,input_tokens,output_tokens\n" + rows)
    flags = ["--workload", str(trace), "--time-scale", "0.00001", "--num-requests", "5"]
    flags += ["--input-tokens", "30", "--output-tokens", "4", "--slo", "ttft=60s", "-o", str(out)]
    result = shoal_bench(running.url + "/v1", *flags)
    assert result.exit_code == 0, result.output
    assert "5 of 5 requests" in " ".join(result.output.split())
    assert "goodput: 100.0%" in result.output
    report = json.loads(out.read_text())
    assert report["tokens"]["output"] == 20
    assert report["duration_s"] < 100  # of 4,000 s


def test_command_with_a_rate_and_json(running: Running) -> None:
    flags = ["--rate", "200", "--num-requests", "6", "--input-tokens", "9", "--output-tokens", "2"]
    result = shoal_bench(running.url, *flags, "--chat", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["requests"]["succeeded"] == 6
    assert set(report["latency_s"]) == {"ttft", "tpot", "itl", "e2e"}


def test_streams_may_be_more_than_the_files_that_are_allowed_at_first(running: Running) -> None:
    """Nobody gets an answer before all of them ask."""
    running.fake.starts_with = 90
    flags = ["--rate", "1000", "--num-requests", "90", "--input-tokens", "9", "--output-tokens"]
    shoal = [sys.executable, "-m", "shoal", "bench", running.url, *flags, "4", "--json"]
    limited = ["sh", "-c", 'ulimit -S -n 64; exec "$0" "$@"', *shoal]
    done = subprocess.run(limited, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["requests"]["succeeded"] == 90


def test_flags_that_make_no_sense_are_explained(running: Running, tmp_path: Path) -> None:
    cases = [
        ([], "exactly one"),
        (["--rate", "1", "--workload", "x"], "exactly one"),
        (["--workload", str(tmp_path / "none")], "cannot read workload"),
        (["--rate", "0"], "rate is 0"),
        (["--rate", "1", "--slo", "fast"], "SLO has 'fast'"),
        (["--rate", "1", "--chat", "--vocab-size", "99"], "drop one"),
        (["--rate", "1", "--api-key", "wrong"], "--api-key"),
    ]
    for flags, message in cases:
        result = shoal_bench(running.url, *flags)
        assert result.exit_code == 1, (flags, result.output)
        assert message in result.output


def test_no_server_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    result = shoal_bench(f"127.0.0.1:{port}", "--rate", "1")
    assert result.exit_code == 1
    assert f"http://127.0.0.1:{port}/v1/models" in "".join(result.output.split())
    assert "Traceback" not in result.output


@pytest.fixture
def sigint() -> Iterator[None]:
    """As in a terminal: shells start background jobs with SIGINT ignored, CI perhaps us."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("sigint")
def test_ctrl_c_reports_what_there_is(running: Running) -> None:
    def interrupt() -> None:
        while len(running.fake.bodies) < 5 or running.fake.under_way:
            time.sleep(0.01)
        time.sleep(1.0)  # for what is on its way
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    # One more is due in an hour.
    late = Arrival(arrival_s=3600.0, prompt_tokens=3, output_tokens=2)
    report = run(running.url, Workload("late", (*workload(2, 2, 2, 2).arrivals, late)))
    thread.join()
    assert report["interrupted"]
    assert report["requests"]["succeeded"] == report["requests"]["finished"] == 4
    assert any("interrupted" in note for note in report["notes"])
