"""Labs that are up: real workers, real faults, and nothing left behind.

Needs Linux; as root hosts are network namespaces, else sockets keep to the links.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from shoal.lab.network import Network

STAGES = """\
stages:
  - {layers: 0-4, devices: [{device: cpu, host: a}]}
  - {layers: 4-21, devices: [{device: cpu, host: b}]}
  - {layers: 21-30, devices: [{device: cpu, host: c}]}
links:
  default: {bandwidth: 20Mbit}
  a|c: {bandwidth: 50Mbit, latency: 1ms}
"""
NUM_STREAMS, NUM_TOKENS = 8, 40
RECOVERY_LIMIT_S = 240.0  # the 15 s, on machines that are busy with other things too

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="labs need Linux")


@dataclass
class Lab:
    """A lab of this test's own, in a cache of its own."""

    cache: Path
    models: Path
    url: str = ""

    def __call__(self, *args: str, check: bool = True) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "shoal", "lab", *args],
            capture_output=True,
            text=True,
            timeout=240,
            env={**os.environ, "SHOAL_CACHE": str(self.cache)},
        )
        if check:
            assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    def up(self, text: str, *flags: str) -> str:
        file = self.cache / "lab.yaml"
        file.write_text(f"model: {self.models}\n{text}")
        name = ("--served-model-name", "m", "--dtype", "float32")
        said = self("up", str(file), "--port", "0", *flags, *name)
        self.url = next(word for word in said.split() if word.startswith("http")).removesuffix(
            "/v1"
        )
        return said

    def workers(self) -> dict[str, dict[str, Any]]:
        return {each["worker"]: each for each in json.loads(self("status", "--json"))["workers"]}

    def complete(self, index: int, num_tokens: int = NUM_TOKENS) -> str:
        body = {
            "model": "m",
            "prompt": f"The {index}th thing to know about the sea is",
            "max_tokens": num_tokens,
            "ignore_eos": True,
            "temperature": 0.7 * (index % 2),
            "seed": index,
        }
        answer = httpx.post(f"{self.url}/v1/completions", json=body, timeout=240)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["text"])

    def complete_all(self) -> list[str]:
        texts = [""] * NUM_STREAMS
        threads = [
            threading.Thread(target=lambda i=i: texts.__setitem__(i, self.complete(i)))
            for i in range(NUM_STREAMS)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return texts

    def processes(self) -> list[psutil.Process]:
        """All that a lab in this cache has started and that is still there."""
        found = []
        for process in psutil.process_iter():
            try:
                if str(self.cache) in process.environ().get("SHOAL_LAB_STATE", ""):
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found


@pytest.fixture
def lab(tmp_path: Path, smollm2_gguf: Path) -> Iterator[Lab]:
    lab = Lab(tmp_path, smollm2_gguf.resolve())
    yield lab
    lab("down")
    assert lab.processes() == []
    assert not (tmp_path / "labs").exists()


def namespaces() -> set[str]:
    folder = Path("/run/netns")
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def test_faults_change_no_token(lab: Lab) -> None:
    before = namespaces()
    said = lab.up(STAGES)
    has_namespaces = Network("shoaltest-").why_not() is None
    assert (len(namespaces() - before) == 3) == has_namespaces
    assert ("kept to by sockets" in said) == (not has_namespaces)
    assert "a lab is up at" in lab("up", str(lab.cache / "lab.yaml"), check=False)
    undisturbed = lab.complete_all()
    assert len(set(undisturbed)) == NUM_STREAMS

    for faults in (("cut", "a", "b"),), (("kill", "s1"),), (("stop", "c"),):
        answers: list[list[str]] = []
        running = threading.Thread(target=lambda found=answers: found.append(lab.complete_all()))
        running.start()
        time.sleep(0.5)
        for fault in faults:
            lab(*fault)
        if faults[0][0] == "cut":
            assert "a and b do not hear each other" in lab("status")
            time.sleep(2)
            lab("heal")
        running.join(RECOVERY_LIMIT_S)
        assert answers == [undisturbed], faults
    assert {each["state"] for each in lab.workers().values()} == {"running"}

    assert lab("down") == "the lab is down\n"
    assert lab.processes() == []
    assert namespaces() == before


def test_a_slow_worker_and_a_server_that_is_killed(lab: Lab) -> None:
    lab.up("stages: [{layers: 0-15, devices: cpu}, {layers: 15-30, devices: cpu}]\n")
    lab("slow", "s1", "0.1")
    workers = lab.workers()
    assert {name: each["speed"] for name, each in workers.items()} == {
        "s0.i0.r0": 1.0,
        "s1.i1.r0": 0.1,
    }
    lab.complete(0, 8)  # by now it has heard that it is slow
    slow = psutil.Process(workers["s1.i1.r0"]["pid"])
    started_s, computed_s = time.monotonic(), sum(slow.cpu_times()[:2])
    lab.complete(0, 32)
    # Ten times what it computed; what else its process does is not stretched.
    computed_s = sum(slow.cpu_times()[:2]) - computed_s
    assert time.monotonic() - started_s > 5 * computed_s

    record = json.loads((lab.cache / "labs" / "lab" / "record.json").read_text())
    os.kill(record["server_pid"], 9)
    assert "no worker or host" in lab("kill", "b", check=False)
    assert lab("down") == "the lab is down\n"  # and the fixture looks for what is left


def test_sockets_keep_to_links_without_namespaces(lab: Lab) -> None:
    before = namespaces()
    lab.up(f"{STAGES}  b|c: {{bandwidth: 20Mbit, latency: 100ms}}\n", "--no-namespaces")
    assert namespaces() == before
    started_s = time.monotonic()
    text = lab.complete(1, 11)
    # Each of 10 further tokens waits for 100 ms on its way from b to c.
    assert time.monotonic() - started_s > 1.0
    lab("cut", "b", "c")
    answers: list[str] = []
    running = threading.Thread(target=lambda: answers.append(lab.complete(1, 11)))
    running.start()
    time.sleep(3)
    assert answers == []
    lab("heal", "c", "b")
    running.join(RECOVERY_LIMIT_S)
    assert answers == [text]


def test_a_lab_that_cannot_come_up_leaves_nothing(lab: Lab) -> None:
    (lab.cache / "lab.yaml").write_text(f"model: {lab.models}\n{STAGES}")
    said = lab("up", str(lab.cache / "lab.yaml"), "--dtype", "float23", check=False)
    assert "the lab's server ended; it said:" in said
    assert "float23" in said
    assert not (lab.cache / "labs").exists()
    assert lab.processes() == []
