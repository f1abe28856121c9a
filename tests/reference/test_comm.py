"""Collectives of every kind: sums of any size, the same bits everywhere, and what goes wrong."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from comm_ranks import KINDS, Board, each_in_a_thread, make_groups, on_all
from torch import Tensor

from shoal.comm import Group
from shoal.comm.backend import RestartableBackend
from shoal.comm.gloo import GlooGroup
from shoal.comm.interfaces import interface_of, measure
from shoal.comm.memory import create_memory
from shoal.comm.shared_memory import SharedMemoryGroup
from shoal.comm.stretch import Stretch
from shoal.core.errors import CommError, ConfigError

LOCAL = ("in_process", "shared_memory")
COUNTS = (1, 7, 576, 16384, 16385, 65536, 65537, 200_003, 1_310_720)


@pytest.fixture(params=[(kind, size) for kind in KINDS for size in range(1, 6)], ids=str)
def groups(request: pytest.FixtureRequest) -> Iterator[list[Group]]:
    made = make_groups(*request.param)
    yield made
    for group in made:
        group.close()


def parts_of(size: int, count: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(count)
    return [torch.randn(count, generator=generator).to(dtype) for _ in range(size)]


def summed(group: Group, parts: list[Tensor]) -> Tensor:
    mine = parts[group.rank].clone()
    group.all_reduce(mine)
    return mine


def test_sums_have_the_same_bits_on_all_ranks(groups: list[Group]) -> None:
    for count in COUNTS:
        parts = parts_of(len(groups), count)
        sums = on_all(groups, lambda group, parts=parts: summed(group, parts))
        assert all(torch.equal(sums[0], each) for each in sums)
        in_order = parts[0].clone()
        for part in parts[1:]:
            in_order += part
        if not isinstance(groups[0], GlooGroup) or count <= 16384:
            assert torch.equal(sums[0], in_order)
        torch.testing.assert_close(sums[0], in_order)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [100, 70_000])
def test_sums_of_other_types_are_rounded_once(kind: str, dtype: torch.dtype, count: int) -> None:
    groups, parts = make_groups(kind, 3), parts_of(3, count, dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    want = ((parts[0].to(wide) + parts[1]) + parts[2]).to(dtype)
    for got in on_all(groups, lambda group: summed(group, parts)):
        torch.testing.assert_close(got, want, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("shape", [(3,), (2, 5, 7), (0, 4), (300_000,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
@pytest.mark.parametrize("kind", KINDS)
def test_gathers_what_all_ranks_have(kind: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    parts = [
        (torch.arange(torch.Size(shape).numel()) * r % 5).to(dtype).view(shape) for r in (1, 2, 3)
    ]
    groups = make_groups(kind, 3)
    for got in on_all(groups, lambda group: group.all_gather(parts[group.rank])):
        assert torch.equal(got, torch.stack(parts))


def test_gathers_a_tensor_that_is_not_contiguous() -> None:
    groups, part = make_groups("shared_memory", 2), torch.arange(12).view(3, 4).T
    for got in on_all(groups, lambda group: group.all_gather(part)):
        assert torch.equal(got, torch.stack([part, part]))


def test_many_collectives_of_changing_sizes() -> None:
    """Slots alternate: a rank that ran ahead must not overwrite what another still reads."""
    groups = make_groups("shared_memory", 3)
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(1, 90_000, (150,), generator=generator).tolist()

    def run(group: Group) -> list[float]:
        sums = []
        for number, count in enumerate(counts):
            mine = torch.full((count,), float(number * 3 + group.rank))
            group.all_reduce(mine)
            assert mine.min() == mine.max()
            sums.append(float(mine[0]))
            assert group.all_gather(torch.tensor([number])).tolist() == [[number]] * 3
        return sums

    for sums in on_all(groups, run):
        assert sums == [float(number * 9 + 3) for number in range(len(counts))]


def test_kernels_can_call_it() -> None:
    groups, parts = make_groups("shared_memory", 3), parts_of(3, 5000)
    signature = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)

    def run(group: Group) -> Tensor:
        native, mine = group.native, parts[group.rank].clone()
        assert native is not None
        assert signature(native.function)(native.context, mine.data_ptr(), mine.numel()) == 0
        return mine

    for got in on_all(groups, run):
        assert torch.equal(got, (parts[0] + parts[1]) + parts[2])
    groups[0].abort()
    native = groups[1].native
    assert signature(native.function)(native.context, parts[1].data_ptr(), 5000) != 0


@pytest.mark.parametrize("count", [100, 1_000_000])
@pytest.mark.parametrize("kind", KINDS)
def test_an_abort_ends_the_call_that_waits_and_a_reset_begins_anew(kind: str, count: int) -> None:
    groups, parts = make_groups(kind, 3), parts_of(3, count)
    aborter = threading.Timer(0.3, groups[0].abort)
    aborter.start()
    with pytest.raises(CommError, match="aborted"):
        summed(groups[0], parts)  # the others never come
    aborter.join()
    with pytest.raises(CommError):
        summed(groups[0], parts)
    if kind == "gloo":
        for group in groups[1:]:
            group.abort()
    for group in groups[1:]:
        with pytest.raises(CommError):
            group.all_gather(parts[group.rank])
    for incarnation in (1, 2, 7):
        on_all(groups, lambda group, incarnation=incarnation: group.reset(incarnation))
        sums = on_all(groups, lambda group: summed(group, parts))
        assert all(torch.equal(sums[0], each) for each in sums)


@pytest.mark.parametrize("kind", LOCAL)
def test_an_abort_on_any_rank_reaches_all(kind: str) -> None:
    groups, parts = make_groups(kind, 4), parts_of(4, 50)
    aborter = threading.Timer(0.3, groups[3].abort)
    aborter.start()
    errors = each_in_a_thread(lambda group: summed(group, parts), groups[:3])
    aborter.join()
    assert [type(error) for error in errors] == [CommError] * 3


@pytest.mark.parametrize("kind", LOCAL)
def test_who_is_left_in_an_old_incarnation_fails_and_disturbs_nobody(kind: str) -> None:
    groups, parts = make_groups(kind, 3), parts_of(3, 50)
    for group in groups[:2]:
        group.reset(1)
    with pytest.raises(CommError):
        summed(groups[2], parts)
    groups[2].abort()  # of incarnation 0, which nobody else is in
    groups[2].reset(1)
    on_all(groups, lambda group: summed(group, parts))


@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_that_never_comes_is_noticed_at_the_deadline(kind: str) -> None:
    groups, parts = make_groups(kind, 2, deadline_s=0.5), parts_of(2, 50)
    with pytest.raises(CommError):
        summed(groups[0], parts)
    if kind != "gloo":
        with pytest.raises(CommError, match="aborted"):
            summed(groups[1], parts)  # late: the others have given up, and it waits for nobody


@pytest.mark.parametrize("kind", LOCAL)
def test_ranks_that_come_with_different_tensors_are_told(kind: str) -> None:
    groups = make_groups(kind, 2)
    errors = each_in_a_thread(lambda group: group.all_reduce(torch.zeros(5 + group.rank)), groups)
    assert all(isinstance(error, CommError) for error in errors)


@pytest.mark.timeout(60)
def test_more_ranks_than_cores_do_not_crawl() -> None:
    groups = make_groups("shared_memory", 4 * (os.cpu_count() or 1))

    def run(group: Group) -> None:
        tensor = torch.ones(576)
        for _ in range(100):
            group.all_reduce(tensor)

    on_all(groups, run)


def burn(cpu_s: float) -> None:
    until = time.thread_time() + cpu_s
    while time.thread_time() < until:
        pass


@pytest.mark.parametrize("kind", LOCAL)
def test_a_slow_rank_stretches_what_it_computed(kind: str) -> None:
    groups = make_groups(kind, 2)
    groups[1].set_speed(0.25)

    def run(group: Any) -> None:
        tensor = torch.ones(10)
        group.all_reduce(tensor)
        for _ in range(10):
            if group.rank == 1:
                burn(0.004)
            group.all_reduce(tensor)
        group.pay()

    began = time.monotonic()
    on_all(groups, run)
    assert time.monotonic() - began > 0.15
    groups[1].set_speed(1.0)
    with pytest.raises(ConfigError, match="speed is 0"):
        groups[1].set_speed(0)


def test_the_stretch_of_a_thread_alone() -> None:
    stretch, began = Stretch(0.2), time.monotonic()
    for _ in range(10):
        stretch.begin()
        burn(0.003)
        stretch.pay()
    assert time.monotonic() - began > 0.14


def test_waiting_for_a_core_is_no_part_of_a_slow_device(monkeypatch: pytest.MonkeyPatch) -> None:
    naps: list[float] = []
    computed_ns = iter([0, 3_000_000, 3_000_000, 4_000_000])
    waited_ns = iter([7_000_000, 9_000_000, 9_000_000, 90_000_000])
    clocks = SimpleNamespace(
        thread_time_ns=lambda: next(computed_ns),
        monotonic_ns=lambda: round(sum(naps) * 1e9),
        sleep=naps.append,
    )
    monkeypatch.setattr("shoal.comm.stretch.time", clocks)
    monkeypatch.setattr("shoal.comm.stretch._core_wait_ns", lambda: next(waited_ns))
    stretch = Stretch(0.25)
    for _ in range(2):
        stretch.begin()
        stretch.pay()
    assert naps == [pytest.approx(0.007)], "3 ms at a quarter, less 2 ms; then it waited too long"


RANK = """
import sys, time, torch
from shoal.comm.shared_memory import SharedMemoryGroup
fd, rank, size = map(int, sys.argv[1:])
group = SharedMemoryGroup(fd, rank, size, deadline_s=120)
tensor = torch.full((1000,), float(rank + 1))
group.all_reduce(tensor)
print(int(tensor[0]), flush=True)
while True:
    group.all_reduce(tensor.fill_(1))
