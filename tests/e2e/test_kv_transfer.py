"""Running requests move between replicas with their KV, over HTTP, and nobody can tell."""

from __future__ import annotations

import re
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from parallel_streams import Stream, plan_file
from server_process import ServerProcess, StartServer

KEY = "kv-transfer-key"
HEADERS = {"Authorization": f"Bearer {KEY}"}
MAX_TOKENS, LONG = 40, 100
EVENLY = ("--router-policy", "least-outstanding", "--no-hedging")
TEXT = "The river rose in the night, and by morning the lower fields were gone. "
# Cut by heads on one side, by layers on the other: every block is put together anew.
PLAN = """
replicas:
  - stages: [{layers: 0-30, devices: [cpu, cpu], split: {weights: [2, 1]}}]
  - stages: [{layers: 0-13, devices: [cpu]}, {layers: 13-30, devices: [cpu]}]
"""
ROLES = """
replicas:
  - {role: prefill, stages: [{devices: [cpu]}]}
  - {role: decode, stages: [{devices: [cpu]}]}
"""

_HITS = r'^shoal_prefix_cache_hits_total\{{replica="{}"\}} (\S+)$'


class Running:
    """A completion that is being read."""

    def __init__(self, stream: Stream, url: str) -> None:
        self.stream = stream
        self._thread = threading.Thread(target=stream.run, args=(url, HEADERS))
        self._thread.start()

    def wait_for(self, num_tokens: int) -> None:
        end = time.monotonic() + 120
        while len(self.stream.tokens) < num_tokens:
            assert time.monotonic() < end, "no tokens within 120 s"
            time.sleep(0.005)

    def result(self) -> list[int]:
        self._thread.join(240)
        assert self.stream.ends == ["length"]
        return self.stream.tokens


@dataclass
class Served:
    """Two replicas behind one door."""

    server: ServerProcess

    def stream(self, index: int, max_tokens: int = MAX_TOKENS) -> Running:
        body = {
            "model": "smollm2-135m",
            "prompt": f"Chapter {index}. {TEXT * 12}",
            "ignore_eos": True,
            "max_tokens": max_tokens,
            "temperature": 0.8 if index % 2 else 0,
            "seed": index,
        }
        return Running(Stream(body), self.server.url)

    def admin(self, what: str = "") -> Any:
        path = f"{self.server.url}/admin/replicas{what}"
        method = "POST" if what else "GET"
        answer = httpx.request(method, path, headers=HEADERS, timeout=60)
        assert answer.status_code == 200, answer.text
        return answer.json()["replicas"]

    def home(self) -> str:
        """The replica that has a request."""
        (name,) = (name for name, each in self.admin().items() if each["requests"])
        return str(name)

    def cached(self, replica: str) -> int:
        text = httpx.get(f"{self.server.url}/metrics", headers=HEADERS).text
        found = re.search(_HITS.format(replica), text, re.M)
        assert found, text
        return int(float(found[1]))

    def engine(self, replica: str) -> psutil.Process:
        """Of its current incarnation; they were started in order."""
        processes = psutil.Process(self.server.process.pid).children()
        engines = [p for p in processes if "shoal.cli.engine_process" in " ".join(p.cmdline())]
        return sorted(engines, key=lambda each: each.create_time())[int(replica[-1])]

    def wait_for_both(self) -> None:
        end = time.monotonic() + 120
        while not all(each["alive"] for each in self.admin().values()):
            assert time.monotonic() < end, "a replica did not come"
            time.sleep(0.05)


@pytest.fixture(scope="module")
def server(start_server: StartServer, tmp_path_factory: pytest.TempPathFactory) -> ServerProcess:
    path = plan_file(tmp_path_factory.mktemp("plan"), PLAN)
    return start_server("--plan", str(path), "--dtype", "float32", "--api-key", KEY, *EVENLY)


@pytest.fixture
def served(server: ServerProcess) -> Served:
    """Both replicas are there, and take requests."""
    served = Served(server)
    served.wait_for_both()
    for name in served.admin():
        served.admin(f"/{name}/resume")
    return served


def test_a_drained_replica_hands_its_requests_over_with_their_kv(served: Served) -> None:
    moved = [served.stream(index, LONG) for index in range(2, 4)]
    for each in moved:
        each.wait_for(6)
    before = served.cached("replica-1")
    served.admin("/replica-0/drain")
    results = [each.result() for each in moved]
    want = {"alive": True, "drained": True, "requests": 0}
    assert served.admin()["replica-0"].items() >= want.items()
    assert served.cached("replica-1") - before >= 150  # a prompt of some 190 tokens went along
    served.admin("/replica-0/resume")
    assert [served.stream(index, LONG).result() for index in range(2, 4)] == results


@pytest.mark.parametrize("victim", ["sender", "receiver"])
def test_who_dies_while_kv_moves_costs_no_token(served: Served, victim: str) -> None:
    want = served.stream(5).result()  # before any KV moved
    running = served.stream(5)
    running.wait_for(6)
    home = served.home()
    (other,) = served.admin().keys() - {home}
    engine = served.engine(home if victim == "sender" else other)
    served.admin(f"/{home}/drain")
    engine.send_signal(signal.SIGKILL)
    assert running.result() == want


def test_one_replica_reads_prompts_and_another_goes_on(
    served: Served, start_server: StartServer, tmp_path: Path
) -> None:
    path = plan_file(tmp_path, ROLES)
    apart = Served(start_server("--plan", str(path), "--dtype", "float32", "--api-key", KEY))
    apart.wait_for_both()
    want = [served.stream(index).result() for index in (6, 7)]
    assert [apart.stream(index).result() for index in (6, 7)] == want
    assert apart.cached("replica-1") >= 300  # the prompts' KV came from replica-0
    assert apart.cached("replica-0") == 0


def test_a_prompt_goes_where_fewest_run_and_its_kv_follows(start_server: StartServer) -> None:
    # Where a busy machine makes a stream pause, nobody is to take it over.
    options = ("--data-parallel-size", "2", "--dtype", "float32", "--api-key", KEY, *EVENLY)
    served = Served(start_server(*options, "--no-hedging"))
    served.wait_for_both()
    want = served.stream(8).result()
    served.stream(10, max_tokens=1).result()  # says how long a prompt takes on replica-1
    at_work = served.stream(9, max_tokens=2 * LONG)
    at_work.wait_for(1)
    assert served.home() == "replica-0"
    before = served.cached("replica-1")
    assert served.stream(8).result() == want
    assert served.cached("replica-1") - before >= 150
    at_work.result()


def test_only_who_has_a_key_moves_requests(served: Served) -> None:
    drain = f"{served.server.url}/admin/replicas/replica-0/drain"
    assert httpx.post(drain).status_code == 401
    unknown = drain.replace("replica-0", "replica-7")
    assert httpx.post(unknown, headers=HEADERS).status_code == 404
    served.admin("/replica-1/drain")
    last = httpx.post(drain, headers=HEADERS)
    assert (last.status_code, last.json()["error"]["code"]) == (409, "last_replica")
