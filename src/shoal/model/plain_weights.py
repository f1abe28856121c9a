"""Weights of a shard as plain tensors; those of layers that do not fit stay elsewhere.

    device    layer 0 | layer 1 | layer 3 | ... | tables     a tensor for each weight
    slots     [ layer 2 ][ layer 5 ]                         a layer's weights in one flat buffer
    GPU       the others lie in host memory, and are copied ahead of use (`host_layers.py`)
    CPU       the others lie on disk, and are read ahead of use (`streaming.py`)

Knows nothing of file formats or of how layers run.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from shoal.core.errors import DeviceError
from shoal.core.model_spec import ModelSpec
from shoal.core.split import Shard
from shoal.model.allocation import Allocator, allocate, allocate_layer
from shoal.model.fill import Progress, fill
from shoal.model.flat import Flat, FlatSize
from shoal.model.host_layers import HostLayers
from shoal.model.layer_file import LayerFile
from shoal.model.names import TensorNames
from shoal.model.packed_cache import PackedCache
from shoal.model.parameters import DecoderParameters, LayerParameters, Placement
from shoal.model.placements import layer_placements, placements, table_placements
from shoal.model.precision import WeightFormats
from shoal.model.sources import WeightSource
from shoal.model.streaming import NUM_SLOTS, LayerSource, LayerStream, layers_beyond

_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True, eq=False)
class PlainLoad:
    """What plain weights are made from.

    Attributes:
        cache: where layers on disk may be found, or kept.
    """

    spec: ModelSpec
    shard: Shard
    formats: WeightFormats
    device: torch.device
    dtype: torch.dtype
    source: WeightSource
    names: TensorNames
    cache: PackedCache


@dataclass(frozen=True, slots=True, eq=False)
class PlainParameters:
    """Weights of a shard; `stream` brings those of some layers when they are to run."""

    parameters: DecoderParameters
    stream: LayerSource | None


def load_plain(
    load: PlainLoad,
    memory_bytes: int | None,
    host_memory_bytes: int | None,
    progress: Progress | None,
) -> PlainParameters:
    """Plain weights, filled.

    Args:
        memory_bytes: that they may take on the device; None: as much as they need.
        host_memory_bytes: that layers may take which do not fit a GPU; None: as above.

    Raises:
        DeviceError: no memory for them, or no room on the disk.
    """
    layers, tables = _sizes(load)
    on_disk = _goes_to_disk(load.device)
    away = layers_beyond(layers, tables, memory_bytes, "on disk" if on_disk else "in host memory")
    try:
        if not away:
            return PlainParameters(_load_all(load, progress), None)
        sizes = [layers[layer] for layer in away]
        slots = [
            torch.empty(max(sizes), dtype=torch.uint8, device=load.device)
            for _ in range(min(NUM_SLOTS, len(away)))
        ]
        if on_disk:
            return _with_disk(load, away, sizes, slots, progress)
        _check_room(sum(sizes), host_memory_bytes)
        return _with_host(load, away, sizes, slots, progress)
    except torch.OutOfMemoryError as error:
        raise DeviceError(
            f"no memory for {(tables + sum(layers)) / 2**30:.1f} GiB of weights on {load.device}; "
            "use --quantize int4, or --weights-memory-bytes to leave layers in host memory"
        ) from error


def add_one_to_norms(layers: Iterable[LayerParameters], final_norm_E: Tensor | None) -> None:
    """Norms that are stored as w - 1, as they are used."""
    norms: list[Tensor | None] = [final_norm_E]
    for layer in layers:
        norms += [layer.attention_norm_E, layer.qk_norm_HD, layer.post_attention_norm_E]
        norms += [layer.ffn_norm_E, layer.post_ffn_norm_E]
    for norm in norms:
        if norm is not None:
            norm.add_(1.0)


def _goes_to_disk(device: torch.device) -> bool:
    """Beside a CPU there is no other memory."""
    return device.type == "cpu"


def _load_all(load: PlainLoad, progress: Progress | None) -> DecoderParameters:
    allocator = Allocator(load.device, load.dtype)
    parameters = allocate(load.spec, load.shard, load.formats, allocator)
    needed = placements(load.spec, load.shard, parameters, load.names)
    fill(list(needed), load.source, None, progress)
    if load.spec.norm_plus_one:
        add_one_to_norms(parameters.layers, parameters.final_norm_E)
    return parameters


def _with_host(
    load: PlainLoad,
    away: Sequence[int],
    sizes: Sequence[int],
    slots: Sequence[Tensor],
    progress: Progress | None,
) -> PlainParameters:
    buffers = [_host_buffer(size) for size in sizes]
    filled = _allocate(load, dict(zip(away, buffers, strict=True)), _CPU)
    fill(list(placements(load.spec, load.shard, filled, load.names)), load.source, None, progress)
    if load.spec.norm_plus_one:
        add_one_to_norms(filled.layers, filled.final_norm_E)
    layers = list(filled.layers)
    for ordinal, layer in enumerate(away):
        norm_E = layers[layer].attention_norm_E.to(load.device, copy=True)
        layers[layer] = _in_slot(load, layer, slots[ordinal % len(slots)], norm_E)
    stream = HostLayers(_numbers(load, away), buffers, slots)
    return PlainParameters(replace(filled, layers=tuple(layers)), stream)


def _with_disk(
    load: PlainLoad,
    away: Sequence[int],
    sizes: Sequence[int],
    slots: Sequence[Tensor],
    progress: Progress | None,
) -> PlainParameters:
    homes = {layer: slots[ordinal % len(slots)] for ordinal, layer in enumerate(away)}
    parameters = _allocate(load, homes, load.device)
    layers = parameters.layers
    kept = [layer for layer in range(len(layers)) if layer not in homes]
    needed = list(table_placements(load.spec, load.shard, parameters, load.names))
    for layer in kept:
        needed += _placements(load, layer, layers[layer])
    fill(needed, load.source, None, progress)
    if load.spec.norm_plus_one:
        add_one_to_norms([layers[layer] for layer in kept], parameters.final_norm_E)

    def write(ordinal: int) -> Tensor:
        layer = away[ordinal]
        homes[layer].zero_()
        fill(_placements(load, layer, layers[layer]), load.source, None, None)
        if load.spec.norm_plus_one:
            add_one_to_norms([layers[layer]], None)
        return homes[layer]

    place = load.cache.of(tuple(away), "plain layers")
    file = LayerFile(place.path, place.folder, sizes, write)
    used = list(layers)
    for ordinal, layer in enumerate(away):
        file.read(ordinal, homes[layer])
        norm_E = layers[layer].attention_norm_E.clone()
        used[layer] = _in_slot(load, layer, homes[layer], norm_E)
    nothing = torch.empty(0, dtype=torch.uint8)
    stream = LayerStream(file, _numbers(load, away), slots, nothing)
    return PlainParameters(replace(parameters, layers=tuple(used)), stream)


def _sizes(load: PlainLoad) -> tuple[list[int], int]:
    """Bytes of each layer, and of the tables."""
    sizes, tables = [FlatSize() for _ in range(len(load.shard.layers))], FlatSize()
    allocate(
        load.spec,
        load.shard,
        load.formats,
        Allocator(load.device, load.dtype, flat=tables),
        lambda layer: Allocator(load.device, load.dtype, flat=sizes[layer]),
    )
    return [size.bytes for size in sizes], tables.bytes


def _allocate(
    load: PlainLoad, homes: dict[int, Tensor], home_device: torch.device
) -> DecoderParameters:
    """Layers that have a home lie there, each at its beginning; the others on the device."""
    resident = Allocator(load.device, load.dtype)

    def allocator(layer: int) -> Allocator:
        if layer not in homes:
            return resident
        return Allocator(home_device, load.dtype, flat=Flat(homes[layer]))

    return allocate(load.spec, load.shard, load.formats, resident, allocator)


def _in_slot(load: PlainLoad, layer: int, slot: Tensor, norm_E: Tensor) -> LayerParameters:
    """A layer as it lies in its slot. Its first norm is taken before it is there."""
    number = load.shard.layers.start + layer
    allocator = Allocator(load.device, load.dtype, flat=Flat(slot))
    made = allocate_layer(load.spec, load.shard, load.formats.layers[number], number, allocator)
    return replace(made, attention_norm_E=norm_E)


def _placements(load: PlainLoad, layer: int, parameters: LayerParameters) -> list[Placement]:
    number = load.shard.layers.start + layer
    return list(layer_placements(load.spec, load.shard, number, parameters, load.names))


def _numbers(load: PlainLoad, away: Sequence[int]) -> tuple[int, ...]:
    """Of layers counted from the shard's first, as the model counts them."""
    return tuple(load.shard.layers.start + layer for layer in away)


def _check_room(needed: int, host_memory_bytes: int | None) -> None:
    if host_memory_bytes is not None and needed > host_memory_bytes:
        raise DeviceError(
            f"{needed / 2**30:.1f} GiB of weights fit neither the GPU nor the host, which has "
            f"{host_memory_bytes / 2**30:.1f} GiB left; use --quantize int4, or a plan with more "
            "devices"
        )


def _host_buffer(size: int) -> Tensor:
    """On pages of its own, so that it can be pinned by itself."""
    try:
        return torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)
    except (OSError, MemoryError, OverflowError) as error:
        raise DeviceError(
            f"no host memory for {size / 2**30:.1f} GiB of a layer's weights; use --quantize int4"
        ) from error
