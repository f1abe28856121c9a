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
from shoal.kernels.quantized import QuantizedWeight, WeightFormat
from shoal.model.gguf_blocks import DEQUANTIZE
from shoal.model.gguf_quantized import AS_QUANTIZED, FORMATS

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
        self._tensors = {tensor.name: tensor for tensor in header.tensors}
        self._data = torch.from_file(
            str(path), shared=False, size=header.size_bytes, dtype=torch.uint8
        )
        for name, info in self._tensors.items():
            end = info.offset + self._row_bytes(info) * _num_rows(info)
            if end > header.size_bytes:
                raise WeightsError(
                    f"{path} is truncated: it has {header.size_bytes} bytes and {name} ends at "
                    f"byte {end}; fetch the file again"
                )

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(reversed(self._tensors[name].dims))

    def row_bytes(self, name: str) -> int:
        """Bytes in the file of one row (index into the first dimension)."""
        info = self._tensors[name]
        return self._row_bytes(info) * _num_rows(info) // self.shape(name)[0]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """The values, fp32 or as they are stored."""
        info = self._tensors[name]
        data = self._bytes(name, start, stop)
        shape = (stop - start, *self.shape(name)[1:])
        kind = gguf.GGMLQuantizationType(info.type_id)
        if kind.name in _PLAIN:
            return data.view(_PLAIN[kind.name]).view(shape)
        block_bytes = gguf.GGML_QUANT_SIZES[kind][1]
        if kind.name in DEQUANTIZE:
            return DEQUANTIZE[kind.name](data.view(-1, block_bytes)).view(shape)
        rows = data.view(-1, self._row_bytes(info)).numpy()
        try:
            return torch.from_numpy(gguf.dequantize(rows, kind)).view(shape)
        except NotImplementedError as error:
            raise self._unsupported(info, kind.name) from error

    def format(self, name: str) -> WeightFormat | None:
        """What `quantized_rows` gives; None: values alone."""
        if len(self._tensors[name].dims) != 2:
            return None
        return FORMATS.get(gguf.GGMLQuantizationType(self._tensors[name].type_id).name)

    def quantized_rows(self, name: str, start: int, stop: int) -> QuantizedWeight:
        """The same values as `rows`, as codes; only where there is a format."""
        info = self._tensors[name]
        kind = gguf.GGMLQuantizationType(info.type_id)
        blocks = self._bytes(name, start, stop).view(-1, gguf.GGML_QUANT_SIZES[kind][1])
        return AS_QUANTIZED[kind.name](blocks, info.dims[0])

    def blocks(self, name: str, start: int, stop: int) -> tuple[str, Tensor]:
        """The type of a tensor, and its rows as they lie in the file: uint8 [rows, bytes]."""
        kind = gguf.GGMLQuantizationType(self._tensors[name].type_id).name
        return kind, self._bytes(name, start, stop).view(stop - start, -1)

    def _bytes(self, name: str, start: int, stop: int) -> Tensor:
        offset, row_bytes = self._tensors[name].offset, self.row_bytes(name)
        return self._data[offset + start * row_bytes : offset + stop * row_bytes]

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
