"""Layers copied from host memory ahead of their use, for benchmarks/gpu.py: is the copy hidden?

Four layers' worth of bytes go through two slots, round and round, as `HostLayers` brings them; one
token is multiplied by what came.
"""

from __future__ import annotations

import mmap
import statistics
import time

import torch

from shoal.model.host_layers import HostLayers

_NUM_LAYERS = 4
_NUM_PASSES = 7
_COLUMNS = 1024


def measure_host_layers(device: torch.device, layer_bytes: int) -> tuple[str, dict[str, float]]:
    """For people, and the numbers: bytes a second of copies alone, and seconds of a pass against
    those of its copies.
    """
    sources = [
        torch.frombuffer(mmap.mmap(-1, layer_bytes), dtype=torch.uint8) for _ in range(_NUM_LAYERS)
    ]
    slots = [torch.empty(layer_bytes, dtype=torch.uint8, device=device) for _ in range(2)]
    stream = HostLayers(range(_NUM_LAYERS), sources, slots)
    weights = [slot.view(torch.bfloat16).view(-1, _COLUMNS) for slot in slots]
    x_1K = torch.ones(1, _COLUMNS, dtype=torch.bfloat16, device=device)
    on, times_s = torch.get_device_module(device), []
    for _ in range(_NUM_PASSES):
        on.synchronize(device)
        started_s = time.perf_counter()
        for layer in range(_NUM_LAYERS):
            stream.acquire(layer)
            torch.nn.functional.linear(x_1K, weights[layer % 2])
            stream.release(layer)
        on.synchronize(device)
        times_s.append(time.perf_counter() - started_s)
    bandwidth = stream.size_bytes / stream.read_s
    ratio = statistics.median(times_s) / stream.read_s
    text = f"copies {bandwidth / 1e9:.1f} GB/s, a pass takes {ratio:.2f} times its copies"
    return text, {"bytes_per_s": bandwidth, "pass_over_copies": ratio}
