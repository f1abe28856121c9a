"""The CPUs of a host, as shoal's own kernels use them; plain torch, where those are not built.

    bandwidth   reads of more than any cache holds, by every thread
    products    256 rows by a 1024 x 1024 weight, of each precision
    launch      a product of one row and a few weights: handing it to the team and back

Weights are zeros: what a product takes does not depend on them, as long as they are numbers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import torch

from shoal.cluster.sysfs import SCALES_BY_ITSELF
from shoal.core.cluster import Precision
from shoal.core.control_groups import quota_cpus, text
from shoal.core.measured import DeviceMeasure
from shoal.kernels.cpu.arena import Arena, PackedFormat, packed_bytes
from shoal.kernels.cpu.step import Session
from shoal.probe.rounds import per_second
from shoal.worker.memory import free_memory_bytes
from shoal.worker.speed import Speed

_SIDE, _ROWS = 1024, 256
_LAUNCHES = 1000
_MOST_READ_BYTES = 256 << 20
_MEMORY_SHARE = 0.8
"""Of free memory, for weights and KV; the rest is the process's own."""

_FORMATS: tuple[tuple[Precision, PackedFormat], ...] = (
    ("float32", "float32"),
    ("bfloat16", "bfloat16"),
    ("int8", "int8"),
    ("int4", "int4"),
)
_PARTS = 5.0
"""Read, copy, launch, and products, which get two parts together with what is left over."""


def measure_cpu(num_threads: int, speed: Speed, seconds: float) -> DeviceMeasure:
    """
    Args:
        seconds: for all of it, about.
    """
    torch.set_num_threads(num_threads)
    free = free_memory_bytes(torch.device("cpu"))
    data = torch.ones(min(_MOST_READ_BYTES, free // 8), dtype=torch.uint8)
    part_s = seconds / _PARTS
    try:
        session = Session(num_threads)
    except OSError:
        read, products, kernels = _torch_read(data), _torch_products(), "torch"
    else:
        read = lambda: session.read(data)  # noqa: E731
        products, kernels = _compiled_products(session), session.isa
    shape = 2 * _ROWS * _SIDE * _SIDE
    runs = list(products)
    flops = tuple(
        (name, per_second(run, 2 * part_s / len(runs), speed) * shape) for name, run in runs
    )
    copied = torch.empty(len(data) // 4, dtype=torch.uint8)
    source = data[: len(copied)]
    return DeviceMeasure(
        model=cpu_model(),
        is_cpu=True,
        memory_bytes=int(free * _MEMORY_SHARE),
        total_bytes=int(psutil.virtual_memory().total),
        bandwidth_bytes_per_s=per_second(read, part_s, speed) * data.nbytes,
        flops=flops,
        precisions=tuple(name for name, _ in flops) if kernels != "torch" else ("float32",),
        launch_s=1 / (per_second(_launches(num_threads), part_s, speed) * _LAUNCHES),
        host_bytes_per_s=per_second(lambda: copied.copy_(source), part_s, speed) * len(copied),
        num_threads=num_threads,
        kernels=kernels,
        held_back=tuple(held_back(num_threads)),
    )


def cpu_model(root: Path = Path("/")) -> str:
    """As /proc/cpuinfo names it."""
    try:
        lines = (root / "proc/cpuinfo").read_text("utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or os.uname().machine


def _compiled_products(session: Session) -> Iterator[tuple[Precision, Callable[[], object]]]:
    x_NE = torch.randn(_ROWS, _SIDE)
    for name, kept in _FORMATS:
        arena = Arena(session.native, packed_bytes(session.native, kept, _SIDE, _SIDE))
        weight = arena.take(kept, _SIDE, _SIDE)
        yield name, lambda weight=weight: session.linear(x_NE, weight)  # type: ignore[misc]


def _torch_products() -> Iterator[tuple[Precision, Callable[[], object]]]:
    names: tuple[Precision, ...] = ("float32", "bfloat16")
    for name in names:
        dtype = getattr(torch, name)
        x, weight = torch.randn(_ROWS, _SIDE).to(dtype), torch.zeros(_SIDE, _SIDE, dtype=dtype)
        yield name, lambda x=x, weight=weight: x @ weight  # type: ignore[misc]


def _torch_read(data: torch.Tensor) -> Callable[[], object]:
    words = data[: len(data) // 8 * 8].view(torch.int64)
    return lambda: words.sum()


def _launches(num_threads: int) -> Callable[[], object]:
    """Many at once: one takes microseconds."""
    try:
        session = Session(num_threads)
    except OSError:
        one = torch.zeros(16)
        return lambda: [one.add_(1.0) for _ in range(_LAUNCHES)]
    arena = Arena(session.native, packed_bytes(session.native, "float32", 64, 64))
    weight, x_NE = arena.take("float32", 64, 64), torch.zeros(1, 64)
    return lambda: [session.linear(x_NE, weight) for _ in range(_LAUNCHES)]


def held_back(num_threads: int, root: Path = Path("/")) -> Iterator[str]:
    """A quota below the threads that work, and a governor that keeps clocks low."""
    quota = quota_cpus(root)
    if quota is not None and quota < num_threads:
        yield f"a control group allows {quota:g} CPUs, and {num_threads} threads work"
    folder = root / "sys/devices/system/cpu/cpu0/cpufreq"
    governor = text(folder / "scaling_governor")
    driver = text(folder / "scaling_driver")
    if governor == "powersave" and driver not in SCALES_BY_ITSELF:
        yield "the frequency governor is powersave"
