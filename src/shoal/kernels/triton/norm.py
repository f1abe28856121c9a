"""RMS norm, alone or with the residual added first.

T tokens   E hidden size   H heads   D head size
"""
# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As the reference; x is [T, E], or [T, H, D] with any strides but the last."""
    x_THE = x if x.dim() == 3 else x.unsqueeze(1)
    if x_THE.stride(-1) != 1:
        x_THE = x_THE.contiguous()
    num_tokens, num_heads, size = x_THE.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(size)
    weight_stride = size if weight.dim() == 2 and weight.shape[0] > 1 else 0
    if x.numel():
        _rms_norm[(num_tokens, num_heads)](
            x_THE,
            weight,
            out,
            eps,
            size,
            x_THE.stride(0),
            x_THE.stride(1),
            weight_stride,
            BLOCK=block,
            num_warps=_num_warps(block),
        )
    return out


def add_rms_norm(x_TE: Tensor, y_TE: Tensor, weight_E: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + y, and its norm."""
    x_TE, y_TE = x_TE.contiguous(), y_TE.contiguous()
    sum_TE, out_TE = torch.empty_like(x_TE), torch.empty_like(x_TE)
    size = x_TE.shape[1]
    block = triton.next_power_of_2(size)
    if x_TE.numel():
        _add_rms_norm[(len(x_TE),)](
            x_TE,
            y_TE,
            weight_E,
            sum_TE,
            out_TE,
            eps,
            size,
            BLOCK=block,
            num_warps=_num_warps(block),
        )
    return sum_TE, out_TE


def _num_warps(block: int) -> int:
    return min(max(block // 512, 1), 16)


@triton.jit
def _rms_norm(
    x_ptr, weight_ptr, out_ptr, eps, size, x_stride, head_stride, weight_stride, BLOCK: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    column = tl.arange(0, BLOCK)
    mask = column < size
    x = tl.load(x_ptr + token * x_stride + head * head_stride + column, mask=mask, other=0.0)
    wide = x.to(tl.float32)
    weight = tl.load(weight_ptr + head * weight_stride + column, mask=mask, other=0.0)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / size + eps)
    row = token * tl.num_programs(1) + head
    tl.store(out_ptr + row * size + column, (wide * scale * weight).to(x.dtype), mask=mask)


@triton.jit
def _add_rms_norm(x_ptr, y_ptr, weight_ptr, sum_ptr, out_ptr, eps, size, BLOCK: tl.constexpr):
    offset = tl.program_id(0).to(tl.int64) * size
    column = tl.arange(0, BLOCK)
    mask = column < size
    x = tl.load(x_ptr + offset + column, mask=mask, other=0.0)
    y = tl.load(y_ptr + offset + column, mask=mask, other=0.0)
    # The norm is of the sum as it is kept.
    total = (x.to(tl.float32) + y.to(tl.float32)).to(x.dtype)
    tl.store(sum_ptr + offset + column, total, mask=mask)
    wide = total.to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=mask, other=0.0)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / size + eps)
    tl.store(out_ptr + offset + column, (wide * scale * weight).to(x.dtype), mask=mask)
