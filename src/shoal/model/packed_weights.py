"""Packed weights of a shard: in one arena, and on disk what fits no memory.

    arena   layer 0 | layer 1 | layer 3 | ... | tables     kept at an earlier start, or packed now
    disk    layer 2 | layer 5 | ...                        read ahead into two slots (streaming.py)
            or all experts                                 read when wanted (expert_store.py)

Knows nothing of file formats or of how layers run.
"""

from __future__ import annotations

import ctypes
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from shoal.core.errors import DeviceError
from shoal.core.model_spec import ModelSpec
from shoal.core.split import Shard
from shoal.kernels.cpu.arena import Arena, ArenaSize, PackedWeight
from shoal.model.allocation import Allocator, allocate
from shoal.model.disk_room import DiskRoom, LayerSize, choose_room
from shoal.model.expert_loader import ExpertLoader
from shoal.model.expert_store import ExpertStore
from shoal.model.experts_on_disk import layer_size, open_store
from shoal.model.fill import Progress, fill
from shoal.model.layer_file import LayerFile
from shoal.model.names import TensorNames
from shoal.model.packed_cache import PackedCache
from shoal.model.parameters import (
    DecoderParameters,
    ExpertParameters,
    LayerParameters,
    Placement,
)
from shoal.model.placements import placements
from shoal.model.precision import WeightFormats
from shoal.model.sources import WeightSource
from shoal.model.streaming import NUM_SLOTS, LayerStream

_WORTH_KEEPING_S = 0.5
_READ_BYTES_PER_S = 5e8  # of a modest disk: what is packed faster need not be kept
_CPU = torch.device("cpu")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class PackedParameters:
    """Weights of a shard; `stream` brings some layers when they are to run, `store` experts."""

    parameters: DecoderParameters
    stream: LayerStream | None = None
    store: ExpertStore | None = None


@dataclass(frozen=True, slots=True, eq=False)
class PackedLoad:
    """What packed weights are made from.

    Attributes:
        cache: where they may be found, or kept.
        native: the compiled library.
        experts: reads them one by one; None: there are none.
    """

    spec: ModelSpec
    shard: Shard
    formats: WeightFormats
    dtype: torch.dtype
    source: WeightSource
    names: TensorNames
    cache: PackedCache
    native: ctypes.CDLL
    experts: ExpertLoader | None


def load_packed(
    load: PackedLoad, memory_bytes: int | None, progress: Progress | None
) -> PackedParameters:
    """Packed weights, filled.

    Args:
        memory_bytes: that they may take; None: as much as they need.

    Raises:
        DeviceError: no memory for them, or no room on the disk.
    """
    sizes, tables = _sizes(load)
    room = choose_room(sizes, tables, memory_bytes)
    if room.expert_slots:
        return _load_without_experts(load, sizes, tables, room, progress)
    layers, on_disk = [each.bytes for each in sizes], room.layers
    resident = tables + sum(size for index, size in enumerate(layers) if index not in on_disk)
    slots = [_arena(load.native, max(layers)) for _ in range(min(NUM_SLOTS, len(on_disk)))]
    arena = _arena(load.native, resident)
    slot_of = {layer: slots[n % len(slots)] for n, layer in enumerate(on_disk)}

    def memory_of(layer: int) -> Arena:
        if (slot := slot_of.get(layer)) is None:
            return arena
        slot.rewind()
        return slot

    parameters = _allocate(load, memory_of, arena)
    needed = list(placements(load.spec, load.shard, parameters, load.names))
    streamed = {
        id(weight): layer for layer in on_disk for weight in packed_in(parameters.layers[layer])
    }
    _fill_arena(
        [each for each in needed if id(each.target) not in streamed],
        load,
        arena,
        load.cache.of(on_disk),
        progress,
    )
    if not on_disk:
        return PackedParameters(parameters)

    def write(ordinal: int) -> Tensor:
        slot = slots[ordinal % len(slots)]
        slot.data.zero_()
        own = [each for each in needed if streamed.get(id(each.target)) == on_disk[ordinal]]
        fill(own, load.source, slot, None)
        return slot.data

    kept = load.cache.of(on_disk, "layers")
    file = LayerFile(kept.path, kept.folder, [layers[layer] for layer in on_disk], write)
    first = load.shard.layers.start
    numbers, memory = [first + n for n in on_disk], [slot.data for slot in slots]
    return PackedParameters(parameters, LayerStream(file, numbers, memory, arena.data))


