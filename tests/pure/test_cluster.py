"""Clusters without Ray: which address, what is written down, who gets which node, lost messages."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import zmq

from shoal.cli.serving import plan_hosts
from shoal.cluster import raylet
from shoal.cluster.addresses import address_towards, choose_address, free_port
from shoal.cluster.folder import ClusterFolder, Record
from shoal.core.errors import ConfigError, WireError
from shoal.core.model_spec import LayerSpec, ModelSpec, RopeSpec
from shoal.core.plan import RankPlan, ReplicaPlan
from shoal.executor.ray_launcher import Node, choose_nodes, node_of
from shoal.plan_file import Parallelism, read_plan
from shoal.wire.agent_link import EXECUTOR, AgentLink, Kind
from shoal.wire.curve import MeshKeys
from shoal.wire.mesh import Mesh

RECORD = Record(
    session=1,
    started_s=2.5,
    head="10.0.0.1:4000",
    address="10.0.0.1",
    name="a",
    files="/nowhere",
    is_head=True,
)
SPEC = ModelSpec(
    architecture="test",
    num_layers=2,
    hidden_size=8,
    num_heads=4,
    num_kv_heads=2,
    head_dim=2,
    ffn_size=64,
    vocab_size=64,
    norm_eps=1e-5,
    layers=(LayerSpec(rope=RopeSpec()),) * 2,
    max_positions=4096,
    attention_scale=1.0,
    tied_embeddings=True,
)
NODES = [
    Node("1a", "a", "10.0.0.1", 8, 0),
    Node("2b", "b", "10.0.0.2", 4, 0),
    Node("3c", "c", "10.0.0.3", 4, 2),
]


# --- which address ---


@pytest.mark.parametrize(
    ("interface", "address", "found", "want"),
    [
        (None, None, {"eth0": "10.0.0.1"}, ("eth0", "10.0.0.1")),
        (None, None, {"eth0": "10.0.0.1", "docker0": "172.17.0.1"}, ("eth0", "10.0.0.1")),
        ("eth1", None, {"eth0": "10.0.0.1", "eth1": "10.1.0.1"}, ("eth1", "10.1.0.1")),
        (None, "10.1.0.1", {"eth0": "10.0.0.1", "eth1": "10.1.0.1"}, ("eth1", "10.1.0.1")),
    ],
)
def test_a_clear_address_is_taken(
    interface: str | None, address: str | None, found: dict[str, str], want: tuple[str, str]
) -> None:
    assert choose_address(interface, address, found) == want


@pytest.mark.parametrize(
    ("interface", "address", "found", "complaint"),
    [
        (None, None, {"eth0": "10.0.0.1", "eth1": "10.1.0.1"}, r"eth1 \(10.1.0.1\); choose one"),
        (None, None, {}, "no private IPv4 address but loopback"),
        ("wlan0", None, {"eth0": "10.0.0.1"}, r"wlan0 has no .* there are: eth0 \(10.0.0.1\)"),
        (None, "8.8.8.8", {"eth0": "10.0.0.1"}, "8.8.8.8 is not a private address"),
        (None, "127.0.0.1", {"eth0": "10.0.0.1"}, "127.0.0.1 is not a private address"),
        (None, "head", {"eth0": "10.0.0.1"}, "head is not a private address"),
    ],
)
def test_an_unclear_address_is_asked_for(
    interface: str | None, address: str | None, found: dict[str, str], complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        choose_address(interface, address, found)


def test_addresses_of_this_machine() -> None:
    assert address_towards("127.0.0.1") == "127.0.0.1"
    assert 0 < free_port("127.0.0.1") < 65536
    with pytest.raises(ConfigError, match=r"192.0.2.77 is no address of this machine"):
        free_port("192.0.2.77")


# --- what is written down ---


def test_a_record_and_a_token_are_its_owners_alone(tmp_path: Path) -> None:
    folder = ClusterFolder(tmp_path / "cluster")
    with folder.locked():
        assert folder.read_record() is None
        folder.write_token("ab" * 32)
        folder.write_token("cd" * 32)
        folder.write_record(RECORD)
        with (
            pytest.raises(ConfigError, match="another command is at this cluster"),
            ClusterFolder(folder.path).locked(),
        ):
            pass
    assert folder.read_record() == RECORD
    assert folder.token.read_text() == "cd" * 32
    assert stat.S_IMODE(folder.token.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
    with pytest.raises(ConfigError, match="no token of a cluster; copy the line"):
        folder.write_token("secret")
    (folder.path / "record.json").write_text('{"session": 1}')
    with pytest.raises(ConfigError, match="cannot be read"):
        folder.read_record()
    folder.remove()
    assert not folder.path.exists()


# --- whose processes ---


@pytest.fixture
def session() -> Iterator[subprocess.Popen[bytes]]:
    """A process that leads a session, with a child."""
    program = (
        "import subprocess, sys, time\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print('up', flush=True)\n"
        "time.sleep(600)"
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        children = psutil.Process(process.pid).children()
        yield process
        for each in children:
            with suppress(psutil.NoSuchProcess):
                each.kill()
        process.kill()


def record_of(process: subprocess.Popen[bytes], files: Path) -> Record:
    began_s = psutil.Process(process.pid).create_time()
    return replace(RECORD, session=process.pid, started_s=began_s, files=str(files))


@pytest.mark.parametrize("is_leader_gone", [False, True])
def test_a_session_is_ended_whole(
    session: subprocess.Popen[bytes], tmp_path: Path, is_leader_gone: bool
) -> None:
    files = tmp_path / "files"
    files.mkdir()
    record = record_of(session, files)
    (child,) = psutil.Process(session.pid).children()
    assert raylet.is_alive(record)
    if is_leader_gone:
        session.kill()
        session.wait()
        assert not raylet.is_alive(record)
        assert child.is_running()
    raylet.end(record)
    session.wait(60)
    child.wait(60)
    assert not files.exists()


def test_a_later_process_of_the_same_number_is_left_alone(
    session: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    record = replace(record_of(session, tmp_path / "files"), started_s=1.0)
    assert not raylet.is_alive(record)
    raylet.end(record)
    assert session.poll() is None


# --- who gets which node ---


def ranks(*hosts: str, device: str = "cpu") -> list[RankPlan]:
    return [RankPlan(device=device, host=host) for host in hosts]


@pytest.mark.parametrize(
    ("wanted", "load", "there", "want"),
    [
        (ranks("b", "10.0.0.3"), {}, NODES, "bc"),
        (ranks("b", "b"), {}, NODES, "bb"),
        (ranks("gone"), {"10.0.0.1": 1}, NODES, "b"),
        (ranks("gone", "gone"), {}, NODES, "ab"),
        (ranks("gone", device="cuda:0"), {}, NODES, "c"),
        (ranks("gone", device="cuda:0"), {}, NODES[:2], None),
        (ranks("a"), {}, [], None),
    ],
)
def test_a_rank_goes_where_it_was_named_or_to_the_idlest(
    wanted: list[RankPlan], load: dict[str, int], there: list[Node], want: str | None
) -> None:
    chosen = choose_nodes(wanted, there, load)
    assert (None if chosen is None else "".join(node.name for node in chosen)) == want


def test_a_name_that_no_node_has_is_said() -> None:
    with pytest.raises(ConfigError, match=r"names host 'z', but the cluster has a \(10.0.0.1\), b"):
        choose_nodes(ranks("z"), NODES, {}, only_named=True)


def test_a_node_as_ray_describes_it() -> None:
    described = {
        "NodeID": "2b",
        "NodeName": "b",
        "NodeManagerAddress": "10.0.0.2",
        "Resources": {"CPU": 4.0, "node:10.0.0.2": 1.0},
    }
    assert node_of(described) == NODES[1]


# --- what a plan's hosts are ---


@pytest.fixture
def replica(tmp_path: Path) -> ReplicaPlan:
    path = tmp_path / "plan.yaml"
    path.write_text(
        "stages: [{layers: 0-1, devices: [cpu]}, {layers: 1-2, devices: [{device: 'cuda:3', "
        "host: b}, {device: cpu, host: b}]}]"
    )
    (found,) = Parallelism(file=read_plan(path), hosts_are_apart=True).replicas(SPEC)
    return found


def test_devices_and_threads_of_other_machines_are_not_ours_to_count(replica: ReplicaPlan) -> None:
    here, _, away = (rank for each in replica.instances for rank in each.ranks)
    assert here.num_threads == len(os.sched_getaffinity(0))
    assert away.num_threads is None


def test_hosts_are_the_clusters_where_one_is_up(
    replica: ReplicaPlan,
    session: subprocess.Popen[bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path))
    monkeypatch.delenv("SHOAL_LAB_STATE", raising=False)
    with pytest.raises(ConfigError, match="neither a lab nor a cluster is up"):
        plan_hosts((replica,), "m")
    folder = ClusterFolder(tmp_path / "cluster")
    with folder.locked():
        folder.write_record(record_of(session, tmp_path))
    (name, host), *others = plan_hosts((replica,), "m").items()
    assert (name, others) == ("b", [])
    assert host.cluster is not None
    assert (host.cluster.address, host.cluster.here) == ("10.0.0.1:4000", "10.0.0.1")
    assert host.cluster.token_file == str(folder.token)
    folder.write_record(replace(record_of(session, tmp_path), is_head=False))
    with pytest.raises(ConfigError, match="only joined the cluster; serve from its head"):
        plan_hosts((replica,), "m")


# --- an executor and an agent ---


def linked() -> tuple[AgentLink, AgentLink, Mesh]:
    """An executor's end, an agent's, and the mesh below the agent's."""
    pairs = {name: zmq.curve_keypair() for name in (EXECUTOR, "w")}
    public = {name: pair[0].decode() for name, pair in pairs.items()}
    meshes = {name: Mesh(MeshKeys(name, pair[1].decode(), public)) for name, pair in pairs.items()}
    meshes["w"].connect(EXECUTOR, meshes[EXECUTOR].address)
    meshes[EXECUTOR].connect("w", meshes["w"].address)
    return AgentLink(meshes[EXECUTOR], "w"), AgentLink(meshes["w"], EXECUTOR), meshes["w"]