"""


def named_memory() -> set[str]:
    """What this process maps of /dev/shm."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {line.split()[-1] for line in lines if "/dev/shm/" in line}


def test_processes_share_memory_that_has_no_name(tmp_path: Path) -> None:
    before = named_memory()
    fd = create_memory(3)
    command = [sys.executable, "-c", RANK, str(fd)]
    others = [
        subprocess.Popen(
            [*command, str(rank), "3"], pass_fds=[fd], stdout=subprocess.PIPE, text=True
        )
        for rank in (1, 2)
    ]
    try:
        group, tensor = SharedMemoryGroup(fd, 0, 3, deadline_s=120), torch.ones(1000)
        group.all_reduce(tensor)
        assert tensor.unique().tolist() == [6]
        assert named_memory() <= before
        for other in others:
            assert other.stdout is not None
            assert other.stdout.readline() == "6\n"
        os.kill(others[1].pid, signal.SIGKILL)
        threading.Timer(0.5, group.abort).start()
        with pytest.raises(CommError):
            while True:
                group.all_reduce(tensor)
        assert others[0].wait(60) == 1  # its collective failed too: a traceback, to stderr
    finally:
        for other in others:
            other.kill()
            other.communicate()
        os.close(fd)
    assert isinstance(group, SharedMemoryGroup)
    group.close()
    group.abort()
    with pytest.raises(CommError, match="closed"):
        group.all_reduce(tensor)


