"""A tile of a weight as fp32, whatever it is kept as; for kernels that multiply with it at once.

    F rows of the tile, anywhere in the weight   K columns of the tile   G groups of columns

Knows nothing of what it is multiplied with.
"""
# mypy: ignore-errors

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from shoal.kernels.quantized import QuantizedWeight
from shoal.kernels.triton.dequantize import KINDS, code_bytes
from shoal.kernels.triton.numbers import PLAIN, to_number


def tile_arguments(
    weight: Tensor | QuantizedWeight, block_k: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What `weight_tile` wants of a weight: codes, scales, minimums, columns, bytes of a row and
    groups; then its constants.
    """
    if isinstance(weight, Tensor):
        plain, columns = weight.contiguous(), weight.shape[1]
        constants = {"GROUP": block_k, "RUN": block_k, "KIND": PLAIN, "HAS_MINIMUM": False}
        return (plain, plain, plain, columns, columns, 1), constants
    codes, scales, minimums = code_bytes(weight), weight.scales_FG, weight.minimums_FG
    lows = scales if minimums is None else minimums
    constants = {
        "GROUP": weight.group_size,
        # Columns of one group next to each other: the largest power of two that divides it.
        "RUN": min(weight.group_size & -weight.group_size, block_k),
        "KIND": KINDS[weight.format],
        "HAS_MINIMUM": minimums is not None,
    }
    return (codes, scales, lows, weight.shape[1], codes.shape[1], scales.shape[1]), constants


@triton.jit
def weight_tile(
    codes_ptr,
    scales_ptr,
    minimums_ptr,
    f,
    f_there,
    start,
    columns,
    row_bytes,
    groups,
    GROUP: tl.constexpr,
    RUN: tl.constexpr,
    KIND: tl.constexpr,
    HAS_MINIMUM: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """fp32 [F, K] of the rows `f` (int64; those that are not `f_there` become 0) from column
    `start` on.
    """
    f_wide = f[:, None]
    k = start + tl.arange(0, BLOCK_K)
    mask = f_there[:, None] & (k < columns)[None, :]
    if KIND == 0:
        plain = tl.load(codes_ptr + f_wide * row_bytes + k[None, :], mask=mask, other=0.0)
        values = plain.to(tl.float32)
    else:
        if KIND == 3:
            byte_at = start // 2 + tl.arange(0, BLOCK_K // 2)
            byte_mask = f_there[:, None] & (byte_at < row_bytes)[None, :]
            at = f_wide * row_bytes + byte_at[None, :]
            codes = tl.load(codes_ptr + at, mask=byte_mask, other=0)
            codes = tl.interleave(codes & 15, codes >> 4)
        else:
            codes = tl.load(codes_ptr + f_wide * row_bytes + k[None, :], mask=mask, other=0)
        values = to_number(codes, KIND, tl.float32)
        if KIND == 3 and not HAS_MINIMUM:
            values -= 8.0
        RUNS: tl.constexpr = BLOCK_K // RUN
        run_at = start + tl.arange(0, RUNS) * RUN
        cell = f_wide * groups + (run_at // GROUP)[None, :]
        run_mask = f_there[:, None] & (run_at < columns)[None, :]
        scale = tl.load(scales_ptr + cell, mask=run_mask, other=0.0).to(tl.float32)
        values = tl.reshape(values, (BLOCK_F, RUNS, RUN)) * scale[:, :, None]
        if HAS_MINIMUM:
            minimum = tl.load(minimums_ptr + cell, mask=run_mask, other=0.0).to(tl.float32)
            values += minimum[:, :, None]
        values = tl.reshape(values, (BLOCK_F, BLOCK_K))
    return values
