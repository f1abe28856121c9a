"""Tensors of a GGUF file, by memory map, as values (fp32) or as codes, row by row.

Block formats in everyday use have a torch path (`gguf_blocks.py`); the others go through the
`gguf` package's numpy. Knows nothing of what the tensors are for.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import torch
from torch import Tensor

from shoal.core.errors import ModelError, UnsupportedModelError, WeightsError
from shoal.core.gguf_header import GGUFTensorInfo, read_gguf_header
from shoal.core.split import Range
from shoal.kernels.quantized import QuantizedWeight, WeightFormat
from shoal.model.columns import covering, take_columns
from shoal.model.gguf_blocks import DEQUANTIZE
from shoal.model.gguf_quantized import AS_QUANTIZED, FORMATS
from shoal.model.stacked_experts import unstacked

_PLAIN = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class GGUFSource:
    """Named tensors of a file.

    Raises:
        WeightsError: a truncated or corrupt file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            header = read_gguf_header(path)
        except UnsupportedModelError:
            raise
        except ModelError as error:
            raise WeightsError(str(error)) from error
        self._data = torch.from_file(
            str(path), shared=False, size=header.size_bytes, dtype=torch.uint8
        )
        for info in header.tensors:
            end = info.offset + self._row_bytes(info) * _num_rows(info)
            if end > header.size_bytes:
                raise WeightsError(
                    f"{path} is truncated: it has {header.size_bytes} bytes and {info.name} ends "
                    f"at byte {end}; fetch the file again"
                )
        self._tensors = {
            each.name: each
            for info in header.tensors
            for each in unstacked(info, self._row_bytes(info) * _num_rows(info))
        }

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(reversed(self._tensors[name].dims))

    def row_bytes(self, name: str) -> int:
        """Bytes in the file of one row (index into the first dimension)."""
        info = self._tensors[name]
        return self._row_bytes(info) * _num_rows(info) // self.shape(name)[0]

    def rows(self, name: str, start: int, stop: int, columns: Range | None = None) -> Tensor:
        """The values, fp32 or as they are stored."""
        if columns is None:
            return self._values(name, self._bytes(name, start, stop)).view(
                stop - start, *self.shape(name)[1:]
            )
        cover = self._cover(name, columns)
        values = self._values(name, self._some_bytes(name, start, stop, cover))
        first = columns.start - cover.start
        return values.view(stop - start, len(cover))[:, first : first + len(columns)]

    def format(self, name: str) -> WeightFormat | None:
        """What `quantized_rows` gives; None: values alone."""
        if len(self._tensors[name].dims) != 2:
            return None
        return FORMATS.get(gguf.GGMLQuantizationType(self._tensors[name].type_id).name)

    def quantized_rows(
        self, name: str, start: int, stop: int, columns: Range | None = None
    ) -> QuantizedWeight:
        """The same values as `rows`, as codes; only where there is a format."""
        columns = Range(0, self.shape(name)[1]) if columns is None else columns
        cover = self._cover(name, columns)
        kind = self._kind(name)
        blocks = self._some_bytes(name, start, stop, cover)
        rows = AS_QUANTIZED[kind.name](blocks.view(-1, gguf.GGML_QUANT_SIZES[kind][1]), len(cover))
        first = columns.start - cover.start
        return take_columns(rows, Range(first, first + len(columns)))

    def blocks(
        self, name: str, start: int, stop: int, columns: Range | None = None
    ) -> tuple[str, Tensor] | None:
        """The type of a tensor, and its rows as they lie in the file: uint8 [rows, bytes].

        None: a range of columns that is no whole blocks.
        """
        columns = Range(0, self.shape(name)[1]) if columns is None else columns
        if self._cover(name, columns) != columns:
            return None
        blocks = self._some_bytes(name, start, stop, columns)
        return self._kind(name).name, blocks.view(stop - start, -1)

    def _values(self, name: str, data: Tensor) -> Tensor:
        """What whole blocks hold."""
        kind = self._kind(name)
        if kind.name in _PLAIN:
            return data.view(_PLAIN[kind.name])
        block_bytes = gguf.GGML_QUANT_SIZES[kind][1]
        if kind.name in DEQUANTIZE:
            return DEQUANTIZE[kind.name](data.view(-1, block_bytes))
        try:
            return torch.from_numpy(gguf.dequantize(data.view(-1, block_bytes).numpy(), kind))
        except NotImplementedError as error:
            raise self._unsupported(self._tensors[name], kind.name) from error

    def _kind(self, name: str) -> gguf.GGMLQuantizationType:
        return gguf.GGMLQuantizationType(self._tensors[name].type_id)

    def _cover(self, name: str, columns: Range) -> Range:
        """Columns of the blocks that hold these."""
        block_values: int = gguf.GGML_QUANT_SIZES[self._kind(name)][0]
        return covering(columns, block_values, self.shape(name)[1])

    def _bytes(self, name: str, start: int, stop: int) -> Tensor:
        offset, row_bytes = self._tensors[name].offset, self.row_bytes(name)
        return self._data[offset + start * row_bytes : offset + stop * row_bytes]

    def _some_bytes(self, name: str, start: int, stop: int, cover: Range) -> Tensor:
        """Of whole blocks along the rows of a matrix, one row after another."""
        data = self._bytes(name, start, stop)
        if len(cover) == self.shape(name)[1]:
            return data
        block_values, block_bytes = gguf.GGML_QUANT_SIZES[self._kind(name)]
        rows = data.view(stop - start, -1)
        first, last = cover.start // block_values, cover.stop // block_values
        return rows[:, first * block_bytes : last * block_bytes].contiguous().flatten()

    def _row_bytes(self, info: GGUFTensorInfo) -> int:
        """Bytes of one run along the fastest dimension."""
        try:
            kind = gguf.GGMLQuantizationType(info.type_id)
        except ValueError as error:
            raise self._unsupported(info, f"number {info.type_id}") from error
        block_values, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        if not info.dims or min(info.dims) < 1 or info.dims[0] % block_values:
            raise WeightsError(
                f"{self._path}: {info.name} has dimensions {info.dims}; {kind.name} needs rows "
                f"of a multiple of {block_values}: the file is corrupt"
            )
        num_bytes: int = info.dims[0] // block_values * block_bytes
        return num_bytes

    def _unsupported(self, info: GGUFTensorInfo, kind: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{self._path}: {info.name} has tensor type {kind}, which is not supported; use a "
            "file in another quantisation, such as Q4_K_M or Q8_0"
        )


def _num_rows(info: GGUFTensorInfo) -> int:
    rows = 1
    for dim in info.dims[1:]:
        rows *= dim
    return rows