def _load_without_experts(
    load: PackedLoad,
    sizes: list[LayerSize],
    tables: int,
    room: DiskRoom,
    progress: Progress | None,
) -> PackedParameters:
    """Experts' weights have no room of their own; a store brings them."""
    assert load.experts is not None, "experts are what stays on disk"
    arena = _arena(load.native, tables + sum(each.other_bytes for each in sizes))
    nowhere = ArenaSize(load.native)
    parameters = _allocate(load, lambda layer: arena, arena, lambda layer: nowhere)
    needed = placements(load.spec, load.shard, parameters, load.names)
    _fill_arena(
        [each for each in needed if each.target.nbytes],
        load,
        arena,
        load.cache.of("without experts"),
        progress,
    )
    experts = [layer.experts for layer in parameters.layers]
    first, kept = load.shard.layers.start, load.cache.of("experts")
    slots = _arena(load.native, room.slot_bytes(sizes))
    store = open_store(load.experts, experts, first, sizes, room, kept, slots.data, arena.data)
    return PackedParameters(parameters, store=store)


def packed_in(layer: LayerParameters) -> list[PackedWeight]:
    """The packed weights of a layer."""
    parts = [getattr(layer, each.name) for each in fields(layer)]
    if isinstance(layer.experts, ExpertParameters):
        parts += [*layer.experts.gate_up_FE, *layer.experts.down_EF]
    return [part for part in parts if isinstance(part, PackedWeight)]


def _sizes(load: PackedLoad) -> tuple[list[LayerSize], int]:
    """Of each layer, and of the tables."""
    others = [ArenaSize(load.native) for _ in range(len(load.shard.layers))]
    experts = [ArenaSize(load.native) for _ in range(len(load.shard.layers))]
    tables = ArenaSize(load.native)
    parameters = _allocate(load, others.__getitem__, tables, experts.__getitem__)
    sizes = [
        layer_size(load.spec, layer.experts, other.bytes, own.bytes)
        for layer, other, own in zip(parameters.layers, others, experts, strict=True)
    ]
    return sizes, tables.bytes


def _allocate(
    load: PackedLoad,
    of_layer: Callable[[int], Arena | ArenaSize],
    of_tables: Arena | ArenaSize,
    of_experts: Callable[[int], Arena | ArenaSize] | None = None,
) -> DecoderParameters:
    """Layers (counted from the shard's first) and tables, each in their own memory.

    Args:
        of_experts: None: they are where their layer is.
    """

    def allocator(layer: int) -> Allocator:
        return Allocator(_CPU, load.dtype, of_layer(layer))

    def of_own(layer: int) -> Allocator:
        return Allocator(_CPU, load.dtype, (of_experts or of_layer)(layer))

    tables = Allocator(_CPU, load.dtype, of_tables)
    return allocate(load.spec, load.shard, load.formats, tables, allocator, of_own)


def _arena(native: ctypes.CDLL, size: int) -> Arena:
    try:
        return Arena(native, size)
    except (OSError, MemoryError, OverflowError) as error:
        raise DeviceError(
            f"no memory for {size / 2**30:.1f} GiB of weights; use --quantize int4, a smaller "
            "model, or --weights-memory-bytes to leave layers on disk"
        ) from error


def _fill_arena(
    needed: list[Placement],
    load: PackedLoad,
    arena: Arena,
    cache: PackedCache,
    progress: Progress | None,
) -> None:
    """From what was kept at an earlier start, or from the checkpoint."""
    if cache.read_into(arena.data):
        _log.info("packed weights were kept at an earlier start")
        needed = [each for each in needed if not isinstance(each.target, PackedWeight)]
        fill(needed, load.source, arena, progress)
        return
    began_s = time.perf_counter()
    fill(needed, load.source, arena, progress)
    slow_s = max(_WORTH_KEEPING_S, len(arena.data) / _READ_BYTES_PER_S)
    if time.perf_counter() - began_s > slow_s:
        cache.keep(arena.data)