def test_memory_that_does_not_fit_is_refused() -> None:
    fd = create_memory(2)
    with pytest.raises(OSError, match="rank 0"):
        SharedMemoryGroup(fd, 0, 4)
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 10)  # a rank could crash the others
    os.close(fd)


@pytest.mark.parametrize("tensor", [torch.zeros(4, 4).T, torch.zeros(3, device="meta")], ids=str)
def test_shared_memory_sums_what_is_in_one_piece_on_the_cpu(tensor: Tensor) -> None:
    with pytest.raises(CommError, match="strides"):
        make_groups("shared_memory", 2)[0].all_reduce(tensor)


def test_gloo_needs_all_ranks_and_an_interface() -> None:
    with pytest.raises(CommError, match="did not find each other"):
        GlooGroup(Board().store(timeout_s=0.3), 0, 2, "127.0.0.1", deadline_s=1)
    with pytest.raises(CommError, match="nonesuch"):
        GlooGroup(Board().store(), 0, 1, "nonesuch")


class EndsAfterTheLook:
    """A collective that ends between the end of a wait and the question whether it is done."""

    def __init__(self, error: str | None) -> None:
        self.error = error

    def wait(self, timeout: object = None) -> None:
        if timeout is not None:
            raise RuntimeError("Operation timed out!")
        if self.error is not None:
            raise RuntimeError(self.error)

    def is_completed(self) -> bool:
        return True


def test_a_collective_that_ends_just_after_a_look_has_not_failed() -> None:
    backend = RestartableBackend(lambda store: object(), Board().store(), deadline_s=5)
    backend.run(lambda _: EndsAfterTheLook(error=None))
    with pytest.raises(CommError, match="connection reset"):
        backend.run(lambda _: EndsAfterTheLook(error="connection reset"))


def test_gloo_listens_on_its_interface_only() -> None:
    import psutil

    before = {each.laddr for each in psutil.Process().net_connections() if each.status == "LISTEN"}
    groups = make_groups("gloo", 2)
    listening = {
        each.laddr for each in psutil.Process().net_connections() if each.status == "LISTEN"
    }
    assert {address.ip for address in listening - before} <= {"127.0.0.1"}
    del groups


def test_the_store_says_what_is_there() -> None:
    board = Board()
    store = board.store(timeout_s=0.1)
    assert not store.check(["a"])
    store.set("a", b"1")
    assert store.check(["a"])
    store.wait(["a"])
    assert store.get("a") == b"1"
    with pytest.raises(TimeoutError):
        store.wait(["a", "b"])


def test_a_link_is_measured_by_a_small_and_a_large_message() -> None:
    found = measure("lo", lambda num_bytes: 2 * 50e-6 + num_bytes / 1e8)
    assert found.interface == "lo"
    assert found.latency_s == pytest.approx(50e-6, rel=0.05)
    assert found.bandwidth_bytes_per_s == pytest.approx(1e8, rel=0.01)
    assert measure("lo", lambda _: 1e-5).bandwidth_bytes_per_s > 1e10  # no slower: not divided by 0


def test_the_interface_of_an_address() -> None:
    assert interface_of("127.0.0.1").startswith("lo")
    assert interface_of("203.0.113.7") == "?"
