"""A few to a few hundred tokens times a weight in few bits, on the tensor cores.

    T tokens   F rows   K columns   G groups of columns

Each tile of codes becomes a tile of x's dtype in registers, rounded as the reference rounds it,
and is multiplied at once: [F, K] x [K, T], the weight's rows first, as a tile needs more of them
than there may be tokens. Where there are too few tiles for the GPU, K is cut into parts whose
sums are added in a fixed order.
"""
# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.kernels.quantized import QuantizedWeight
from shoal.kernels.triton.weight_tile import tile_arguments, weight_tile

_BLOCK_F = 64
_MAX_BLOCK_T = 64
_MAX_PARTS = 8
_PROCESSORS_OF_INTERPRETER = 4


def tiles_linear(x_TK: Tensor, weight: QuantizedWeight, bias_F: Tensor | None) -> Tensor:
    """x @ weight.T + bias."""
    num_tokens = len(x_TK)
    rows, columns = weight.shape
    block_t = max(16, min(_MAX_BLOCK_T, triton.next_power_of_2(num_tokens)))
    block_k = 128 if x_TK.element_size() < 4 else 64
    grid = (triton.cdiv(rows, _BLOCK_F), triton.cdiv(num_tokens, block_t))
    parts = _num_parts(grid[0] * grid[1], triton.cdiv(columns, block_k), x_TK.device)
    given, constants = tile_arguments(weight, block_k)
    dtype = x_TK.dtype if parts == 1 else torch.float32
    out_PTF = x_TK.new_empty((parts, num_tokens, rows), dtype=dtype)
    _tiles[(*grid, parts)](
        x_TK,
        *given,
        x_TK if bias_F is None else bias_F,
        out_PTF,
        num_tokens,
        rows,
        triton.cdiv(triton.cdiv(columns, block_k), parts) * block_k,
        **constants,
        HAS_BIAS=bias_F is not None and parts == 1,
        BLOCK_F=_BLOCK_F,
        BLOCK_T=block_t,
        BLOCK_K=block_k,
        num_warps=4,
        num_stages=3 if x_TK.element_size() < 4 else 2,
    )
    if parts == 1:
        return out_PTF[0]
    out_TF = out_PTF.sum(0)
    return (out_TF if bias_F is None else out_TF.add_(bias_F)).to(x_TK.dtype)


def _num_parts(num_tiles: int, num_steps: int, device: torch.device) -> int:
    processors = _PROCESSORS_OF_INTERPRETER
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(2 * processors // num_tiles, num_steps, _MAX_PARTS))


@triton.jit
def _tiles(
    x_ptr,
    codes_ptr,
    scales_ptr,
    minimums_ptr,
    columns,
    row_bytes,
    groups,
    bias_ptr,
    out_ptr,
    num_tokens,
    rows,
    part_columns,
    GROUP: tl.constexpr,
    RUN: tl.constexpr,
    KIND: tl.constexpr,
    HAS_MINIMUM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    f = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    part = tl.program_id(2)
    f_wide = f.to(tl.int64)[:, None]
    t_wide = t.to(tl.int64)[None, :]
    acc = tl.zeros([BLOCK_F, BLOCK_T], tl.float32)
    last = tl.minimum((part + 1) * part_columns, columns)
    for start in range(part * part_columns, last, BLOCK_K):
        weight = weight_tile(
            codes_ptr, scales_ptr, minimums_ptr, f.to(tl.int64), f < rows, start, columns,
            row_bytes, groups, GROUP, RUN, KIND, HAS_MINIMUM, BLOCK_F, BLOCK_K,
        )  # fmt: skip
        weight = weight.to(x_ptr.dtype.element_ty)
        k_x = start + tl.arange(0, BLOCK_K)
        x_mask = (k_x < columns)[:, None] & (t < num_tokens)[None, :]
        x = tl.load(x_ptr + t_wide * columns + k_x[:, None], mask=x_mask, other=0.0)
        acc = tl.dot(weight, x, acc, input_precision="ieee")
    if HAS_BIAS:
        acc += tl.load(bias_ptr + f, mask=f < rows, other=0.0).to(tl.float32)[:, None]
    out_mask = (f < rows)[:, None] & (t < num_tokens)[None, :]
    out_offset = (part * num_tokens + t_wide) * rows + f_wide
    tl.store(out_ptr + out_offset, acc.to(out_ptr.dtype.element_ty), mask=out_mask)
