"""What a probe has measured: nouns that cross from the probed device to whoever asked.

    DeviceMeasure    rates of one device, alone or while others of its machine work too
    Points           (bytes, seconds) of messages one way, or of sums: their latency and rate

Knows nothing of how anything was measured, or of clusters.
"""

from __future__ import annotations

from dataclasses import dataclass

from shoal.core.cluster import Points, Precision


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceMeasure:
    """One device.

    Attributes:
        model: as its driver or kernel names it.
        memory_bytes: free just now, within what limits leave; `total_bytes` of the device.
        bandwidth_bytes_per_s: at which it reads its memory.
        flops: of dense products, by the precision they are made in.
        precisions: of weights that its kernels take.
        launch_s: what starting a kernel costs.
        host_bytes_per_s: at which it is filled from its host's memory.
        kernels: those that were measured.
        watts: its power cap.
        held_back: why it is slower than it could be.
        uuid: a GPU's.
    """

    model: str
    is_cpu: bool
    memory_bytes: int
    total_bytes: int
    bandwidth_bytes_per_s: float
    flops: tuple[tuple[Precision, float], ...]
    precisions: tuple[Precision, ...]
    launch_s: float
    host_bytes_per_s: float
    num_threads: int = 0
    kernels: str = ""
    watts: float | None = None
    held_back: tuple[str, ...] = ()
    uuid: str = ""


def latency_s(points: Points) -> float:
    """Of the smallest message."""
    return points[0][1]


def bytes_per_s(points: Points) -> float:
    """Between the smallest and the largest; the largest alone, where noise hides a difference."""
    (small, small_s), (large, large_s) = points[0], points[-1]
    if large_s - small_s > large_s / 4:
        return (large - small) / (large_s - small_s)
    return large / large_s
