"""Layers whose weights fit no memory: they stay on disk, and are read just ahead of their use.

    layers on disk     2        5        8        2 ...        spread evenly among the others
    slots          [ layer 2 ][ layer 5 ]                      memory for two (or a few) of them
                      runs       is read meanwhile

A thread of its own reads them round and round, in their order, into the slot that is free next.
Knows nothing of what the bytes mean, or of how a layer runs.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from shoal.core.errors import DeviceError
from shoal.model.layer_file import LayerFile

NUM_SLOTS = 2
_log = logging.getLogger(__name__)


class LayerSource(Protocol):
    """Brings the weights of some layers to where they run: `LayerStream`, `HostLayers`."""

    layers: tuple[int, ...]
    read_s: float
    read_cpu_s: float

    @property
    def size_bytes(self) -> int: ...

    @property
    def slot_bytes(self) -> int: ...

    def acquire(self, layer: int) -> None: ...

    def release(self, layer: int) -> None: ...


def spread(num_layers: int, count: int) -> tuple[int, ...]:
    """`count` of the layers, as evenly as whole numbers allow: others run while one is read."""
    return tuple((2 * i + 1) * num_layers // (2 * count) for i in range(count))


def layers_beyond(
    layers: Sequence[int], tables: int, memory_bytes: int | None, elsewhere: str
) -> tuple[int, ...]:
    """As few layers as need be; the others, the tables and the slots fit the memory.

    Args:
        layers, tables: their bytes.
        memory_bytes: None: there is no limit.
        elsewhere: where they stay; for people.

    Raises:
        DeviceError: they do not, whatever stays there.
    """
    if memory_bytes is None or tables + sum(layers) <= memory_bytes:
        return ()
    needed = tables
    for count in range(1, len(layers) + 1):
        chosen = spread(len(layers), count)
        kept = sum(size for index, size in enumerate(layers) if index not in chosen)
        needed = tables + kept + min(NUM_SLOTS, count) * max(layers)
        if needed <= memory_bytes:
            return chosen
    raise DeviceError(
        f"weights may take {memory_bytes / 1e6:.0f} MB; with every layer {elsewhere}, {NUM_SLOTS} "
        f"of them in memory and the embeddings still take {needed / 1e6:.0f} MB; give more memory, "
        "or use --quantize int4"
    )


class LayerStream:
    """Reads layers into slots, ahead of whoever runs them.

    Args:
        layers: which, in the order they run.
        slots: memory, at least 2; the n-th layer goes into slot n % len(slots).
        resident: weights that stay in memory.

    Attributes:
        in_memory: all weights that are in memory at one time.
        read_s, read_cpu_s: seconds that reading all of them once took when nothing else ran, and
            for which it kept a core busy.
    """

    def __init__(
        self, file: LayerFile, layers: Sequence[int], slots: Sequence[Tensor], resident: Tensor
    ) -> None:
        assert len(slots) >= 2 or len(layers) == 1, "one is read while another runs"
        self.layers = tuple(layers)
        self.in_memory = (resident, *slots)
        self._file = file
        self._slots = tuple(slots)
        self._ordinals = {layer: ordinal for ordinal, layer in enumerate(layers)}
        self._changed = threading.Condition()
        self._held: list[int | None] = [None] * len(slots)  # what each slot has
        self._reading: int | None = None
        self._next = 0
        self._error: DeviceError | None = None
        self.read_s, self.read_cpu_s = self._check_all()
        thread = threading.Thread(target=_read_on, args=(weakref.ref(self),), daemon=True)
        thread.name = "shoal-stream"
        thread.start()

    @property
    def size_bytes(self) -> int:
        """Of all its layers, on disk."""
        return self._file.size_bytes

    @property
    def slot_bytes(self) -> int:
        """Memory that it takes."""
        return sum(len(slot) for slot in self._slots)

    def acquire(self, layer: int) -> None:
        """Wait until a layer's weights are there; they stay until `release`.

        Raises:
            DeviceError: they can't be read.
        """
        ordinal = self._ordinals[layer]
        place = ordinal % len(self._slots)
        with self._changed:
            if self._held[place] != ordinal and self._reading != ordinal:
                # A pass ended early, or began elsewhere.
                self._held = [None] * len(self._slots)
                self._next = ordinal
                self._changed.notify_all()
            self._changed.wait_for(lambda: self._held[place] == ordinal or self._error is not None)
            if self._error is not None:
                raise self._error

    def release(self, layer: int) -> None:
        """Its slot may be filled with another."""
        with self._changed:
            self._held[self._ordinals[layer] % len(self._slots)] = None
            self._changed.notify_all()

    def _check_all(self) -> tuple[float, float]:
        """Every layer once for its checksum, and once more for the time it takes."""
        count = len(self.layers)
        for ordinal in range(count):
            slot = self._slot(ordinal)
            self._file.read(ordinal, slot)
            if not self._file.is_whole(ordinal, slot):
                raise DeviceError(
                    f"the weights of layer {self.layers[ordinal]} are damaged on disk; remove the "
                    "folder of packed weights, and start again"
                )
        started_s, started_cpu_s = time.perf_counter(), time.thread_time()
        for ordinal in range(count):
            self._file.read(ordinal, self._slot(ordinal))
        return time.perf_counter() - started_s, time.thread_time() - started_cpu_s

    def _slot(self, ordinal: int) -> Tensor:
        return self._slots[ordinal % len(self._slots)]

    def read_next(self, patience_s: float) -> None:
        """Read the layer that is wanted next into its slot, if that is free within that time."""
        with self._changed:
            if not self._changed.wait_for(self._has_room, patience_s):
                return
            ordinal = self._reading = self._next
        try:
            self._file.read(ordinal, self._slot(ordinal))
        except DeviceError as error:
            self._error = error
            raise
        finally:
            with self._changed:
                if self._next == ordinal:  # nobody wants another by now
                    self._held[ordinal % len(self._slots)] = ordinal
                    self._next = (ordinal + 1) % len(self.layers)
                self._reading = None
                self._changed.notify_all()

    def _has_room(self) -> bool:
        return self._held[self._next % len(self._slots)] is None


def _read_on(reference: weakref.ref[LayerStream]) -> None:
    while (stream := reference()) is not None:
        try:
            stream.read_next(patience_s=1.0)
        except DeviceError:
            _log.exception("layers on disk")
            return
        del stream
