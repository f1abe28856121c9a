"""Labs without running one: lab files, settings for workers, the folder, wrong commands."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_plan_file import SPEC

from shoal.cli.serving import lab_hosts
from shoal.core.errors import ConfigError
from shoal.core.plan import ReplicaPlan
from shoal.executor.lab_state import LabState
from shoal.lab.file import LabFile, LinkSpeed, read_lab
from shoal.lab.folder import HostState, LabFolder, LinkState, Record, Settings, state_of_environment
from shoal.lab.links import first_settings, members, with_cuts, workers_of
from shoal.lab.server import end, is_alive, process_state, started_s

PLAN = """\
model: smollm2-135m
stages:
  - {layers: 0-15, devices: [{device: cpu, host: a}, {device: cpu, host: a, speed: 0.5}]}
  - {layers: 15-30, devices: [{device: cpu, host: b}]}
"""


def read(text: str, folder: Path) -> LabFile:
    file = folder / "lab.yaml"
    file.write_text(text)
    return read_lab(file)


def replica_of(lab: LabFile) -> ReplicaPlan:
    assert lab.plan is not None
    (replica,) = lab.plan.resolve(SPEC).replicas
    return replica


# --- lab.yaml ---


def test_a_lab_file(tmp_path: Path) -> None:
    links = "links:\n  default: {bandwidth: 20Mbit}\n  b | a: {bandwidth: 1.5 Gbit, latency: 5ms}\n"
    lab = read(f"{PLAN}hosts: [b, a, c]\n{links}", tmp_path)
    assert lab.plan is not None
    assert (lab.plan.model, lab.hosts) == ("smollm2-135m", ("b", "a", "c"))
    assert lab.links == {
        ("a", "b"): LinkSpeed(187.5e6, 0.005),
        ("a", "c"): LinkSpeed(2.5e6),
        ("b", "c"): LinkSpeed(2.5e6),
    }


def test_hosts_and_links_may_be_left_out(tmp_path: Path) -> None:
    lab = read(PLAN, tmp_path)
    assert (lab.hosts, lab.links) == (("a", "b"), {})
    assert read("stages: [{devices: cpu}]", tmp_path).hosts == ()


def test_the_plan_may_be_a_file_beside_it(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(PLAN)
    lab = read("plan: plan.yaml\nlinks: {a|b: {latency: 2 s}}", tmp_path)
    assert (lab.hosts, lab.links) == (("a", "b"), {("a", "b"): LinkSpeed(None, 2.0)})


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        (f"{PLAN}host: [a]", 5, "unknown key 'host'; did you mean hosts?"),
        (f"{PLAN}plan: x.yaml", 1, "model stands beside plan"),
        (f"{PLAN}hosts: [a]", 4, "host 'b' is none of hosts: a; add it there"),
        (f"{PLAN}hosts: [a, b, a]", 5, "host a stands there twice"),
        (f"{PLAN}hosts: [a, b, My.Host]", 5, "'My.Host'; use up to 8 small letters and digits"),
        (f"{PLAN}hosts: [a, b, ../c]", 5, "use up to 8 small letters"),
        (f"{PLAN}links: {{a|c: {{}}}}", 5, "it must be two of the hosts (a, b)"),
        (f"{PLAN}links: {{a|a: {{}}}}", 5, "it must be two of the hosts"),
        (f"{PLAN}links: {{a|b: {{speed: 1}}}}", 5, "unknown key 'speed'"),
        (f"{PLAN}links: {{a|b: {{bandwidth: 20}}}}", 5, "a rate such as 20Mbit"),
        (f"{PLAN}links: {{a|b: {{bandwidth: 20MB}}}}", 5, "a rate such as 20Mbit"),
        (f"{PLAN}links: {{a|b: {{bandwidth: 1bit}}}}", 5, "from 1Kbit to 1000Gbit"),
        (f"{PLAN}links: {{a|b: {{latency: 11s}}}}", 5, "10s at most"),
        ("stages: [{devices: cpu}]\nhosts: [a]", 1, "names no host, and the lab has some"),
        ("stages:\n- devices: [{device: cpu, host: A}]", 2, "use up to 8 small letters"),
        ("hosts: {a: {speed: 2}}", 1, "speed is '2'"),
        ("hosts: {a: {}, A: {}}", 1, "use up to 8 small letters"),
        ("hosts: {a: {}, a: {}}", 1, "host a stands there twice"),
        (f"{PLAN}hosts: {{a: {{}}}}", 4, "host 'b' is none of hosts: a"),
    ],
)
def test_errors_name_line_and_remedy(text: str, line: int, words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)) as raised:
        read(text, tmp_path)
    assert str(raised.value).startswith(f"{tmp_path / 'lab.yaml'}:{line}: ")


HOSTS = "hosts: {a: {speed: 1.0}, b: {speed: 0.5, threads: 1}}\n"


def test_hosts_that_say_what_they_are_need_no_plan(tmp_path: Path) -> None:
    lab = read(f"{HOSTS}links: {{default: {{bandwidth: 20Mbit}}}}", tmp_path)
    assert (lab.plan, lab.hosts) == (None, ("a", "b"))
    assert [(each.host, each.speed, each.num_threads) for each in lab.cpus(8)] == [
        ("a", 1.0, 4),
        ("b", 0.5, 1),
    ]
    with pytest.raises(ConfigError, match="no speeds of their own"):
        read(PLAN, tmp_path).cpus(8)


def test_any_plan_runs_on_such_hosts(tmp_path: Path) -> None:
    (tmp_path / "lab.yaml").write_text(HOSTS)
    plan = tmp_path / "plan.yaml"
    plan.write_text(
        "replicas:\n"
        "  - {stages: [{devices: [{device: cpu, host: a}]}]}\n"
        "  - {stages: [{devices: [{device: cpu, host: b, threads: 3}]}]}\n"
    )
    lab = read_lab(tmp_path / "lab.yaml", plan)
    assert lab.plan is not None
    replicas = [lab.with_hosts(each, 8) for each in lab.plan.resolve(SPEC).replicas]
    assert workers_of(replicas) == {"replica-0/s0.i0.r0": "a", "replica-1/s0.i0.r0": "b"}
    settings = first_settings(replicas, {("a", "b"): LinkSpeed(1e6)}, {}, has_namespaces=False)
    assert settings.speeds == {"replica-0/s0.i0.r0": 1.0, "replica-1/s0.i0.r0": 0.5}
    assert settings.links == {}
    assert [each.instances[0].ranks[0].num_threads for each in replicas] == [4, 3]
    plan.write_text("stages: [{devices: [{device: cpu, host: b, speed: 0.3}]}]")
    slower = read_lab(tmp_path / "lab.yaml", plan).plan
    assert slower is not None
    with pytest.raises(ConfigError, match=r"host b at speed 0\.3, the lab at 0\.5"):
        lab.with_hosts(slower.resolve(SPEC).replicas[0], 8)


# --- what workers are told ---


@pytest.fixture
def lab(tmp_path: Path) -> LabFile:
    return read(f"{PLAN}links: {{a|b: {{bandwidth: 20Mbit, latency: 5ms}}}}", tmp_path)


def test_links_of_hosts_become_links_of_workers(lab: LabFile) -> None:
    replica = replica_of(lab)
    assert workers_of([replica]) == {"s0.i0.r0": "a", "s0.i0.r1": "a", "s1.i1.r0": "b"}
    settings = first_settings([replica], lab.links, {"a": HostState()}, has_namespaces=False)
    assert settings.speeds == {"s0.i0.r0": 1.0, "s0.i0.r1": 0.5, "s1.i1.r0": 1.0}
    slow = LinkState(bandwidth=2.5e6, latency=0.005)
    assert settings.links == {"s0.i0.r0|s1.i1.r0": slow, "s0.i0.r1|s1.i1.r0": slow}
    on_wires = first_settings([replica], lab.links, {}, has_namespaces=True)
    assert set(on_wires.links.values()) == {LinkState(latency=0.005)}


def test_cuts_keep_the_speed_of_a_link(lab: LabFile) -> None:
    replica = replica_of(lab)
    workers = workers_of([replica])
    first = first_settings([replica], lab.links, {}, has_namespaces=False)
    cut = with_cuts(first, workers, (("b", "s0.i0.r0"), ("s0.i0.r0", "s0.i0.r1")))
    assert cut.links["s0.i0.r0|s1.i1.r0"] == LinkState(True, 2.5e6, 0.005)
    assert cut.links["s0.i0.r0|s0.i0.r1"].cut
    assert not cut.links["s0.i0.r1|s1.i1.r0"].cut
    healed = with_cuts(cut, workers, ())
    assert not any(link.cut for link in healed.links.values())
    assert healed.links["s0.i0.r0|s1.i1.r0"].bandwidth == 2.5e6


def test_a_name_means_a_worker_an_instance_a_stage_or_a_host() -> None:
    workers = {"s0.i0.r0": "a", "s1.i1.r0": "b", "s1.i2.r0": "b", "s11.i3.r0": ""}
    assert members(workers, "s1.i2.r0") == ["s1.i2.r0"]
    assert members(workers, "s1") == ["s1.i1.r0", "s1.i2.r0"] == members(workers, "b")
    assert members(workers, "s1.i1") == ["s1.i1.r0"]
    assert members(workers, "x") == members(workers, "s") == []


def test_executors_read_what_labs_write(lab: LabFile, tmp_path: Path) -> None:
    folder = LabFolder(tmp_path / "lab")
    replica = replica_of(lab)
    with folder.locked():
        folder.write_settings(first_settings([replica], lab.links, {}, has_namespaces=False))
    state = LabState(folder.settings, dict(workers_of([replica])))
    assert state.changed()
    assert not state.changed()
    told = state.wanted("s0.i0.r1", 1.0)
    assert told.speed == 0.5
    assert told.links["s1.i1.r0"].bandwidth_bytes_per_s == 2.5e6
    state.write_workers({"s0.i0.r0": 17})
    assert folder.worker_pids() == {"s0.i0.r0": 17}


def test_a_server_finds_the_hosts_of_its_lab(
    lab: LabFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = LabFolder(tmp_path / "lab")
    hosts = {"a": HostState(("run", "in", "a"), "10.77.0.1"), "b": HostState()}
    with folder.locked():
        folder.write_settings(Settings(hosts=hosts))
    replicas = (replica_of(lab),)
    with pytest.raises(ConfigError, match="names host 'a', and neither a lab nor a cluster is up"):
        lab_hosts(replicas)
    monkeypatch.setenv("SHOAL_LAB_STATE", str(folder.settings))
    found = lab_hosts(replicas)
    assert (found["a"].command, found["a"].address) == (("run", "in", "a"), "10.77.0.1")
    assert (found["b"].command, found["b"].address) == ((), "127.0.0.1")
    assert state_of_environment({}) is None


# --- the folder ---


def test_a_folder_keeps_a_record_and_goes_whole(tmp_path: Path) -> None:
    folder = LabFolder(tmp_path / "labs" / "lab")
    record = Record(
        server_pid=1,
        server_started_s=2.0,
        workers={"s0.i0.r0": "a"},
        cuts=(("a", "b"),),
        links={"a|b": None},
    )
    with folder.locked():
        assert folder.read_record() is None
        folder.write_record(record)
        assert folder.read_record() == record
        with pytest.raises(ConfigError, match="another command is at this lab"), folder.locked():
            pass
        folder.clear()
        assert folder.read_record() is None
        folder.remove()
    assert list(tmp_path.iterdir()) == []
    with folder.locked():
        assert folder.path.exists()


def test_a_damaged_record_is_said(tmp_path: Path) -> None:
    folder = LabFolder(tmp_path)
    (tmp_path / "record.json").write_text("{")
    with pytest.raises(ConfigError, match=r"cannot be read .* take it down: shoal lab down"):
        folder.read_record()
    (tmp_path / "x").mkdir()
    LabFolder(tmp_path / "x" / "labs" / "lab").path.mkdir(parents=True)
    (tmp_path / "x" / "labs" / "lab" / "record.json").write_text("{")
    assert shoal_lab(tmp_path / "x", "down").stdout == "the lab is down\n"
    assert list((tmp_path / "x").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("record.json", "[1, 2]"),
        ("record.json", '{"server_pid": 1}'),
        ("record.json", '{"server_pid": 1, "server_started_s": 0, "cuts": 3}'),
        ("record.json", '{"server_pid": 1, "server_started_s": 0, "cuts": [], "later": 1}'),
        ("settings.json.workers", '{"s0.i0.r0": null}'),
        ("settings.json.workers", "7"),
    ],
)
def test_whatever_is_damaged_goes_all_the_same(name: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / "labs" / "lab"
    (path / "a folder").mkdir(parents=True)
    (path / "settings.json").write_text("{}")
    (path / name).write_text(text)
    done = shoal_lab(tmp_path, "down")
    assert (done.returncode, done.stdout) == (0, "the lab is down\n"), done.stderr
    assert "cannot be read" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_nobody_wrote_down_is_ended(tmp_path: Path) -> None:
    """`shoal lab up` was killed just after it had started one."""
    path = tmp_path / "labs" / "lab"
    path.mkdir(parents=True)
    sleep = [sys.executable, "-c", "import time; time.sleep(600)", "serve", "x", "--plan"]
    ours = subprocess.Popen([*sleep, str(path / "plan.yaml")])
    another = subprocess.Popen([*sleep, str(tmp_path / "plan.yaml")])
    try:
        assert shoal_lab(tmp_path, "down").stdout == "the lab is down\n"
        assert ours.wait(60) is not None
        assert another.poll() is None
    finally:
        for each in (ours, another):
            each.kill()
            each.wait()


def test_only_the_process_that_was_recorded_is_ended() -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        began_s = started_s(process.pid)
        assert is_alive(process.pid, began_s)
        end(process.pid, began_s - 100)
        assert process.poll() is None
        assert process_state(process.pid) == "gone"  # a process, but no worker
        end(process.pid, began_s)
        assert process.wait(60) is not None
    finally:
        process.kill()
    assert not is_alive(process.pid, began_s)
    assert process_state(None) == process_state(process.pid) == "gone"


# --- commands that cannot be ---


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["slow", "s0.i0.r0", "0.5"], "no lab is up"),
        (["status"], "no lab is up"),
        (["kill", "s0", "--name", "../x"], "use up to 20 letters and digits"),
        (["up", "none.yaml"], "No such file"),
    ],
)
def test_errors_of_commands(args: list[str], words: str, tmp_path: Path) -> None:
    done = shoal_lab(tmp_path, *args)
    assert done.returncode == 1
    assert words in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_down_without_a_lab(tmp_path: Path) -> None:
    done = shoal_lab(tmp_path, "down")
    assert (done.returncode, done.stdout) == (0, "no lab was up\n")
    assert list(tmp_path.iterdir()) == []


def test_commands_of_a_lab_whose_server_is_gone(tmp_path: Path) -> None:
    folder = LabFolder(tmp_path / "labs" / "lab")
    with folder.locked():
        folder.write_settings(Settings())
        workers = {"s0.i0.r0": "", "s1.i1.r0": ""}
        folder.write_record(Record(server_pid=1, server_started_s=2.0, workers=workers))
    told = json.loads(shoal_lab(tmp_path, "status", "--json").stdout)
    assert [each["state"] for each in told["workers"]] == ["gone", "gone"]
    assert not told["server"]
    assert "did you mean s0.i0.r0?" in shoal_lab(tmp_path, "kill", "s0.i0.r1").stderr
    assert "no process just now" in shoal_lab(tmp_path, "stop", "s1").stderr
    assert "cannot be cut from itself" in shoal_lab(tmp_path, "cut", "s1", "s1").stderr
    shoal_lab(tmp_path, "cut", "s1", "s0")
    assert folder.read_settings().links["s0.i0.r0|s1.i1.r0"].cut
    assert "are not cut; s1 s0: name" in shoal_lab(tmp_path, "heal", "s1", "s2").stderr
    shoal_lab(tmp_path, "heal", "s0", "s1")
    assert not folder.read_settings().links["s0.i0.r0|s1.i1.r0"].cut
    shoal_lab(tmp_path, "slow", "s1", "0.25")
    assert folder.read_settings().speeds == {"s1.i1.r0": 0.25}
    assert shoal_lab(tmp_path, "down").stdout == "the lab is down\n"
    assert list(tmp_path.iterdir()) == []


def shoal_lab(cache: Path, *args: str) -> subprocess.CompletedProcess[str]:
    program = "from shoal.cli.main import main; main()"
    return subprocess.run(
        [sys.executable, "-c", program, "lab", *args],
        capture_output=True,
        text=True,
        env={**os.environ, "SHOAL_CACHE": str(cache)},
    )