def test_bytes_go_both_ways_in_order() -> None:
    executor, agent, _ = linked()
    for word in b"one", b"two":
        executor.send(Kind.DATA, word)
    executor.send(Kind.KILL)
    agent.send(Kind.ENDED, b"-9")
    took = [agent.receive(5.0) for _ in range(3)]
    assert [(each[0], bytes(each[1])) for each in took if each] == [
        (Kind.DATA, b"one"),
        (Kind.DATA, b"two"),
        (Kind.KILL, b""),
    ]
    answer = executor.receive(5.0)
    assert answer is not None
    assert (answer[0], bytes(answer[1])) == (Kind.ENDED, b"-9")
    assert agent.receive(0.0) is None
    executor.close()
    agent.close()


def test_a_lost_message_ends_the_stream() -> None:
    executor, agent, mesh = linked()
    agent.send(Kind.DATA, b"one")
    AgentLink(mesh, EXECUTOR).send(Kind.DATA, b"one again")
    assert executor.receive(5.0) is not None
    with pytest.raises(WireError, match="w sent message 0 of kind 0; 1 was due"):
        executor.receive(5.0)
    executor.close()
    agent.close()


def test_silence_is_noticed() -> None:
    executor, agent, _ = linked()
    until_s = time.monotonic() + 60
    while executor.silent_s > 0.3:
        assert time.monotonic() < until_s
        time.sleep(0.01)
    agent.close()
    while executor.silent_s < 0.6:
        assert time.monotonic() < until_s
        time.sleep(0.01)
    executor.close()
