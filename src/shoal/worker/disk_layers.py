"""What layers on disk cost a decode step, as it is said before the first one.

    in memory    bytes of all weights / (memory bandwidth x 0.8)
    from disk    the longer of: reading the layers on disk; computing, and copying them meanwhile

Bandwidths are measured here. Knows nothing of how layers are read or run.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from shoal.kernels.cpu.step import Session
from shoal.model.packed_decoder import PackedDecoder
from shoal.worker.capacity import size_text

_EFFICIENCY = 0.8  # of a decode step, against reading alone (benchmarks/results/peers_*.md)
_PROBES = 3


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Of a decode step with a short context, predicted.

    Attributes:
        in_memory_s: if all weights were in memory.
        from_disk_s: as it is.
    """

    in_memory_s: float
    from_disk_s: float


def predict(
    *,
    num_bytes: int,
    bandwidth_bytes_per_s: float,
    read_s: float,
    read_cpu_s: float,
    num_threads: int,
) -> StepTimes:
    """Step times of `num_bytes` of weights.

    Args:
        read_s, read_cpu_s: of reading the layers on disk once; what of it a core is busy with is
            taken from the threads that compute.
    """
    compute_s = num_bytes / (bandwidth_bytes_per_s * _EFFICIENCY)
    return StepTimes(compute_s, max(read_s, compute_s + read_cpu_s / num_threads))


def disk_layers_text(decoder: PackedDecoder, session: Session, num_threads: int) -> str:
    """For people; "": all layers are in memory."""
    stream = decoder.stream
    if stream is None:
        return ""
    num_bytes = decoder.weight_bytes - stream.slot_bytes + stream.size_bytes
    times = predict(
        num_bytes=num_bytes,
        bandwidth_bytes_per_s=_bandwidth(session, stream.in_memory),
        read_s=stream.read_s,
        read_cpu_s=stream.read_cpu_s,
        num_threads=num_threads,
    )
    return (
        f"{len(stream.layers)} of {len(decoder.shard.layers)} layers, "
        f"{size_text(stream.size_bytes)}, are on disk and read in every step at "
        f"{stream.size_bytes / stream.read_s / 1e9:.1f} GB/s: a decode step of about "
        f"{times.from_disk_s * 1e3:.0f} ms, {times.from_disk_s / times.in_memory_s:.1f} times that "
        "in memory; --quantize int4 or more memory makes it faster"
    )


def _bandwidth(session: Session, data: Sequence[Tensor]) -> float:
    """Bytes a second that all threads read together, of weights that are in memory."""
    times_s = []
    for _ in range(_PROBES):
        started_s = time.perf_counter()
        for each in data:
            session.read(each)
        times_s.append(time.perf_counter() - started_s)
    return sum(map(len, data)) / min(times_s)
