"""activation(gate) * up in one pass over [gate | up].

T tokens   F FFN columns
"""
# mypy: ignore-errors

from __future__ import annotations

from typing import Literal

import triton
import triton.language as tl
from torch import Tensor

from shoal.kernels.triton.numbers import gated

_BLOCK = 1024


def gated_activation(gate_up_TF: Tensor, activation: Literal["silu", "gelu_tanh"]) -> Tensor:
    """As the reference."""
    gate_up_TF = gate_up_TF.contiguous()
    num_tokens, size = gate_up_TF.shape[0], gate_up_TF.shape[1] // 2
    out_TF = gate_up_TF.new_empty((num_tokens, size))
    if out_TF.numel():
        _gated[(num_tokens, triton.cdiv(size, _BLOCK))](
            gate_up_TF, out_TF, size, IS_SILU=activation == "silu", BLOCK=_BLOCK, num_warps=4
        )
    return out_TF


@triton.jit
def _gated(gate_up_ptr, out_ptr, size, IS_SILU: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < size
    gate = tl.load(gate_up_ptr + token * 2 * size + column, mask=mask, other=0.0)
    up = tl.load(gate_up_ptr + token * 2 * size + size + column, mask=mask, other=0.0)
    wide, wide_up = gate.to(tl.float32), up.to(tl.float32)
    inner = gated(wide, wide_up, IS_SILU, out_ptr.dtype.element_ty)
    tl.store(out_ptr + token * size + column, inner, mask=mask)
