"""A GPU, as torch and its libraries use it. Untested on hardware.

    bandwidth   a sum over more than any cache holds
    products    square ones, of each precision that the device has units for
    launch      small kernels one after another, none of them waited for
    host        copies from pinned memory

What holds it back is asked of its driver while products run: idle clocks say nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from shoal.cluster.nvml import read_topology
from shoal.cluster.topology import Gpu
from shoal.core.cluster import Precision
from shoal.core.measured import DeviceMeasure
from shoal.probe.rounds import per_second
from shoal.worker.memory import free_memory_bytes
from shoal.worker.speed import Speed

_SIDE = 8192
_READ_BYTES, _COPY_BYTES = 2 << 30, 256 << 20
_LAUNCHES = 2000
_PRODUCTS_UNDER_WAY = 50
_PARTS = 5.0
_HAS_FP8, _HAS_BF16 = (8, 9), (8, 0)


def measure_cuda(device: torch.device, speed: Speed, seconds: float) -> DeviceMeasure:
    """
    Raises:
        RuntimeError: what torch says of a device that does not work.
    """
    free = free_memory_bytes(device)
    part_s = seconds / _PARTS

    def rate(run: Callable[[], object], share: float = 1.0) -> float:
        def waited() -> None:
            run()
            torch.cuda.synchronize(device)

        return per_second(waited, part_s * share, speed)

    data = torch.ones(min(_READ_BYTES, free // 4) // 4, device=device)
    bandwidth = rate(data.sum) * data.nbytes
    del data
    runs = list(_products(device, min(_SIDE, _fitting_side(free))))
    flops = tuple((name, rate(run, 2 / len(runs)) * count) for name, run, count in runs)
    pinned = torch.empty(_COPY_BYTES, dtype=torch.uint8).pin_memory()
    target = torch.empty_like(pinned, device=device)
    one = torch.zeros(16, device=device)
    made = tuple(name for name, _ in flops)
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    said = _said_under_load(runs[-1][1], uuid, device)
    return DeviceMeasure(
        model=torch.cuda.get_device_name(device),
        is_cpu=False,
        memory_bytes=free,
        total_bytes=int(torch.cuda.get_device_properties(device).total_memory),
        bandwidth_bytes_per_s=bandwidth,
        flops=flops,
        precisions=tuple(dict.fromkeys((*made, "int8", "int4"))),
        launch_s=1 / (rate(lambda: [one.add_(1.0) for _ in range(_LAUNCHES)]) * _LAUNCHES),
        host_bytes_per_s=rate(lambda: target.copy_(pinned, non_blocking=True)) * _COPY_BYTES,
        kernels="torch",
        watts=said.power_limit_w if said else None,
        held_back=said.held_back if said else (),
        uuid=uuid,
    )


def _said_under_load(run: Callable[[], object], uuid: str, device: torch.device) -> Gpu | None:
    """By its driver; None: that does not know it."""
    for _ in range(_PRODUCTS_UNDER_WAY):
        run()
    gpus = read_topology().gpus
    torch.cuda.synchronize(device)
    return next((each for each in gpus if uuid and each.uuid.endswith(uuid)), None)


def _products(
    device: torch.device, side: int
) -> Iterator[tuple[Precision, Callable[[], object], int]]:
    """Precision, a product, and how many operations it is."""
    capability = torch.cuda.get_device_capability(device)
    count = 2 * side**3
    small = side // 4  # without its tensor cores a GPU is so much slower
    wide = torch.zeros(small, small, device=device)
    yield "float32", lambda: wide @ wide, 2 * small**3
    names: tuple[Precision, ...] = ("float16", "bfloat16")
    for name in names if capability >= _HAS_BF16 else names[:1]:
        half = torch.zeros(side, side, device=device, dtype=getattr(torch, name))
        yield name, lambda half=half: half @ half, count  # type: ignore[misc]
    codes = torch.zeros(side, side, device=device, dtype=torch.int8)
    if capability >= _HAS_BF16:
        yield "int8", lambda: torch._int_mm(codes, codes.t()), count
    if capability >= _HAS_FP8:
        eights: Any = codes.view(torch.float8_e4m3fn)
        one = torch.ones((), device=device)
        multiply: Any = torch._scaled_mm
        yield (
            "fp8",
            lambda: multiply(eights, eights.t(), one, one, out_dtype=torch.bfloat16),
            count,
        )


def _fitting_side(free_bytes: int) -> int:
    """Of square matrices of which a dozen fit, in steps that units like."""
    return max(int((free_bytes / 48) ** 0.5) // 256 * 256, 256)
