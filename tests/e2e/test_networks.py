"""Two hosts joined by two networks: workers find the nearer one, whichever they are given."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shoal.comm.interfaces import Measured, nearest
from shoal.wire.curve import make_keys

WORKER = """
import dataclasses, json, sys
from shoal.wire.curve import MeshKeys
from shoal.worker.links import Links, open_mesh
told = json.loads(sys.stdin.readline())
mesh = open_mesh(MeshKeys(**told["keys"]), told["address"])
links = Links(mesh, [told["peer"]])
print(json.dumps(mesh.addresses), flush=True)
links.connect({told["peer"]: tuple(json.loads(sys.stdin.readline()))})
if told["measures"]:
    (link,) = links.measure([told["peer"]])
    print(json.dumps([link.interface, link.bandwidth_bytes_per_s]), flush=True)
sys.stdin.readline()
mesh.close()
"""
SLOW_BITS = 4_000_000


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


@pytest.fixture
def hosts() -> Iterator[tuple[str, str]]:
    """Namespaces joined by a slow wire (10.79.0.x) and a fast one (10.79.1.x)."""
    if sys.platform != "linux" or os.geteuid() != 0 or not shutil.which("tc"):
        pytest.skip("network namespaces need root on Linux, and iproute2")
    names = f"shoalnet{os.getpid()}a", f"shoalnet{os.getpid()}b"
    try:
        for name in names:
            run("ip", "netns", "add", name)
        for network, device in enumerate(("slow0", "fast0")):
            there = ("peer", "name", device, "netns", names[1])
            run("ip", "link", "add", device, "netns", names[0], "type", "veth", *there)
            for host, name in enumerate(names, 1):
                address = f"10.79.{network}.{host}/24"
                run("ip", "-n", name, "addr", "add", address, "dev", device)
                run("ip", "-n", name, "link", "set", device, "up")
        for name in names:
            wait_until_up(name)
            bucket = ("rate", f"{SLOW_BITS}bit", "burst", "16384", "latency", "400ms")
            run("tc", "-n", name, "qdisc", "add", "dev", "slow0", "root", "tbf", *bucket)
        yield names
    finally:
        for name in names:
            if Path("/run/netns", name).exists():
                run("ip", "netns", "del", name)


@pytest.mark.parametrize("given", [0, 1], ids=["told the slow one", "told the fast one"])
def test_the_nearest_network_is_taken(hosts: tuple[str, str], given: int) -> None:
    keys = make_keys("ab")
    workers = []
    try:
        for host, (name, namespace) in enumerate(zip("ab", hosts, strict=True), 1):
            workers.append(
                subprocess.Popen(
                    ["ip", "netns", "exec", namespace, sys.executable, "-c", WORKER],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
            told = {
                "keys": {"name": name, "secret": keys[name].secret, "public": keys[name].public},
                "address": f"10.79.{given}.{host}",
                "peer": "ba"[host - 1],
                "measures": name == "a",
            }
            tell(workers[-1], told)
        offered = [answer(worker) for worker in workers]
        assert [len(each) for each in offered] == [2, 2]
        for worker, theirs in zip(workers, reversed(offered), strict=True):
            tell(worker, theirs)
        interface, bandwidth = answer(workers[0])
        assert interface == "fast0"
        assert bandwidth > 2 * SLOW_BITS / 8
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()


def wait_until_up(namespace: str) -> None:
    """The kernel takes its time to notice that both ends of a wire are there."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        shown = subprocess.run(
            ["ip", "-n", namespace, "-j", "link"], check=True, capture_output=True, text=True
        )
        states = [each["operstate"] for each in json.loads(shown.stdout) if "0" in each["ifname"]]
        if states == ["UP", "UP"]:
            return
        time.sleep(0.05)
    raise TimeoutError(f"the wires of {namespace} do not come up")


def tell(worker: subprocess.Popen[str], what: object) -> None:
    assert worker.stdin is not None
    worker.stdin.write(json.dumps(what) + "\n")
    worker.stdin.flush()


def answer(worker: subprocess.Popen[str]) -> list[Any]:
    assert worker.stdout is not None
    found = json.loads(worker.stdout.readline())
    assert isinstance(found, list)
    return found


def test_a_network_without_an_answer_is_passed_over() -> None:
    near = Measured("a", 1e-4, 1e8)
    far = Measured("b", 5e-5, 1e6)
    assert nearest([None, far, near]) == 2
    assert nearest([None, None]) == 0
