"""A whole weight in few bits, undone: any shape, any group size.

F rows   K columns   G groups of columns
"""
# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.kernels.quantized import QuantizedWeight
from shoal.kernels.triton.numbers import FP8, INT4, INT8, to_number

_BLOCK = 1024
KINDS = {"int8": INT8, "fp8": FP8, "int4": INT4}


def dequantize(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """As `QuantizedWeight.dequantize`."""
    rows, columns = weight.shape
    codes = code_bytes(weight)
    minimums = weight.minimums_FG
    out_FK = torch.empty((rows, columns), dtype=dtype, device=codes.device)
    _dequantize[(rows, triton.cdiv(columns, _BLOCK))](
        codes,
        weight.scales_FG,
        weight.scales_FG if minimums is None else minimums,
        out_FK,
        columns,
        codes.shape[1],
        weight.scales_FG.shape[1],
        GROUP=weight.group_size,
        KIND=KINDS[weight.format],
        HAS_MINIMUM=minimums is not None,
        BLOCK=_BLOCK,
        num_warps=4,
    )
    return out_FK


def code_bytes(weight: QuantizedWeight) -> Tensor:
    """The codes as Triton gets them: fp8 as bytes."""
    codes = weight.codes.contiguous()
    return codes.view(torch.uint8) if weight.format == "fp8" else codes


@triton.jit
def _dequantize(
    codes_ptr,
    scales_ptr,
    minimums_ptr,
    out_ptr,
    columns,
    row_bytes,
    groups,
    GROUP: tl.constexpr,
    KIND: tl.constexpr,
    HAS_MINIMUM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < columns
    if KIND == 3:
        byte = tl.load(codes_ptr + row * row_bytes + column // 2, mask=mask, other=0)
        value = ((byte.to(tl.int32) >> (column % 2 * 4)) & 15).to(tl.float32)
        if not HAS_MINIMUM:
            value -= 8.0
    else:
        code = tl.load(codes_ptr + row * row_bytes + column, mask=mask, other=0)
        value = to_number(code, KIND, tl.float32)
    cell = row * groups + column // GROUP
    value *= tl.load(scales_ptr + cell, mask=mask, other=0.0).to(tl.float32)
    if HAS_MINIMUM:
        value += tl.load(minimums_ptr + cell, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * columns + column, value.to(out_ptr.dtype.element_ty), mask=mask)
