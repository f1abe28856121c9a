"""Probing without measuring: who is asked what, what becomes of the answers, what is refused.

Processes are pretended: they answer at once from a table.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from shoal.cli.own_plan import own_plan
from shoal.cli.probe_sites import here_or_cluster, probe_cache
from shoal.cluster.cluster_file import read_cluster
from shoal.cluster.cluster_writer import dump_cluster, warnings_in
from shoal.cluster.topology import Gpu, GpuPair, Nic, PcieLink, Topology
from shoal.core.cluster import Cluster, Points
from shoal.core.errors import ConfigError, DeviceError
from shoal.core.measured import DeviceMeasure, bytes_per_s, latency_s
from shoal.core.options import EngineOptions
from shoal.core.plan import RankPlan
from shoal.executor.launcher import Launch, WorkerCodec
from shoal.model.known_shapes import shape_folder
from shoal.model.spec import read_spec
from shoal.probe.asked import Site
from shoal.probe.checks import warnings_of
from shoal.probe.found import cluster_of, remarks_of
from shoal.probe.survey import Survey, survey
from shoal.wire.channel import Codec
from shoal.wire.probe_messages import (
    Answer,
    DescribeMachine,
    DeviceMeasured,
    DiskMeasured,
    LaunchProbe,
    MachineDescribed,
    MeasureDevice,
    MeasureDisk,
    MeasureSums,
    MeasureWay,
    Question,
    SumsMeasured,
    Unmeasured,
    WayMeasured,
)
from shoal.wire.worker_messages import Bound, FromWorker, Lab, Link, ToWorker

Reply = Callable[[str, Question], Answer | None]

CPU = DeviceMeasure(
    model="Some CPU",
    is_cpu=True,
    memory_bytes=12 << 30,
    total_bytes=16 << 30,
    bandwidth_bytes_per_s=2e10,
    flops=(("float32", 4e11), ("int8", 1.5e12)),
    precisions=("float32", "int8"),
    launch_s=3e-6,
    host_bytes_per_s=8e9,
    num_threads=4,
    kernels="avx2",
)
GPU = DeviceMeasure(
    model="NVIDIA GeForce RTX 4090",
    is_cpu=False,
    memory_bytes=23 << 30,
    total_bytes=24 << 30,
    bandwidth_bytes_per_s=9.4e11,
    flops=(("bfloat16", 1.6e14),),
    precisions=("bfloat16", "int8"),
    launch_s=4e-6,
    host_bytes_per_s=1.4e9,
    watts=300.0,
    held_back=("power cap",),
    uuid="1234",
)
CARD = Gpu(
    index=0,
    name="NVIDIA GeForce RTX 4090",
    uuid="GPU-1234",
    pci_address="0000:01:00.0",
    pcie=PcieLink(generation=1, width=4, max_generation=4, max_width=16),
    power_limit_w=300.0,
    default_power_limit_w=450.0,
)
WAY = ((1 << 10, 1e-4), (1 << 20, 1e-2))


class PretendedProcesses:
    """A launcher of processes that answer at once; what they were asked and told is kept."""

    def __init__(self, reply: Reply) -> None:
        self.reply = reply
        self.asked: list[tuple[str, Question]] = []
        self.told: dict[str, Lab] = {}
        self.running: set[str] = set()
        self.is_closed = False

    async def place(self, instance: int, ranks: Sequence[RankPlan]) -> Sequence[_Spot]:
        return [_Spot(self) for _ in ranks]

    def close(self) -> None:
        self.is_closed = True


class _Spot:
    address, is_child, num_cpus = "127.0.0.1", True, None

    def __init__(self, launcher: PretendedProcesses) -> None:
        self._launcher = launcher

    async def start(self, launch: Launch, codec: WorkerCodec) -> _Process:
        assert isinstance(launch, LaunchProbe)
        return _Process(self._launcher, launch.name)


class _Process:
    pid = 1

    def __init__(self, launcher: PretendedProcesses, name: str) -> None:
        self._launcher, self._name = launcher, name
        self._codec: Codec[ToWorker, FromWorker] = Codec(ToWorker)
        self._said: asyncio.Queue[FromWorker | None] = asyncio.Queue()
        self._said.put_nowait(Bound(("tcp://x",), 1))
        launcher.running.add(name)

    async def receive(self) -> FromWorker | None:
        return await self._said.get()

    def send_frame(self, frame: bytes) -> None:
        message = self._codec.decode(frame[4:])
        if isinstance(message, Lab):
            self._launcher.told[self._name] = message
        if isinstance(message, Question):
            self._launcher.asked.append((self._name, message))
            self._said.put_nowait(self._launcher.reply(self._name, message))

    def kill(self, pid: int) -> None:
        self._launcher.running.discard(self._name)
        self._said.put_nowait(None)

    def wait(self) -> str:
        return "was ended"


def answering(
    measures: Mapping[str, DeviceMeasure], topologies: Mapping[str, Topology] | None = None
) -> Reply:
    def reply(name: str, question: Question) -> Answer:
        match question:
            case MeasureDevice():
                return DeviceMeasured(measures[name])
            case MeasureWay():
                return WayMeasured(WAY)
            case MeasureSums():
                return SumsMeasured(((4096, 2e-4), (1 << 20, 2e-2)))
            case MeasureDisk():
                return DiskMeasured(1.5e9)
            case DescribeMachine():
                topology = (topologies or {}).get(name, Topology())
                return MachineDescribed(msgspec.json.encode(topology))
        raise AssertionError(f"{question} is not expected")

    return reply


def site(host: str, device: str = "cpu", machine: str | None = None) -> Site:
    number = "cpu" if device == "cpu" else device.partition(":")[2]
    return Site(
        name=f"{host}.{number}",
        host=host,
        device=device,
        machine=machine or host,
        num_threads=1,
        place=host,
    )


def surveyed(
    sites: Sequence[Site], reply: Reply, links: Mapping[tuple[str, str], Link] | None = None
) -> tuple[Survey, PretendedProcesses]:
    launcher = PretendedProcesses(reply)
    found = survey(launcher, sites, links or {}, lambda what, done, total: None)
    assert (launcher.running, launcher.is_closed) == (set(), True)
    return found, launcher


def written(found: Survey, folder: Path) -> Cluster:
    text = dump_cluster(cluster_of(found), remarks_of(found, warnings_of(found), "today"))
    (folder / "cluster.yaml").write_text(text)
    assert warnings_in(text) == [*warnings_of(found), *found.problems]
    return read_cluster(folder / "cluster.yaml")


def assert_same(points: Points) -> None:
    """As `WAY`, to the digits that are written."""
    assert [size for size, _ in points] == [size for size, _ in WAY]
    assert [time for _, time in points] == pytest.approx([time for _, time in WAY])


def test_one_device_needs_nobody_else(tmp_path: Path) -> None:
    found, launcher = surveyed([site("local")], answering({"local.cpu": CPU}))
    assert [type(question) for _, question in launcher.asked] == [
        MeasureDevice,
        DescribeMachine,
        MeasureDisk,
    ]
    cluster = written(found, tmp_path)
    (device,) = cluster.devices
    assert (device.name, device.device, device.memory_bytes) == ("local.cpu", "cpu", 12 << 30)
    assert (device.bandwidth_bytes_per_s, device.flops, device.launch_s) == (2e10, CPU.flops, 3e-6)
    assert cluster.host("local").disk_bytes_per_s == 1.5e9


def test_a_labs_hosts_are_measured_alone_and_then_at_once(tmp_path: Path) -> None:
    sites = [replace(site(host, machine="one"), speed=0.5) for host in "abc"]
    calls = dict.fromkeys(("a.cpu", "b.cpu", "c.cpu"), 0)

    def reply(name: str, question: Question) -> Answer | None:
        if isinstance(question, MeasureDevice):
            calls[name] += 1
            rate = 2e10 if calls[name] == 1 else 1e10
            return DeviceMeasured(replace(CPU, bandwidth_bytes_per_s=rate))
        return answering({})(name, question)

    slow = Link(bandwidth_bytes_per_s=2.5e6, latency_s=0.001)
    found, launcher = surveyed(sites, reply, {("a", "b"): slow})
    assert launcher.told["a.cpu"] == Lab(0.5, {"b.cpu": slow})
    assert launcher.told["c.cpu"] == Lab(0.5, {})
    assert list(calls.values()) == [2, 2, 2]
    assert {each.bandwidth_bytes_per_s for each in found.alone.values()} == {2e10}
    assert sum("reads memory at 50%" in each for each in warnings_of(found)) == 3
    cluster = written(found, tmp_path)
    assert {each.bandwidth_bytes_per_s for each in cluster.devices} == {1e10}
    assert {each.memory_bytes for each in cluster.devices} == {4 << 30}  # they share one machine's
    assert {each.speed for each in cluster.devices} == {1.0}  # the rates have it already
    assert_same(cluster.link("a.cpu", "c.cpu").points)
    assert {each.hosts for each in cluster.all_reduce} == {
        *(("a", "b"), ("a", "c"), ("b", "c"), ("a", "b", "c")),
    }


def test_gpus_of_a_host_and_what_holds_them_back(tmp_path: Path) -> None:
    sites = [site("h", "cuda:0"), site("h", "cuda:1"), site("h")]
    second = replace(GPU, uuid="5678", held_back=(), model="NVIDIA Odd 9")
    topology = Topology(
        gpus=(CARD, replace(CARD, index=1, uuid="GPU-5678")),
        pairs=(GpuPair(a=0, b=1, connection="nvlink", bytes_per_s=4.5e11),),
    )
    reply = answering({"h.0": GPU, "h.1": second, "h.cpu": CPU}, {"h.0": topology})
    found, launcher = surveyed(sites, reply)
    kinds = {
        (question.kind, question.size)
        for _, question in launcher.asked
        if isinstance(question, MeasureSums)
    }
    assert kinds == {("nccl", 2)}
    cluster = written(found, tmp_path)
    assert [(each.name, each.kind, each.device) for each in cluster.devices] == [
        ("h.0", "RTX-4090", "cuda:0"),
        ("h.1", "Odd-9", "cuda:1"),
        ("h.cpu", "cpu", "cpu"),
    ]
    assert cluster.device("h.0").watts == 300.0
    assert cluster.host("h").all_reduce[0].num_ranks == 2
    assert cluster.link("h.0", "h.1").kind == "nvlink"
    assert_same(cluster.link("h.0", "h.cpu").points)
    said = "\n".join(warnings_of(found))
    assert "h.0 is held back: power cap" in said
    assert "h.0 may draw 300 W; it was made for 450 W" in said
    assert "h.0 has gen 1 x4 PCIe lanes; card and slot could do gen 4 x16" in said
    assert "h.0 is filled from its host at 1400 MB/s" in said
    assert "sums of h.0 and h.1 go at" in said


def test_gpus_that_cuda_sees_are_found_among_those_of_the_driver(tmp_path: Path) -> None:
    """CUDA_VISIBLE_DEVICES=3,2: neither the first ones nor in order; the others have no NVLink."""
    uuids = ("0001", "0002", "1234", "5678")
    cards = [
        replace(CARD, index=index, uuid=f"GPU-{uuid}", default_power_limit_w=300.0, pcie=None)
        for index, uuid in enumerate(uuids)
    ]
    pairs = (
        GpuPair(a=0, b=1, connection="bridge"),
        GpuPair(a=2, b=3, connection="nvlink", bytes_per_s=4.5e11),
    )
    first = replace(GPU, uuid="5678")
    topology = Topology(gpus=tuple(cards), pairs=pairs)
    sites = [site("h", "cuda:0"), site("h", "cuda:1")]
    found, _ = surveyed(sites, answering({"h.0": first, "h.1": GPU}, {"h.0": topology}))
    assert written(found, tmp_path).link("h.0", "h.1").kind == "nvlink"
    said = warnings_of(found)
    assert any("sums of h.0 and h.1 go at" in each for each in said)
    assert not any("power cap" in each for each in said)  # its own


def test_a_network_card_that_says_more_than_it_carries() -> None:
    nics = (
        Nic(name="eth0", is_up=True, bytes_per_s=1.25e9),
        Nic(name="veth", is_up=True, bytes_per_s=1.25e12, is_virtual=True),
    )
    topologies = {f"{host}.cpu": Topology(nics=nics) for host in "ab"}
    reply = answering({"a.cpu": CPU, "b.cpu": CPU}, topologies)
    found, _ = surveyed([site("a"), site("b")], reply)
    (warning,) = warnings_of(found)
    assert warning == ("hosts a and b exchange 846.5 Mbit/s; their network cards say 10 Gbit/s")


def test_among_many_hosts_the_median_stands_for_the_rest(tmp_path: Path) -> None:
    hosts = [f"n{number}" for number in range(6)]
    measures = dict.fromkeys((f"{host}.cpu" for host in hosts), CPU)

    def reply(name: str, question: Question) -> Answer | None:
        if question == MeasureWay("n5.cpu"):
            return WayMeasured(((1 << 10, 1e-4), (1 << 20, 1.0)))
        return answering(measures)(name, question)

    found, launcher = surveyed([site(host) for host in hosts], reply)
    assert sum(isinstance(question, MeasureWay) for _, question in launcher.asked) == 9
    cluster = written(found, tmp_path)
    assert cluster.network is not None
    assert_same(cluster.network.points)
    assert {frozenset((each.a, each.b)) for each in cluster.links} == {
        frozenset(("n4", "n5")),
        frozenset(("n0", "n5")),
    }
    assert_same(cluster.link("n1.cpu", "n3.cpu").points)


def test_what_cannot_be_measured_is_left_out_and_said(tmp_path: Path) -> None:
    def reply(name: str, question: Question) -> Answer | None:
        if name == "b.cpu":
            return None if isinstance(question, MeasureDevice) else Unmeasured("too late")
        if isinstance(question, MeasureDisk):
            return Unmeasured("no room")
        return answering({"a.cpu": CPU})(name, question)

    found, _ = surveyed([site("a"), site("b", machine="other")], reply)
    assert any("a.cpu: disk not measured: no room" in each for each in found.problems)
    assert any(each.startswith("b.cpu: its process has ended") for each in found.problems)
    cluster = written(found, tmp_path)
    assert [each.name for each in cluster.devices] == ["a.cpu"]


def test_nothing_measured_is_an_error_with_the_reasons() -> None:
    found, _ = surveyed([site("a")], lambda name, question: Unmeasured("it is broken"))
    with pytest.raises(DeviceError, match=r"a\.cpu: device not measured: it is broken"):
        cluster_of(found)


def test_a_rate_is_told_from_a_latency() -> None:
    assert latency_s(WAY) == 1e-4
    assert bytes_per_s(WAY) == pytest.approx((1 << 20) / 0.0099, rel=0.01)
    assert bytes_per_s(((1 << 10, 1e-3), (1 << 20, 1.1e-3))) == pytest.approx((1 << 20) / 1.1e-3)


def test_a_lab_without_speeds_is_refused_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "lab.yaml").write_text("stages: [{devices: [{device: cpu, host: a}]}]\n")
    command = [sys.executable, "-m", "shoal", "probe", "--lab", str(tmp_path / "lab.yaml")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert "hosts have no speeds of their own" in done.stderr


# --- `shoal serve` without a plan ---


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


LLAMA = shape_folder("llama-3.1-8b")
OPTIONS = EngineOptions(model_path="", max_num_seqs=8)


def test_several_devices_of_a_cluster_file_are_planned_for(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("devices: 2x RTX-4090 pcie4\n")
    plan = own_plan(LLAMA, OPTIONS, file)
    assert plan is not None
    replicas = plan.resolve(read_spec(LLAMA)).replicas
    devices = [rank.device for each in replicas for part in each.instances for rank in part.ranks]
    assert sorted(devices) == ["cuda:0", "cuda:1"]
    assert {part.quantize for each in replicas for part in each.instances} == {None}
    said = capsys.readouterr().err
    assert "made for 2 of the 2 devices" in said
    assert len(list((cache / "plans").iterdir())) == 1


def test_one_device_needs_no_plan(cache: Path, tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("devices: 1x RTX-4090\n")
    assert own_plan(LLAMA, OPTIONS, file) is None
    assert own_plan(LLAMA, OPTIONS, None) is None  # nothing was probed


def test_what_was_probed_here_is_planned_for(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probe_cache().write(here_or_cluster().key, "devices: 2x RTX-4090 pcie4\n")
    assert own_plan(LLAMA, OPTIONS, None) is not None
    probe_cache().write(here_or_cluster().key, "devices: [2x RTX-3060, 1x RTX-4090]\n")
    assert own_plan(LLAMA, OPTIONS, None) is None  # what is kept is wrong: said, and left alone


def test_a_cluster_file_that_is_wrong_is_an_error(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text("devices: 2x RTX-4090 pcie9\n")
    with pytest.raises(ConfigError):
        own_plan(LLAMA, OPTIONS, tmp_path / "cluster.yaml")
