"""Requests leave an instance for its stand-in, over HTTP, with their KV; and what Steps took."""

from __future__ import annotations

import json
import re
import signal
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from parallel_streams import PLANS, Stream, plan_file
from server_process import ServerProcess, StartServer

from shoal.cli.probe_from import refitted
from shoal.core.cluster import Cluster, Device, Host
from shoal.core.errors import ConfigError
from shoal.policy.cost_model.constants import constants_for

KEY = "route-moves-key"
HEADERS = {"Authorization": f"Bearer {KEY}"}
NUM_STREAMS = 2
MAX_TOKENS, LONG = 40, 160
TEXT = "The river rose in the night, and by morning the lower fields were gone. "
SLOW = Device(
    name="local.cpu",
    kind="cpu",
    host="local",
    device="cpu",
    memory_bytes=8 << 30,
    bandwidth_bytes_per_s=5e9,
    flops=(("float32", 50e9),),
    precisions=("float32",),
    launch_s=9e-3,
)
_COPIED = r'^shoal_copied_tokens_total\{replica="replica-0"\} (\S+)$'


class Served:
    """A replica whose second stage has two instances, 1 and 2."""

    def __init__(self, server: ServerProcess, state: Path) -> None:
        self.server = server
        self._state = state

    def kill(self, worker: str) -> None:
        pids = json.loads(Path(f"{self._state}.workers").read_text())
        psutil.Process(pids[worker]).send_signal(signal.SIGKILL)

    def admin(self, what: str = "") -> dict[str, Any]:
        """Its instances."""
        base = f"{self.server.url}/admin/replicas"
        path = f"{base}/replica-0/instances/{what}" if what else base
        answer = httpx.request("POST" if what else "GET", path, headers=HEADERS, timeout=60)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()["replicas"]["replica-0"]["instances"]
        return found

    def refusal(self, what: str) -> tuple[int, str]:
        path = f"{self.server.url}/admin/replicas/replica-0/instances/{what}"
        answer = httpx.post(path, headers=HEADERS, timeout=60)
        return answer.status_code, answer.json()["error"]["code"]

    def copied(self) -> int:
        text = httpx.get(f"{self.server.url}/metrics", headers=HEADERS).text
        found = re.search(_COPIED, text, re.M)
        assert found, text
        return int(float(found[1]))

    def wait_until(self, instance: int, **fields: object) -> None:
        end = time.monotonic() + 120
        while True:
            now = self.admin()[str(instance)]
            if all(now[name] == value for name, value in fields.items()):
                return
            assert time.monotonic() < end, f"instance {instance} is {now}, not {fields}"
            time.sleep(0.02)

    def wait_for_all(self) -> None:
        for instance in range(4):
            self.wait_until(instance, alive=True, requests=0)


class Running:
    """Completions that are being read."""

    def __init__(self, served: Served, max_tokens: int = MAX_TOKENS) -> None:
        self.streams = [Stream(_body(index, max_tokens)) for index in range(NUM_STREAMS)]
        self._threads = [
            threading.Thread(target=each.run, args=(served.server.url, HEADERS))
            for each in self.streams
        ]
        for thread in self._threads:
            thread.start()

    def wait_for(self, num_tokens: int) -> None:
        end = time.monotonic() + 120
        while min(len(each.tokens) for each in self.streams) < num_tokens:
            assert time.monotonic() < end, "no tokens within 120 s"
            time.sleep(0.005)

    def results(self) -> list[list[int]]:
        for thread in self._threads:
            thread.join(240)
        assert [each.ends for each in self.streams] == [["length"]] * NUM_STREAMS
        return [each.tokens for each in self.streams]


@pytest.fixture(scope="module")
def served(start_server: StartServer, tmp_path_factory: pytest.TempPathFactory) -> Served:
    folder = tmp_path_factory.mktemp("routes")
    state = folder / "lab.json"
    state.write_text("{}")
    plan = plan_file(folder, PLANS["two instances"])
    flags = ("--dtype", "float32", "--no-enable-prefix-caching", "--api-key", KEY)
    env = {"SHOAL_LAB_STATE": str(state)}
    return Served(start_server("--plan", str(plan), *flags, env=env), state)


@pytest.fixture(scope="module")
def want(served: Served) -> list[list[int]]:
    return Running(served, LONG).results()


def test_a_drained_instance_is_left_and_taken_again(served: Served, want: list[list[int]]) -> None:
    served.wait_for_all()
    before = served.copied()
    running = Running(served, LONG)
    running.wait_for(4)
    served.admin("1/drain")
    served.wait_until(1, drained=True, requests=0)
    served.wait_until(2, requests=NUM_STREAMS)
    assert served.copied() - before >= 150, "a prompt of some 190 tokens went along"
    assert served.refusal("2/drain") == (409, "last_instance")
    assert served.refusal("7/drain") == (404, "no_such_instance")
    served.admin("1/resume")
    served.wait_until(2, requests=NUM_STREAMS // 2)
    assert running.results() == want


def test_steps_that_ran_say_what_the_cost_model_should(
    served: Served, want: list[list[int]], smollm2_gguf: Path
) -> None:
    """`shoal probe --from`, on a cluster file that is wrong by far."""
    cluster = Cluster(hosts=(Host(name="local"),), devices=(SLOW,))
    end = time.monotonic() + 60
    while True:  # they are told once a second
        try:
            found = refitted(f"{served.server.url}/v1", KEY, str(smollm2_gguf), cluster)
            break
        except ConfigError as error:
            assert "too few different Steps" in str(error), error
            assert time.monotonic() < end, error
            time.sleep(0.2)
    assert want
    fitted = constants_for(found, SLOW, "shoal", "float32")
    guessed = constants_for(cluster, SLOW, "shoal", "float32")
    assert (fitted.device, fitted.precision) == ("local.cpu", "float32")
    assert served.server.url in fitted.source
    assert fitted.layer_s + fitted.step_s < guessed.layer_s
    assert found.request_s >= 0.0
    with pytest.raises(ConfigError, match="API key"):
        refitted(served.server.url, None, str(smollm2_gguf), cluster)


@pytest.mark.parametrize("victim", ["s1.i1.r0", "s1.i2.r0"])
def test_who_dies_while_requests_move_costs_no_token(
    served: Served, want: list[list[int]], victim: str
) -> None:
    """The one that KV comes from, and the one that it goes to."""
    served.wait_for_all()
    running = Running(served)
    running.wait_for(4)
    served.admin("1/drain")
    served.kill(victim)
    try:
        assert running.results() == [tokens[:MAX_TOKENS] for tokens in want]
    finally:
        served.admin("1/resume")


def _body(index: int, max_tokens: int) -> dict[str, Any]:
    return {
        "model": "smollm2-135m",
        "prompt": f"Chapter {index}. {TEXT * 12}",
        "ignore_eos": True,
        "max_tokens": max_tokens,
        "temperature": 0.8 if index % 2 else 0,
        "seed": index,
    }
