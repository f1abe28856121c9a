"""Tensors of a GGUF file, by memory map, dequantised to fp32 row by row as they are asked for.

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
from shoal.model.gguf_blocks import DEQUANTIZE

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
        info = self._tensors[name]
        row_bytes = self.row_bytes(name)
        data = self._data[info.offset + start * row_bytes : info.offset + stop * row_bytes]
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
