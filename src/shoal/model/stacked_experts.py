"""Experts that a file keeps in one tensor [experts, rows, columns], shown as a matrix each.

    file                                                   shown as
    ...mlp.experts.gate_up_proj      [X, gate and up, E]   ...mlp.experts.0.gate_proj.weight, ...
    ...mlp.experts.down_proj         [X, E, F]             ...mlp.experts.0.down_proj.weight, ...
    blk.0.ffn_gate_exps.weight       [X, F, E]             blk.0.ffn_gate_exps.0.weight, ...

So a rank reads its own experts alone. Knows nothing of which experts a model has.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor

from shoal.core.gguf_header import GGUFTensorInfo
from shoal.core.split import Range
from shoal.kernels.quantized import QuantizedWeight
from shoal.model.safetensors_files import SafetensorsFiles
from shoal.model.stored_weights import StoredWeight

_FUSED = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)")
_GGUF_STACK = re.compile(r"(.*\.ffn_(?:gate|up|down)_exps)\.weight")
_GGUF_VECTOR = re.compile(r".*\.ffn_gate_inp_shexp\.weight")


@dataclass(frozen=True, slots=True, eq=False)
class StackedWeight:
    """Rows [first, first + shape[0]) of one of the matrices in a tensor; floats."""

    files: SafetensorsFiles
    name: str
    number: int
    first: int
    shape: tuple[int, int]
    num_bytes: int
    format: None = None

    def quantized_rows(
        self, start: int, stop: int, columns: Range | None = None
    ) -> QuantizedWeight:
        raise AssertionError("there are only values")

    def rows(self, start: int, stop: int, columns: Range | None = None) -> Tensor:
        columns = Range(0, self.shape[1]) if columns is None else columns
        rows = Range(self.first + start, self.first + stop)
        return self.files.matrix_rows(self.name, self.number, rows, columns)


def find_stacked(files: SafetensorsFiles) -> tuple[dict[str, StoredWeight], frozenset[str]]:
    """Experts by the names they would have alone, and the tensors that hold them."""
    found: dict[str, StoredWeight] = {}
    hidden = set()
    for name in files.names:
        match = _FUSED.fullmatch(name)
        if match is None or len(shape := files.shape(name)) != 3:
            continue
        hidden.add(name)
        parts = ("gate_proj", "up_proj") if match[2] == "gate_up_proj" else ("down_proj",)
        rows = shape[1] // len(parts)
        num_bytes = files.num_bytes(name) // max(1, math.prod(shape[:2])) * rows
        for number in range(shape[0]):
            for index, part in enumerate(parts):
                found[f"{match[1]}.{number}.{part}.weight"] = StackedWeight(
                    files, name, number, index * rows, (rows, shape[2]), num_bytes
                )
    return found, frozenset(hidden)


def unstacked(info: GGUFTensorInfo, num_bytes: int) -> Iterator[GGUFTensorInfo]:
    """The matrices of a stack; anything else as it is.

    Args:
        num_bytes: of the whole tensor.
    """
    match = _GGUF_STACK.fullmatch(info.name)
    if match is not None and len(info.dims) == 3:
        size = num_bytes // info.dims[2]
        for number in range(info.dims[2]):
            name, offset = f"{match[1]}.{number}.weight", info.offset + number * size
            yield replace(info, name=name, dims=info.dims[:2], offset=offset)
    elif len(info.dims) == 1 and _GGUF_VECTOR.fullmatch(info.name):
        yield replace(info, dims=(info.dims[0], 1))  # a matrix of one row
    else:
        yield info
