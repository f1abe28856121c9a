"""Streams that break, clients that hang up or stall: over real sockets, a scripted router."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any

import httpx
import pytest
from server_fakes import FakeRouter, client, make_app, running, wait_until

from shoal.core.request import ErrorInfo, Output
from shoal.observe import ServingMetrics

LOST = ErrorInfo(status=503, code="replica_lost", message="gone", retry_after_s=1)
ENDLESS = tuple(b"x" * 500)


def data(text: str) -> list[str]:
    return [line.removeprefix("data: ") for line in text.split("\n\n") if line]


@pytest.mark.parametrize("n", [1, 3])
def test_an_error_in_mid_stream_is_an_event_and_no_false_end(n: int) -> None:
    router = FakeRouter(failure=LOST, failure_at=3)
    with client(router) as http:
        response = http.post("/v1/completions", json={"prompt": "a", "stream": True, "n": n})
        wait_until(lambda: router.num_running == 0)
    assert response.status_code == 200
    *chunks, error, end = data(response.text)
    assert end == "[DONE]"
    assert json.loads(error)["error"]["code"] == "replica_lost"
    reasons = [json.loads(chunk)["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * len(reasons)


def test_an_error_of_a_whole_response_is_its_status() -> None:
    with client(FakeRouter(failure=LOST, failure_at=3)) as http:
        response = http.post("/v1/completions", json={"prompt": "a"})
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")


@pytest.mark.parametrize("stream", [False, True])
def test_a_bug_shows_no_traceback(stream: bool, caplog: pytest.LogCaptureFixture) -> None:
    class Broken(FakeRouter):
        def _outputs(self, request: Any) -> Any:
            yield Output(request_id=request.request_id, token_ids=(72,))
            raise RuntimeError("secret")

    with client(Broken()) as http:
        response = http.post(
            "/v1/completions",
            json={"prompt": "a", "stream": stream},
            headers={"X-Request-Id": "req-7"},
        )
    assert "secret" not in response.text
    assert "internal_error" in response.text
    assert response.status_code == (200 if stream else 500)
    assert response.headers["X-Request-Id"] == "req-7"
    assert "req-7" in caplog.text
    assert "secret" in caplog.text


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_cancels_its_requests(stream: bool, n: int) -> None:
    router = FakeRouter(answer=ENDLESS, delay_s=0.02)
    metrics = ServingMetrics()
    body = {"prompt": "a", "max_tokens": 400, "stream": stream, "n": n}
    with running(make_app(router, metrics=metrics)) as url:
        sock = send(url, body)
        wait_until(lambda: router.num_running == n)
        if stream:
            assert sock.recv(20).startswith(b"HTTP/1.1 200 OK")
        sock.close()
        wait_until(lambda: router.num_running == 0)
        assert len(router.left) == n
        status = 200 if stream else 499
        count = f'shoal_http_requests_total{{endpoint="/v1/completions",status="{status}"}} 1.0'
        wait_until(lambda: count in httpx.get(f"{url}/metrics").text)
        text = httpx.get(f"{url}/metrics").text
    assert f'shoal_requests_finished_total{{finished_reason="cancelled"}} {n}.0' in text


def test_a_client_that_stops_reading_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    """With logprobs a chunk is large, so the socket is full soon."""
    router = FakeRouter(answer=tuple(b"x" * 480))
    body = {"prompt": "a", "max_tokens": 480, "stream": True, "logprobs": 3, "n": 128}
    with running(make_app(router, stall_timeout_s=0.3)) as url:
        sock = send(url, body)
        wait_until(lambda: router.num_running > 0)
        wait_until(lambda: router.num_running == 0)
        sock.close()
    assert router.left, "it should have been cancelled before its end"
    assert "took nothing for 0.3 s" in caplog.text


def test_many_that_vanish_leave_nothing_behind() -> None:
    router = FakeRouter(answer=ENDLESS, delay_s=0.01)

    async def vanish(url: str) -> None:
        host, port = url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(request_bytes({"prompt": "a", "stream": True, "max_tokens": 400}))
        await reader.readuntil(b"data: ")
        writer.close()
        await writer.wait_closed()

    async def crowd(url: str) -> None:
        await asyncio.gather(*(vanish(url) for _ in range(100)))

    with running(make_app(router)) as url:
        asyncio.run(crowd(url))
        wait_until(lambda: router.num_running == 0)
        assert len(router.left) == 100
        assert httpx.post(f"{url}/v1/completions", json={"prompt": "a", "max_tokens": 1}).is_success


def test_headers_wait_for_the_first_token() -> None:
    router = FakeRouter(may_go_on=lambda: False)
    body = {"prompt": "a", "stream": True, "max_tokens": 3}
    with client(router) as http, pytest.raises(httpx.ReadTimeout):
        http.post("/v1/completions", json=body, timeout=httpx.Timeout(60, read=0.5))
    wait_until(lambda: len(router.requests) == 1)


def test_a_token_waits_for_no_other() -> None:
    """The next one is made when the one before has been read."""
    made: list[None] = []
    read: list[str] = []

    def is_read() -> bool:
        if len(made) > len(read):
            return False
        made.append(None)
        return True

    body = {"prompt": "a", "stream": True, "max_tokens": 3}
    router = FakeRouter(answer=ENDLESS, may_go_on=is_read)
    with client(router) as http, http.stream("POST", "/v1/completions", json=body) as response:
        for line in response.iter_lines():
            if "choices" in line:
                read.append(line)
    assert len(read) == 3


def request_bytes(body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: tiny\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


def send(url: str, body: dict[str, Any]) -> socket.socket:
    """The request is out; nothing has been read."""
    host, port = url.removeprefix("http://").split(":")
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect((host, int(port)))
    sock.sendall(request_bytes(body))
    return sock
