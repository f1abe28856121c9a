"""Packed weights, and the memory they lie in: one run of huge pages, in the order they are read.

Rows of a checkpoint are packed as they come; the layout is csrc/packing.h's. Knows nothing of
what the weights are for.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from shoal.kernels.cpu import library as c
from shoal.kernels.quantized import QuantizedWeight

PackedFormat = Literal["float32", "bfloat16", "int8", "int4", "int4_min"]

LANES = 16
"""Rows that lie side by side."""

GROUP = 32
"""Columns that share a scale."""

_FORMATS: dict[PackedFormat, int] = {
    "float32": 0,
    "bfloat16": 1,
    "int8": 2,
    "int4": 3,
    "int4_min": 4,
}
_DTYPE_SOURCES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_BLOCK_SOURCES = {"Q4_0": 3, "Q4_1": 4, "Q8_0": 5}
_CODE_SOURCES = {"int8": 6, "int4": 7}


@dataclass(frozen=True, slots=True, eq=False)
class PackedWeight:
    """A weight [rows, cols] as the compiled kernels read it; `data` is a part of an arena."""

    format: PackedFormat
    rows: int
    cols: int
    data: Tensor

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def as_c(self) -> c.Weight:
        return c.Weight(self.data.data_ptr(), _FORMATS[self.format], self.rows, self.cols, 0)


class ArenaSize:
    """Counts what an arena would have to hold."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self.bytes = 0

    def take(self, weight_format: PackedFormat, rows: int, cols: int) -> PackedWeight:
        """A weight without room."""
        self.bytes += packed_bytes(self._library, weight_format, rows, cols)
        return PackedWeight(weight_format, rows, cols, torch.empty(0, dtype=torch.uint8))


class Arena:
    """Zeroed memory for packed weights, handed out front to back.

    Raises:
        MemoryError, OSError: there is not that much.
    """

    def __init__(self, library: ctypes.CDLL, size_bytes: int) -> None:
        self._library = library
        self._used = 0
        memory = mmap.mmap(-1, max(size_bytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError, AttributeError):  # kernels without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
        self.data = torch.frombuffer(memory, dtype=torch.uint8)

    def take(self, weight_format: PackedFormat, rows: int, cols: int) -> PackedWeight:
        """Room for a weight, all zeros."""
        size = packed_bytes(self._library, weight_format, rows, cols)
        start, self._used = self._used, self._used + size
        assert self._used <= len(self.data), "the arena was made too small"
        return PackedWeight(weight_format, rows, cols, self.data[start : self._used])

    def rewind(self) -> None:
        """Hand out the same memory again: for weights that are not there at one time."""
        self._used = 0

    def put(self, weight: PackedWeight, places: Tensor, rows: Tensor | QuantizedWeight) -> None:
        """Pack rows of a checkpoint at `places` (int64, one packed row for each).

        Floats go into float formats, codes of groups of 32 (or multiples) into their own.
        """
        if isinstance(rows, Tensor):
            rows = rows.contiguous()
            self._pack(weight, places, _DTYPE_SOURCES[rows.dtype], rows)
            return
        scales = rows.scales_FG.float().contiguous()
        minimums = None if rows.minimums_FG is None else rows.minimums_FG.float().contiguous()
        source = _CODE_SOURCES[rows.format]
        self._pack(weight, places, source, rows.codes.contiguous(), scales, minimums)

    def put_blocks(self, weight: PackedWeight, places: Tensor, blocks: Tensor, kind: str) -> None:
        """Pack rows that are GGUF blocks as they lie in the file (uint8 [rows, bytes])."""
        self._pack(weight, places, _BLOCK_SOURCES[kind], blocks)

    def _pack(
        self,
        weight: PackedWeight,
        places: Tensor,
        source: int,
        rows: Tensor,
        scales: Tensor | None = None,
        minimums: Tensor | None = None,
    ) -> None:
        code = self._library.shoal_cpu_pack(
            weight.data.data_ptr(),
            _FORMATS[weight.format],
            weight.cols,
            source,
            rows.data_ptr(),
            None if scales is None else scales.data_ptr(),
            None if minimums is None else minimums.data_ptr(),
            0 if scales is None else scales.shape[1],
            places.data_ptr(),
            len(places),
        )
        assert code == 0, f"{weight.format} cannot hold rows of source {source}"


def packed_bytes(library: ctypes.CDLL, weight_format: PackedFormat, rows: int, cols: int) -> int:
    """Memory of a packed weight."""
    return int(library.shoal_cpu_packed_bytes(_FORMATS[weight_format], rows, cols))


def groups_fit(weight_cols: int, group_size: int) -> bool:
    """Whether codes with such groups can be packed as they are."""
    return group_size % GROUP == 0 or group_size == weight_cols
