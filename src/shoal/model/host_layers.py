"""Layers whose weights do not fit a device: they lie in host memory, and are copied ahead of use.

    host memory    layer 2 | layer 5 | layer 8 | ...      a flat buffer each, pinned
    slots          [ layer 2 ][ layer 5 ]                 flat buffers on the device
                      runs       is copied meanwhile, on a stream of its own

The host waits for nothing: a copy begins when what ran in its slot before has ended, a layer runs
when its copy has, and both are said to the device's streams. On a CPU, which has no streams, a copy
is done when it is asked for. Knows nothing of what the bytes mean, or of how a layer runs.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from shoal.core.errors import DeviceError


class HostLayers:
    """Copies layers into slots on the device, ahead of whoever runs them.

    Args:
        layers: which, in the order they run.
        sources: bytes of each, in host memory; pinned here where the device is a GPU, on pages of
            their own.
        slots: memory of the device; the n-th layer goes into slot n % len(slots).

    Attributes:
        read_s: seconds that copying all of them once took when nothing else ran.
        read_cpu_s: of them, how long a core was busy with it.

    Raises:
        DeviceError: the system does not let so much memory be pinned.
    """

    def __init__(
        self, layers: Sequence[int], sources: Sequence[Tensor], slots: Sequence[Tensor]
    ) -> None:
        self.layers = tuple(layers)
        self._sources, self._slots = tuple(sources), tuple(slots)
        self._ordinals = {layer: ordinal for ordinal, layer in enumerate(layers)}
        self._device = slots[0].device
        if self._device.type == "cuda":
            pointers = [_pin(source) for source in sources]
            weakref.finalize(self, _unpin, pointers, self._device).atexit = False
        self._on = torch.get_device_module(self._device)
        self._stream = self._on.Stream(self._device)
        self._filled = [self._on.Event() for _ in slots]
        self._coming: list[int | None] = [None] * len(slots)  # what each slot has, or will have
        self.read_s, self.read_cpu_s = self._copy_all()

    @property
    def size_bytes(self) -> int:
        """Of all its layers."""
        return sum(map(len, self._sources))

    @property
    def slot_bytes(self) -> int:
        """Memory of the device that it takes."""
        return sum(map(len, self._slots))

    def acquire(self, layer: int) -> None:
        """What is launched from now on finds the layer's weights; until `release`."""
        ordinal = self._ordinals[layer]
        place = ordinal % len(self._slots)
        if self._coming[place] != ordinal:  # a pass ended early, or began elsewhere
            for each in range(ordinal, min(ordinal + len(self._slots), len(self.layers))):
                self._copy(each)
        self._on.current_stream(self._device).wait_event(self._filled[place])

    def release(self, layer: int) -> None:
        """When what was launched has run, its slot may be filled with another."""
        ordinal, num_slots = self._ordinals[layer], len(self._slots)
        following = ordinal + num_slots
        if following >= len(self.layers):
            following = ordinal % num_slots  # of the next pass
        if following != ordinal:
            self._copy(following)

    def _copy(self, ordinal: int) -> None:
        place, source = ordinal % len(self._slots), self._sources[ordinal]
        self._stream.wait_stream(self._on.current_stream(self._device))
        with self._on.stream(self._stream):
            self._slots[place][: len(source)].copy_(source, non_blocking=True)
        self._filled[place].record(self._stream)
        self._coming[place] = ordinal

    def _copy_all(self) -> tuple[float, float]:
        self._on.synchronize(self._device)
        started_s, started_cpu_s = time.perf_counter(), time.thread_time()
        for ordinal in range(len(self.layers)):
            self._copy(ordinal)
        cpu_s = time.thread_time() - started_cpu_s
        self._on.synchronize(self._device)
        return time.perf_counter() - started_s, cpu_s


def _pin(memory: Tensor) -> int:
    """Where it lies. As it is: torch's own pinned memory is rounded up to powers of two."""
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    code = int(runtime.cudaHostRegister(memory.data_ptr(), len(memory), 0))
    if code:
        raise DeviceError(
            f"{len(memory) / 2**30:.1f} GiB of host memory can't be pinned for a GPU (CUDA error "
            f"{code}); raise `ulimit -l` and the container's memory, or use --quantize int4"
        )
    return memory.data_ptr()


def _unpin(pointers: Sequence[int], device: torch.device) -> None:
    torch.cuda.synchronize(device)  # copies ahead may still be on their way
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    for pointer in pointers:
        runtime.cudaHostUnregister(pointer)
