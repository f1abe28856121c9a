"""Puts rows of a checkpoint where a decoder keeps them, in the format it keeps them in.

Codes stay codes wherever the formats agree; otherwise values are read and, if need be, rounded
to codes (`kernels/quantized.py`). Knows nothing of names or shapes.
"""

from __future__ import annotations

from typing import Protocol, cast

import torch
from torch import Tensor

from shoal.core.errors import WeightsError
from shoal.kernels.cpu.arena import Arena, PackedWeight
from shoal.kernels.quantized import (
    GROUP_SIZE,
    QuantizedWeight,
    WeightFormat,
    quantize,
    quantize_with_minimums,
)
from shoal.model.parameters import Placement
from shoal.model.sources import WeightSource


class BlockSource(Protocol):
    """A source of GGUF blocks that can be packed as they lie in the file."""

    def blocks(self, name: str, start: int, stop: int) -> tuple[str, Tensor] | None: ...


def stow(
    placement: Placement, start: int, stop: int, source: WeightSource, arena: Arena | None
) -> None:
    """Rows [start, stop) of the placement's tensor to their place.

    Args:
        arena: where packed weights lie.
    """
    name, target = placement.name, placement.target
    if placement.places is None:
        assert isinstance(target, Tensor)
        target.copy_(source.rows(name, start, stop))
        return
    places = placement.places[start:stop]
    match target:
        case PackedWeight():
            assert arena is not None
            _pack(arena, target, places, source, name, start, stop)
        case QuantizedWeight():
            minimums = target.minimums_FG is not None
            group_size = target.group_size
            rows = _codes(source, name, start, stop, target.format, minimums, group_size)
            rows = _regroup(rows, group_size)
            _copy(target.codes, places, rows.codes)
            _copy(target.scales_FG, places, rows.scales_FG)
            if target.minimums_FG is not None and rows.minimums_FG is not None:
                _copy(target.minimums_FG, places, rows.minimums_FG)
        case Tensor():
            _copy(target, places, source.rows(name, start, stop))


def _pack(
    arena: Arena,
    target: PackedWeight,
    places: Tensor,
    source: WeightSource,
    name: str,
    start: int,
    stop: int,
) -> None:
    if target.format in ("float32", "bfloat16"):
        arena.put(target, places, _packable(source.rows(name, start, stop)))
        return
    if (blocks := _blocks(source, name, start, stop, target)) is not None:
        arena.put_blocks(target, places, blocks[1], blocks[0])
        return
    weight_format: WeightFormat = "int8" if target.format == "int8" else "int4"
    minimums = target.format == "int4_min"
    rows = _codes(source, name, start, stop, weight_format, minimums, GROUP_SIZE)
    arena.put(target, places, rows)


def _blocks(
    source: WeightSource, name: str, start: int, stop: int, target: PackedWeight
) -> tuple[str, Tensor] | None:
    wanted = {"Q4_0": "int4", "Q4_1": "int4_min", "Q8_0": "int8"}
    if not hasattr(source, "blocks"):
        return None
    blocks = cast(BlockSource, source).blocks(name, start, stop)
    return blocks if blocks is not None and wanted.get(blocks[0]) == target.format else None


def _packable(rows: Tensor) -> Tensor:
    return rows if rows.dtype in (torch.float32, torch.bfloat16, torch.float16) else rows.float()


def _codes(
    source: WeightSource,
    name: str,
    start: int,
    stop: int,
    weight_format: WeightFormat,
    minimums: bool,
    group_size: int,
) -> QuantizedWeight:
    """Rows in that format: the checkpoint's own codes, or values rounded to codes."""
    rows = None
    if source.format(name) == weight_format:
        rows = source.quantized_rows(name, start, stop)
    if rows is None or rows.group_size % group_size:
        try:
            values = source.rows(name, start, stop).float()
            rows = quantize_with_minimums(values) if minimums else quantize(values, weight_format)
        except ValueError as error:
            raise WeightsError(f"{name}: {error}") from error
    assert minimums or rows.minimums_FG is None, "a format with minimums was to be chosen"
    if not minimums or rows.minimums_FG is not None:
        return rows
    return QuantizedWeight(weight_format, rows.codes, rows.scales_FG, rows.scales_FG.float() * -8)


def _regroup(rows: QuantizedWeight, group_size: int) -> QuantizedWeight:
    """The same codes with smaller groups."""
    times = rows.group_size // group_size
    if times <= 1:
        assert rows.group_size == group_size, "groups are split, never joined"
        return rows
    minimums = rows.minimums_FG
    return QuantizedWeight(
        rows.format,
        rows.codes,
        rows.scales_FG.repeat_interleave(times, 1),
        None if minimums is None else minimums.repeat_interleave(times, 1),
    )


def _copy(target: Tensor, places: Tensor, rows: Tensor) -> None:
    first, last = int(places[0]), int(places[-1])
    values = rows.to(target.device, target.dtype)
    if last - first == len(places) - 1 and bool((places.diff() == 1).all()):
        target[first : last + 1] = values
    elif target.dtype == torch.float8_e4m3fn:  # no kernel of torch scatters it
        target.view(torch.uint8).index_copy_(0, places.to(target.device), values.view(torch.uint8))
    else:
        target.index_copy_(0, places.to(target.device), values)
