"""Hidden states [T, E] as fewer bytes, and back: bfloat16, or int8 in blocks.

    int8   [C columns' numbers, int32 | their values, T x C bf16 | scales, bf16 | codes, int8]

Of a message's columns one in 64 stands out most: a few channels of a residual stream are a
hundred times as large as the rest (arXiv 2208.07339) and would leave it no codes. They are sent
as bfloat16. Of what is left, 64 numbers in a row are a block with scale = largest / 127 and
code = round(number / scale). In all 1.06 bytes a number. What comes back differs from x by at most

    |x| / 256                            bfloat16, and the columns that stand out
    largest of the rest of its block / 253     int8; the scale is rounded too

Not a number stays not a number, in all of its block. Knows nothing of who sends what to whom.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.core.options import LinkFormat

BLOCK = 64
_COLUMNS_PER_OUTLIER = 64
_WIDE = torch.bfloat16
_ALIGNED_BYTES = 4
"""So that data can be read where it lies, behind other data."""


def encoded_bytes(num_rows: int, width: int, encoding: LinkFormat, dtype: torch.dtype) -> int:
    """What [num_rows, width] numbers of a dtype take."""
    if encoding == "int8":
        return _Layout.of(num_rows, width).size_bytes
    return num_rows * width * (_WIDE if encoding == "bfloat16" else dtype).itemsize


def encode(numbers_TE: Tensor, encoding: LinkFormat) -> Tensor:
    """uint8, in one piece, where the numbers are."""
    if encoding == "int8":
        return _encode_int8(numbers_TE)
    if encoding == "bfloat16":
        numbers_TE = numbers_TE.to(_WIDE)
    return numbers_TE.contiguous().view(-1).view(torch.uint8)


def decode(
    data: Tensor, encoding: LinkFormat, num_rows: int, width: int, dtype: torch.dtype
) -> Tensor:
    """The numbers [num_rows, width]: fp32 from int8, else as sent; may share `data`'s memory.

    Args:
        data: as `encode` gave it, `encoded_bytes` long.
        dtype: that was encoded.

    Raises:
        ValueError: columns that are not there.
    """
    if encoding == "int8":
        return _decode_int8(data, _Layout.of(num_rows, width))
    kept = _WIDE if encoding == "bfloat16" else dtype
    return data.view(kept).view(num_rows, width)


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where the parts of int8 data lie."""

    num_rows: int
    width: int
    num_columns: int
    num_blocks: int

    @classmethod
    def of(cls, num_rows: int, width: int) -> _Layout:
        return cls(
            num_rows, width, -(-width // _COLUMNS_PER_OUTLIER), -(-num_rows * width // BLOCK)
        )

    @property
    def size_bytes(self) -> int:
        return -(-sum(self._sizes) // _ALIGNED_BYTES) * _ALIGNED_BYTES

    def parts(self, data: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Columns int32 [C], their values [T, C], scales [blocks], codes [T * E]."""
        columns, values, scales, codes = torch.split(data[: sum(self._sizes)], self._sizes)
        return (
            columns.view(torch.int32),
            values.view(_WIDE).view(self.num_rows, self.num_columns),
            scales.view(_WIDE),
            codes.view(torch.int8),
        )

    @property
    def _sizes(self) -> list[int]:
        values = self.num_rows * self.num_columns
        count = self.num_rows * self.width
        return [4 * self.num_columns, 2 * values, 2 * self.num_blocks, count]


def _encode_int8(numbers_TE: Tensor) -> Tensor:
    layout = _Layout.of(*numbers_TE.shape)
    data = numbers_TE.new_empty(layout.size_bytes, dtype=torch.uint8)
    columns_C, values_TC, scales_N, codes = layout.parts(data)
    rest_TE = numbers_TE.to(torch.float32, copy=True)
    outstanding_C = _outstanding(rest_TE, layout.num_columns)
    columns_C.copy_(outstanding_C)
    values_TC.copy_(rest_TE[:, outstanding_C])
    rest_TE[:, outstanding_C] = 0
    blocks_NB = _in_blocks(rest_TE)
    low_N, high_N = blocks_NB.aminmax(dim=1)
    scales_N.copy_(torch.maximum(high_N, low_N.neg_()).div_(127))
    # A block of zeros has scale 0, and codes of 0 whatever it is divided by.
    divisors_N = scales_N.float().clamp_min_(torch.finfo(torch.float32).tiny)
    blocks_NB.div_(divisors_N[:, None]).round_().clamp_(-127, 127)
    codes.copy_(blocks_NB.view(-1)[: len(codes)])
    return data


def _outstanding(numbers_TE: Tensor, count: int) -> Tensor:
    """Columns with the largest share of their rows; every row counts the same."""
    lengths_T = torch.linalg.vector_norm(numbers_TE, dim=1)
    weights_T = lengths_T.square_().clamp_min_(torch.finfo(torch.float32).tiny).reciprocal_()
    shares_E = torch.mv(numbers_TE.square().T, weights_T)
    return torch.topk(shares_E, count).indices


def _decode_int8(data: Tensor, layout: _Layout) -> Tensor:
    columns_C, values_TC, scales_N, codes = layout.parts(data)
    if layout.num_columns and not bool(((columns_C >= 0) & (columns_C < layout.width)).all()):
        raise ValueError(f"columns {columns_C.tolist()} of {layout.width}")
    blocks_NB = _in_blocks(codes.float()).mul_(scales_N.float()[:, None])
    count = layout.num_rows * layout.width
    numbers_TE = blocks_NB.view(-1)[:count].view(layout.num_rows, layout.width)
    numbers_TE[:, columns_C.long()] = values_TC.float()
    return numbers_TE


def _in_blocks(numbers: Tensor) -> Tensor:
    """[blocks, BLOCK]; the last is filled up with zeros."""
    flat = numbers.view(-1)
    missing = -len(flat) % BLOCK
    if missing:
        flat = torch.nn.functional.pad(flat, (0, missing))
    return flat.view(-1, BLOCK)
