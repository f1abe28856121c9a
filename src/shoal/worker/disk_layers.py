"""What layers on disk cost a decode step, as it is said before the first one.

    in memory    bytes of all weights / (memory bandwidth x 0.8)
    from disk    the longer of: reading the layers on disk; computing, and copying them meanwhile

Bandwidths are measured here. Where plain tensors are multiplied, on a CPU or a GPU, the products of
one token are timed instead, and layers come from wherever they are. Knows nothing of how layers are
read or run.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.kernels.cpu.step import Session
from shoal.model.decoder import Decoder
from shoal.model.packed_decoder import PackedDecoder
from shoal.model.streaming import LayerSource
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
    return _both(compute_s, read_s, read_cpu_s / num_threads)


def disk_layers_text(decoder: PackedDecoder, session: Session, num_threads: int) -> str:
    """For people; "": all layers are in memory."""
    stream = decoder.stream
    if stream is None:
        return ""
    num_bytes = decoder.weight_bytes - stream.slot_bytes + stream.size_bytes
    times = predict(
        num_bytes=num_bytes,
        bandwidth_bytes_per_s=bandwidth(session, stream.in_memory),
        read_s=stream.read_s,
        read_cpu_s=stream.read_cpu_s,
        num_threads=num_threads,
    )
    return _text(stream, len(decoder.shard.layers), "on disk and read", times)


def plain_layers_text(decoder: Decoder, num_threads: int) -> str:
    """For people, of layers on disk or in host memory; "": all are on the device."""
    stream = decoder.stream
    if stream is None:
        return ""
    where = "on disk and read" if decoder.device.type == "cpu" else "in host memory and copied"
    times = _both(_products_s(decoder), stream.read_s, stream.read_cpu_s / num_threads)
    return _text(stream, len(decoder.shard.layers), where, times)


def _both(compute_s: float, read_s: float, read_cpu_s: float) -> StepTimes:
    return StepTimes(compute_s, max(read_s, compute_s + read_cpu_s))


def _text(stream: LayerSource, num_layers: int, where: str, times: StepTimes) -> str:
    return (
        f"{len(stream.layers)} of {num_layers} layers, {size_text(stream.size_bytes)}, are "
        f"{where} in every step at {stream.size_bytes / stream.read_s / 1e9:.1f} GB/s: a decode "
        f"step of about {times.from_disk_s * 1e3:.0f} ms, "
        f"{times.from_disk_s / times.in_memory_s:.1f} times that in memory; --quantize int4 or "
        "more memory makes it faster"
    )


@torch.inference_mode()
def _products_s(decoder: Decoder) -> float:
    """Seconds of a decode step's products; of a layer that is elsewhere, with whatever is there."""
    device, layers = torch.get_device_module(decoder.device), decoder.shard.layers
    hidden_1E = torch.zeros(1, decoder.spec.hidden_size, dtype=decoder.dtype, device=decoder.device)
    times_s = []
    for _ in range(_PROBES):
        device.synchronize(decoder.device)
        started_s = time.perf_counter()
        for layer in range(layers.start, layers.stop):
            decoder.multiply(layer)
        decoder.logits(hidden_1E)
        device.synchronize(decoder.device)
        times_s.append(time.perf_counter() - started_s)
    return min(times_s)


def bandwidth(session: Session, data: Sequence[Tensor]) -> float:
    """Bytes a second that all threads read together, of weights that are in memory."""
    times_s = []
    for _ in range(_PROBES):
        started_s = time.perf_counter()
        for each in data:
            session.read(each)
        times_s.append(time.perf_counter() - started_s)
    return sum(map(len, data)) / min(times_s)
