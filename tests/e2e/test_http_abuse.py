"""Clients that lie, flood and vanish: served or told their 4xx, and nothing is left behind."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import psutil
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from server_process import ServerProcess, StartServer

MODEL = "smollm2-135m"
BODY: dict[str, Any] = {"model": MODEL, "prompt": "Once upon a time", "ignore_eos": True}
MEBIBYTE = 2**20


@pytest.fixture(scope="module")
def abused(start_server: StartServer) -> ServerProcess:
    """A server of its own, so that its memory tells of these tests only.

    The KV cache is small: its pages become resident as they are first used, which is no leak.
    """
    kv_bytes = str(64 * MEBIBYTE)
    return start_server(
        *("--max-waiting", "1024", "--max-model-len", "1024", "--kv-cache-memory-bytes", kv_bytes)
    )


@pytest.fixture
def http(abused: ServerProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=abused.url, timeout=120) as http:
        yield http
        assert http.post("/v1/completions", json={**BODY, "max_tokens": 4}).status_code == 200


def memory_bytes(server: ServerProcess) -> int:
    parent = psutil.Process(server.process.pid)
    return sum(p.memory_info().rss for p in [parent, *parent.children(recursive=True)])


def num_running(http: httpx.Client) -> float:
    names = ("shoal_num_requests_running", "shoal_num_requests_waiting")
    lines = http.get("/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(names))


def wait_idle(http: httpx.Client) -> None:
    end = time.monotonic() + 60
    while num_running(http):
        assert time.monotonic() < end, "requests of clients that are gone still run"
        time.sleep(0.05)


async def _vanish_all(url: str, count: int) -> list[int]:
    """Connects, asks for a long stream, reads a little, and is gone; what was read each time."""
    host, port = url.removeprefix("http://").split(":")
    content = json.dumps({**BODY, "max_tokens": 900, "stream": True}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )

    async def one(index: int) -> int:
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(head.encode() + content)
        events = 0
        # Every third leaves before its first token.
        while events < (index % 3) * 2:
            line = await reader.readline()
            if not line:
                break
            events += line.startswith(b"data: ")
        writer.transport.abort() if index % 2 else writer.close()
        return events

    return await asyncio.gather(*(one(index) for index in range(count)))


def test_500_clients_that_vanish(abused: ServerProcess, http: httpx.Client) -> None:
    # Crowds bring buffers, arenas and KV pages to their size; how many it takes depends on how
    # many clients really met (seen: +70 MiB, then +40, then nothing). A leak shows in every one.
    grown = []
    level = memory_bytes(abused)
    for _ in range(6):
        asyncio.run(_vanish_all(abused.url, 500))
        wait_idle(http)
        time.sleep(0.5)
        grown.append((memory_bytes(abused) - level) / MEBIBYTE)
        level += int(grown[-1] * MEBIBYTE)
        if grown[-1] < 8:
            return
    pytest.fail(f"memory grew by {[round(each) for each in grown]} MiB, crowd after crowd")


@pytest.mark.parametrize(
    ("path", "body", "code"),
    [
        ("/v1/completions", {"prompt": [1] * 200_000}, "context_length_exceeded"),
        ("/v1/completions", {"prompt": "hello " * 200_000}, "context_length_exceeded"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "hello " * 200_000}]},
            "context_length_exceeded",
        ),
        ("/v1/completions", {"prompt": "a", "n": 10_000}, "too_many_completions"),
        ("/v1/completions", {"prompt": "a", "n": 10**30}, "too_many_completions"),
        ("/v1/completions", {"prompt": ["a"] * 100_000}, "too_many_completions"),
    ],
    ids=["200k-ids", "200k-words", "200k-chat", "n-10000", "n-huge", "prompts"],
)
def test_too_much_is_a_400(http: httpx.Client, path: str, body: dict[str, Any], code: str) -> None:
    response = http.post(path, json={"model": MODEL, **body})
    assert (response.status_code, response.json()["error"]["code"]) == (400, code)


@pytest.mark.parametrize("content", ["{", "[]", "null", "\0", '{"prompt": "a",}', "[" * 200_000])
def test_malformed_json(http: httpx.Client, content: str) -> None:
    headers = {"Content-Type": "application/json"}
    response = http.post("/v1/completions", content=content, headers=headers)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_of_100_megabytes(abused: ServerProcess, http: httpx.Client, chunked: bool) -> None:
    before = memory_bytes(abused)

    def chunks() -> Iterator[bytes]:
        for _ in range(100):
            yield b" " * 1_000_000

    headers = {"Content-Type": "application/json"}
    if not chunked:
        headers["Content-Length"] = "100000000"
    response = http.post("/v1/completions", content=chunks(), headers=headers)
    assert response.status_code == 413
    assert memory_bytes(abused) - before < 64 * MEBIBYTE


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


HOSTILE = {
    "deep": nested(100),
    "wide": {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(5000)}},
    "pattern": {"type": "string", "pattern": "(a{1,1000}){1,1000}(b{1,1000}){1,1000}"},
    "reference": {"$ref": "#/nowhere"},
    "not a schema": {"type": 5},
    "all of": {"allOf": [{"type": "string", "pattern": f".*{i}.*"} for i in range(200)]},
}


@pytest.mark.parametrize("schema", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_schema_is_refused_or_served_soon(
    http: httpx.Client, schema: dict[str, Any]
) -> None:
    response = http.post(
        "/v1/chat/completions",
        json={
            "model": MODEL,
            "messages": [{"role": "user", "content": "go"}],
            "max_tokens": 8,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": schema},
            },
        },
    )
    assert response.status_code in (200, 400), response.text


def test_no_request_that_the_schema_allows_is_a_500(start_server: StartServer) -> None:
    # A short context: chats that name no max_tokens run to its end.
    server = start_server("--max-model-len", "32")
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")

    for found in schema.get_all_operations():
        operation = found.ok()

        @given(case=operation.as_strategy())
        @settings(
            max_examples=12,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        def fuzz(case: schemathesis.Case) -> None:
            response = case.call(timeout=60)
            assert response.status_code < 500, f"{case.body}: {response.text}"

        fuzz()
