"""What a probe's process measures, on the machine that the tests run on; and the process itself.

No rate is held to a bound: that would be a test of the machine.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from comm_ranks import each_in_a_thread

from shoal.cluster.cluster_file import read_cluster
from shoal.cluster.cluster_writer import dump_cluster
from shoal.comm.in_process import in_process_groups
from shoal.core.measured import DeviceMeasure
from shoal.executor.launcher import LocalLauncher
from shoal.probe import cpu
from shoal.probe.asked import Site
from shoal.probe.checks import warnings_of
from shoal.probe.cpu import cpu_model, held_back, measure_cpu
from shoal.probe.cuda import measure_cuda
from shoal.probe.disk import read_rate
from shoal.probe.found import cluster_of, remarks_of
from shoal.probe.rounds import per_second
from shoal.probe.survey import survey
from shoal.probe.ways import message_points, sum_points
from shoal.wire.worker_messages import Link
from shoal.worker.speed import Speed


class CountingSpeed(Speed):
    """Keeps in which order it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def begin(self) -> None:
        self.calls.append("begin")

    def pay(self) -> None:
        self.calls.append("pay")


def assert_whole(measure: DeviceMeasure) -> None:
    rates = [measure.bandwidth_bytes_per_s, measure.host_bytes_per_s, 1 / measure.launch_s]
    rates += [rate for _, rate in measure.flops]
    assert all(0 < rate < math.inf for rate in rates)
    assert 0 < measure.memory_bytes <= measure.total_bytes
    assert measure.model
    assert measure.precisions


def test_what_runs_is_between_begin_and_pay() -> None:
    speed = CountingSpeed()
    rate = per_second(lambda: speed.calls.append("run"), 0.01, speed)
    assert rate > 0
    assert speed.calls[:4] == ["run", "begin", "run", "pay"]
    assert speed.calls[1:] == ["begin", "run", "pay"] * ((len(speed.calls) - 1) // 3)


def test_a_cpu_by_its_compiled_kernels() -> None:
    measure = measure_cpu(1, Speed(), 0.1)
    assert_whole(measure)
    assert [name for name, _ in measure.flops] == ["float32", "bfloat16", "int8", "int4"]
    assert measure.kernels.startswith("avx")


def test_a_cpu_without_compiled_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(num_threads: int) -> None:
        raise OSError("not built")

    monkeypatch.setattr(cpu, "Session", missing)
    measure = measure_cpu(1, Speed(), 0.1)
    assert_whole(measure)
    assert (measure.kernels, measure.precisions) == ("torch", ("float32",))


@pytest.mark.gpu
def test_a_gpu() -> None:
    measure = measure_cuda(torch.device("cuda", 0), Speed(), 2.0)
    assert_whole(measure)
    assert {"float32", "float16"} <= {name for name, _ in measure.flops}


def test_what_the_kernel_says_of_cpus(tmp_path: Path) -> None:
    assert cpu_model(tmp_path)  # the machine's architecture, at least
    assert list(held_back(2, tmp_path)) == []
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/\n")
    (tmp_path / "proc/cpuinfo").write_text("processor : 0\nmodel name : Old One\n")
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/cpu.max").write_text("150000 100000\n")
    assert cpu_model(tmp_path) == "Old One"
    assert list(held_back(2, tmp_path)) == ["a control group allows 1.5 CPUs, and 2 threads work"]
    assert list(held_back(1, tmp_path)) == []
    governor = tmp_path / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"
    governor.parent.mkdir(parents=True)
    governor.write_text("powersave\n")
    assert list(held_back(1, tmp_path)) == ["the frequency governor is powersave"]
    governor.with_name("scaling_driver").write_text("intel_pstate\n")  # scales by itself
    assert list(held_back(1, tmp_path)) == []


def test_a_disk_is_read_and_nothing_is_left_there(tmp_path: Path) -> None:
    assert read_rate(tmp_path / "new", 16 << 20) > 0
    assert list((tmp_path / "new").iterdir()) == []


def test_messages_on_a_link_that_is_known() -> None:
    def round_trip(num_bytes: int) -> float:
        return 0.002 + num_bytes / 1e8  # there and back, with 1 ms each way

    points = message_points(round_trip)
    assert [size for size, _ in points] == [1 << 10, 16 << 10, 128 << 10, 1 << 20]
    assert [time for _, time in points] == pytest.approx([0.001 + size / 1e8 for size, _ in points])


def test_large_messages_are_left_out_where_they_take_long() -> None:
    assert [size for size, _ in message_points(lambda size: size / 1e4)] == [1 << 10, 16 << 10]


def test_sums_have_the_same_sizes_on_every_rank() -> None:
    groups = in_process_groups(2, 30.0)
    found = each_in_a_thread(lambda rank: sum_points(groups[rank], torch.device("cpu")), range(2))
    assert found[0] == found[1]
    assert all(
        earlier[1] < later[1] for earlier, later in zip(found[0], found[0][1:], strict=False)
    )


def test_processes_measure_two_hosts_of_a_lab(tmp_path: Path) -> None:
    """The real ones, over real sockets; the link between them is a slow one."""
    sites = [
        Site(name=f"{host}.cpu", host=host, device="cpu", machine="one", num_threads=1, speed=speed)
        for host, speed in (("a", 1.0), ("b", 0.5))
    ]
    slow = {("a", "b"): Link(bandwidth_bytes_per_s=4e6, latency_s=0.02)}
    steps: list[int] = []
    found = survey(
        LocalLauncher({}), sites, slow, lambda what, done, total: steps.append(done), device_s=0.1
    )
    assert found.problems == []
    assert steps == list(range(len(steps)))
    assert set(found.together) == set(found.alone) == {"a.cpu", "b.cpu"}
    points = found.ways["a.cpu", "b.cpu"]
    assert points[0][1] >= 0.01  # the link's own latency is in it
    assert points[-1][1] >= points[-1][0] / 4e6 / 2
    text = dump_cluster(cluster_of(found), remarks_of(found, warnings_of(found), "today"))
    (tmp_path / "cluster.yaml").write_text(text)
    cluster = read_cluster(tmp_path / "cluster.yaml")
    assert [each.hosts for each in cluster.all_reduce] == [("a", "b")]
    assert cluster.link("a.cpu", "b.cpu").bytes_per_s < 16e6
