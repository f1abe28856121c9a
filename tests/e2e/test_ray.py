"""A cluster of three machines over Ray: `shoal up`, `join`, `serve`, a machine that dies, `down`.

Machines are network namespaces, so this needs root and Linux; one cluster serves all tests here.
"""

from __future__ import annotations

import importlib.util
import os
import re
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from parallel_streams import Streams
from ray_cluster import HOSTS, Machines
from server_process import ServerProcess, starting

from shoal.cluster.cluster_file import read_cluster
from shoal.lab.network import Network

NUM_STREAMS, MAX_TOKENS = 8, 40
NOTICED_WITHIN_S = 25.0  # the 3 s, on machines that are busy with other things too
PLAN = """\
stages:
  - {layers: 0-12, devices: [{device: cpu, threads: 1}]}
  - {layers: 12-30, devices: [{device: cpu, host: b, threads: 1}]}
"""


def why_not() -> str | None:
    if importlib.util.find_spec("ray") is None:
        return "Ray is not installed (the extra `ray`)"
    return Network("shoalray-").why_not()


pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


def ray_folders() -> set[Path]:
    return set(Path("/tmp").glob("shoal-ray-*"))


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    """A cluster that is up, and its end: nothing is left of it."""
    before = ray_folders()
    prefix = f"shr{os.getpid()}-"
    network = Network(prefix)
    machines = Machines(network, prefix, tmp_path_factory.mktemp("machines"))
    network.create(HOSTS, {})
    try:
        machines.up()
        stranger = machines.join("d", token="0" * 64)
        for joining in machines.join("b", "c"):
            joining.join()
        yield machines
        for knocking in stranger:
            knocking.join()
        assert "Ray did not start" in machines.said_join["d"]
        for host in HOSTS:
            said = machines.shoal(host, "down")
            assert ("no cluster" if host == "d" else "left the cluster") in said
            assert machines.processes(host) == []
            assert not (machines.folder / host / "cluster").exists()
        assert machines.shoal("a", "down") == "no cluster was up here\n"
        assert ray_folders() <= before
    finally:
        for host in HOSTS:
            machines.shoal(host, "down", check=False)
        network.remove()


@pytest.fixture(scope="module")
def server(
    machines: Machines, smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    plan = tmp_path_factory.mktemp("plan") / "plan.yaml"
    plan.write_text(PLAN)
    with starting(smollm2_gguf.resolve()) as start, machines.inside("a"):
        flags = ("--dtype", "float32")
        yield start("--plan", str(plan), *flags, env=machines.environment("a"))


def test_every_machine_is_probed(machines: Machines, tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    machines.shoal("a", "probe", "--seconds", "0.2", "-o", str(file))
    cluster = read_cluster(file)
    assert sorted(each.name for each in cluster.devices) == ["a.cpu", "b.cpu", "c.cpu"]
    assert {frozenset((each.a, each.b)) for each in cluster.links} == {
        frozenset(pair) for pair in ("ab", "ac", "bc")
    }
    assert {frozenset(each.hosts) for each in cluster.all_reduce} == {
        frozenset(group) for group in ("ab", "ac", "bc", "abc")
    }
    assert "kept from before" in machines.shoal("a", "probe")
    assert "probe from its head" in machines.shoal("b", "probe", check=False)


def test_a_newcomer_is_told_what_to_do(machines: Machines) -> None:
    head = machines.record("a")["head"]
    assert re.search(rf"^cluster    up at {head} over lo \(Ray 2\.", machines.said_up, re.M)
    assert f"shoal join {head} --token " in machines.said_up
    assert "shoal serve MODEL --plan plan.yaml" in machines.said_up
    for host, address in ("b", "10.77.0.2"), ("c", "10.77.0.3"):
        assert f"joined     {head}" in machines.said_join[host]
        assert f"Plans call this machine {host} or {address}" in machines.said_join[host]
    assert f"in a cluster already (its head: {head})" in machines.shoal("b", "up", check=False)
    token = machines.folder / "b" / "cluster" / "token"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    words = [word for each in machines.processes("b") for word in each.cmdline()]
    assert words
    assert not any(token.read_text() in word for word in words)


def test_machines_that_die_or_are_cut_off_cost_no_token(
    machines: Machines, server: ServerProcess
) -> None:
    want = Streams(server.url, NUM_STREAMS, MAX_TOKENS).results()
    assert on_machine(machines, "b") == 1

    streams = Streams(server.url, NUM_STREAMS, MAX_TOKENS)
    streams.wait_until_each_has(3)
    machines.kill("b")
    assert streams.results() == want
    assert [on_machine(machines, host) for host in HOSTS] == [1, 0, 1, 0]

    assert "left the cluster" in machines.shoal("b", "down")
    for joining in machines.join("b"):
        joining.join()
    assert "joined" in machines.said_join["b"]
    streams = Streams(server.url, NUM_STREAMS, MAX_TOKENS)
    streams.wait_until_each_has(3)
    num_lines, cut_s = len(server.lines), time.monotonic()
    machines.cut("a", "c")
    while not any("incarnation" in line for line in server.lines[num_lines:]):
        assert time.monotonic() - cut_s < NOTICED_WITHIN_S, "nobody noticed that c is cut off"
        time.sleep(0.02)
    assert streams.results() == want
    assert [on_machine(machines, host) for host in HOSTS] == [1, 1, 0, 0], "its agent ended it"
    machines.heal("a", "c")


def on_machine(machines: Machines, host: str) -> int:
    """Workers there."""
    found = 0
    for process in machines.processes(host):
        try:
            found += "shoal.worker.process" in process.cmdline()
        except psutil.NoSuchProcess:
            continue
    return found
