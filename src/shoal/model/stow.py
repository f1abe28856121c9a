"""Puts rows of a checkpoint where a decoder keeps them, in the format it keeps them in.

Codes stay codes wherever the formats agree; otherwise values are read and, if need be, rounded
to codes (`kernels/quantized.py`). Knows nothing of names or shapes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor

from shoal.core.errors import WeightsError
from shoal.core.split import Range
from shoal.kernels.cpu.arena import Arena, PackedWeight
from shoal.kernels.quantized import (
    GROUP_SIZE,
    QuantizedWeight,
    WeightFormat,
    quantize,
    quantize_with_minimums,
)
from shoal.model.columns import take_columns
from shoal.model.parameters import Placement
from shoal.model.sources import WeightSource


class BlockSource(Protocol):
    """A source of GGUF blocks that can be packed as they lie in the file."""

    def blocks(
        self, name: str, start: int, stop: int, columns: Range | None = None
    ) -> tuple[str, Tensor] | None: ...


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows [start, stop) of a tensor of the checkpoint; `columns` None: all of them."""

    source: WeightSource
    name: str
    start: int
    stop: int
    columns: Range | None

    def values(self) -> Tensor:
        return self.source.rows(self.name, self.start, self.stop, self.columns)

    def whole_values(self) -> Tensor:
        return self.source.rows(self.name, self.start, self.stop)

    def quantized(self) -> QuantizedWeight:
        return self.source.quantized_rows(self.name, self.start, self.stop, self.columns)

    def blocks(self) -> tuple[str, Tensor] | None:
        if not hasattr(self.source, "blocks"):
            return None
        source = cast(BlockSource, self.source)
        return source.blocks(self.name, self.start, self.stop, self.columns)


def stow(
    placement: Placement, start: int, stop: int, source: WeightSource, arena: Arena | None
) -> None:
    """Rows [start, stop) of the placement's range to their place.

    Args:
        arena: where packed weights lie.
    """
    target, first = placement.target, placement.start
    rows = _Rows(source, placement.name, first + start, first + stop, placement.columns)
    if placement.places is None:
        assert isinstance(target, Tensor)
        target.copy_(rows.values())
        return
    places = placement.places[start:stop]
    match target:
        case PackedWeight():
            assert arena is not None
            _pack(arena, target, places, rows)
        case QuantizedWeight():
            minimums = target.minimums_FG is not None
            found = _codes(rows, target.format, minimums, target.group_size)
            found = _regroup(found, target.group_size)
            _copy(target.codes, places, found.codes)
            _copy(target.scales_FG, places, found.scales_FG)
            if target.minimums_FG is not None and found.minimums_FG is not None:
                _copy(target.minimums_FG, places, found.minimums_FG)
        case Tensor():
            _copy(target, places, rows.values())


def _pack(arena: Arena, target: PackedWeight, places: Tensor, rows: _Rows) -> None:
    if target.format in ("float32", "bfloat16"):
        arena.put(target, places, _packable(rows.values()))
        return
    if (blocks := _blocks(rows, target)) is not None:
        arena.put_blocks(target, places, blocks[1], blocks[0])
        return
    weight_format: WeightFormat = "int8" if target.format == "int8" else "int4"
    minimums = target.format == "int4_min"
    arena.put(target, places, _codes(rows, weight_format, minimums, GROUP_SIZE))


def _blocks(rows: _Rows, target: PackedWeight) -> tuple[str, Tensor] | None:
    wanted = {"Q4_0": "int4", "Q4_1": "int4_min", "Q8_0": "int8"}
    blocks = rows.blocks()
    return blocks if blocks is not None and wanted.get(blocks[0]) == target.format else None


def _packable(rows: Tensor) -> Tensor:
    return rows if rows.dtype in (torch.float32, torch.bfloat16, torch.float16) else rows.float()


def _codes(
    rows: _Rows, weight_format: WeightFormat, minimums: bool, group_size: int
) -> QuantizedWeight:
    """Rows in that format: the checkpoint's own codes, or values rounded to codes."""
    found = rows.quantized() if rows.source.format(rows.name) == weight_format else None
    if found is None or found.group_size % group_size:
        try:
            found = _rounded(rows, weight_format, minimums)
        except ValueError as error:
            raise WeightsError(f"{rows.name}: {error}") from error
    assert minimums or found.minimums_FG is None, "a format with minimums was to be chosen"
    if not minimums or found.minimums_FG is not None:
        return found
    return QuantizedWeight(
        weight_format, found.codes, found.scales_FG, found.scales_FG.float() * -8
    )


def _rounded(rows: _Rows, weight_format: WeightFormat, minimums: bool) -> QuantizedWeight:
    if minimums:
        return quantize_with_minimums(rows.values().float())
    if weight_format != "fp8" or rows.columns is None:
        return quantize(rows.values().float(), weight_format)
    # Its scale is a whole row's: whoever holds a part of it must find the same.
    return take_columns(quantize(rows.whole_values().float(), weight_format), rows.columns)


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
