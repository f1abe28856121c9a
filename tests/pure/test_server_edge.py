"""What surrounds every request: keys, sizes, ids, readiness, metrics."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from server_fakes import FakeRouter, ask, client, make_app, running

from shoal.core.clock import ManualClock
from shoal.core.errors import ConfigError
from shoal.core.request import ErrorInfo
from shoal.server import ServerConfig

HELLO = {"prompt": "hello", "max_tokens": 2}


# --- keys ---


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/admin/replicas"),
        ("POST", "/admin/replicas/a/drain"),
        ("POST", "/admin/replicas/a/resume"),
        ("POST", "/admin/replicas/a/instances/1/drain"),
    ],
)
def test_nobody_drains_a_server_without_keys(method: str, path: str) -> None:
    """A page in a browser could."""
    response = ask(FakeRouter(), method, path)
    assert response.status_code == 403
    assert response.json()["error"]["code"] == "no_api_key"


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/openapi.json", "/nowhere"])
def test_a_key_is_needed(path: str) -> None:
    response = ask(FakeRouter(), "GET", path, api_keys=("k1", "k2"))
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.json()["error"]["type"] == "authentication_error"
    assert response.json()["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize("path", ["/health", "/ready", "/version"])
def test_load_balancers_need_none(path: str) -> None:
    assert ask(FakeRouter(), "GET", path, api_keys=("k1",)).status_code == 200


@pytest.mark.parametrize(
    ("header", "status"),
    [
        ("Bearer k2", 200),
        ("bearer k2", 200),
        ("Bearer k", 401),
        ("Bearer k22", 401),
        ("Bearer", 401),
        ("k2", 401),
        ("Basic k2", 401),
        (b"Bearer \xff\xfe", 401),
    ],
)
def test_only_a_whole_key_opens(header: Any, status: int) -> None:
    with client(FakeRouter(), api_keys=("k1", "k2")) as http:
        response = http.get("/v1/models", headers={"Authorization": header})
    assert response.status_code == status


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_a_key_that_is_not_ascii_opens_however_it_is_sent(encoding: str) -> None:
    with client(FakeRouter(), api_keys=("clé",)) as http:
        header = "Bearer clé".encode(encoding)
        assert http.get("/v1/models", headers={b"Authorization": header}).status_code == 200


def test_tenants_have_prefix_caches_of_their_own() -> None:
    router = FakeRouter()
    with client(router, api_keys=("k1", "k2")) as http:
        for key in ("k1", "k2", "k1"):
            http.post("/v1/completions", json=HELLO, headers={"Authorization": f"Bearer {key}"})
    first, second, again = (request.salt for request in router.requests)
    assert first == again != second
    assert "k1" not in first


def test_an_empty_key_is_refused() -> None:
    with pytest.raises(ConfigError, match="api_keys"):
        ServerConfig(served_model_names=("tiny",), api_keys=("",))


# --- sizes ---


def test_a_body_too_long_by_its_own_word_is_not_read() -> None:
    with client(FakeRouter(), max_body_bytes=1000) as http:
        url = http.base_url
        with socket.create_connection((url.host, url.port or 0), timeout=60) as sock:
            sock.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"
                b"Content-Type: application/json\r\nContent-Length: 100000000\r\n\r\n"
            )
            assert b"413" in sock.recv(4096).split(b"\r\n")[0]


def test_a_body_that_grows_too_long_is_cut_off() -> None:
    sent = 0

    def chunks() -> Iterator[bytes]:
        nonlocal sent
        yield b'{"prompt": "'
        for _ in range(1000):
            sent += 1000
            yield b"a" * 1000

    with client(FakeRouter(), max_body_bytes=10_000) as http:
        headers = {"Content-Type": "application/json"}
        response = http.post("/v1/completions", content=chunks(), headers=headers)
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "request_too_large"
        assert http.post("/v1/completions", json=HELLO).status_code == 200


# --- ids ---


def test_request_ids_go_in_and_out() -> None:
    with client(FakeRouter()) as http:
        given = http.get("/health", headers={"X-Request-Id": "abc-1.2"}).headers["x-request-id"]
        own = [http.get("/health").headers["x-request-id"] for _ in range(2)]
        refused = http.get("/nowhere", headers={"X-Request-Id": "abc"}).headers["x-request-id"]
        for bad in ("a" * 129, "a b", "a\tb"):
            answer = http.get("/health", headers={"X-Request-Id": bad}).headers["x-request-id"]
            assert answer != bad
    assert (given, refused) == ("abc-1.2", "abc")
    assert len(set(own)) == 2


def test_the_same_request_id_twice_does_not_clash() -> None:
    router = FakeRouter(delay_s=0.05)

    async def both(url: str) -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=url, headers={"X-Request-Id": "same"}) as http:
            return await asyncio.gather(
                *(http.post("/v1/completions", json=HELLO) for _ in range(2))
            )

    with running(make_app(router)) as url:
        assert [response.status_code for response in asyncio.run(both(url))] == [200, 200]
    assert len({request.request_id for request in router.requests}) == 2


# --- readiness ---


def ready(router: FakeRouter, clock: ManualClock, num: int = 1, gap_s: float = 0.0) -> list[int]:
    """Statuses of /ready, asked `num` times of one app, `gap_s` apart by its clock."""

    async def send() -> list[int]:
        transport = httpx.ASGITransport(make_app(router, clock=clock, probe_timeout_s=0.1))
        statuses = []
        async with httpx.AsyncClient(transport=transport, base_url="http://tiny") as http:
            for _ in range(num):
                statuses.append((await http.get("/ready")).status_code)
                clock.advance(gap_s)
        return statuses

    return asyncio.run(send())


def test_a_late_token_proves_readiness_without_a_probe() -> None:
    router = FakeRouter(last_token_s=95.0)
    assert ready(router, ManualClock(100.0)) == [200]
    assert router.requests == []


def test_an_idle_server_is_probed_and_the_verdict_kept_a_while() -> None:
    router = FakeRouter(last_token_s=5.0)
    assert ready(router, ManualClock(100.0), num=4, gap_s=2.0) == [200] * 4
    assert len(router.requests) == 2
    assert router.requests[0].sampling.max_tokens == 1


@pytest.mark.parametrize(
    "router",
    [
        FakeRouter(delay_s=1.0),
        FakeRouter(refusal=ErrorInfo(status=503, code="no_replica", message="none")),
        FakeRouter(ready=False, last_token_s=99.0),
    ],
    ids=["hangs", "refuses", "drains"],
)
def test_not_ready(router: FakeRouter) -> None:
    assert ready(router, ManualClock(100.0)) == [503]
    assert router.num_running == 0


def test_a_crowd_shares_one_probe() -> None:
    router = FakeRouter(delay_s=0.05)

    async def crowd() -> set[int]:
        transport = httpx.ASGITransport(make_app(router))
        async with httpx.AsyncClient(transport=transport, base_url="http://tiny") as http:
            responses = await asyncio.gather(*(http.get("/ready") for _ in range(20)))
        return {response.status_code for response in responses}

    assert asyncio.run(crowd()) == {200}
    assert len(router.requests) == 1


# --- metrics ---


def test_metrics_tell_what_happened() -> None:
    router = FakeRouter()
    router.num_running = 3
    with client(router) as http:
        http.post("/v1/completions", json=HELLO)
        http.post("/v1/completions", json={"prompt": "hello", "n": 2})
        http.post("/v1/completions", json={"prompt": ""})
        http.get("/made/up/path")
        response = http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }
    assert samples["shoal_requests_finished_total", "stop"] == 2
    assert samples["shoal_requests_finished_total", "length"] == 1
    assert samples["shoal_http_requests_total", "/v1/completions", "200"] == 2
    assert samples["shoal_http_requests_total", "/v1/completions", "400"] == 1
    assert samples["shoal_http_requests_total", "other", "404"] == 1
    assert samples[("shoal_time_to_first_token_seconds_count",)] == 3
    assert samples[("shoal_request_generation_tokens_sum",)] == 2 + 9 + 9
    assert samples[("shoal_inter_token_latency_seconds_count",)] == 1 + 8 + 8
    assert samples["shoal_num_requests_running", "replica-0"] == 3


def test_two_apps_live_side_by_side() -> None:
    with client(FakeRouter()) as one, client(FakeRouter()) as two:
        one.post("/v1/completions", json=HELLO)
        assert "shoal_requests_finished_total{" in one.get("/metrics").text
        assert "shoal_requests_finished_total{" not in two.get("/metrics").text
