"""Reference products: a linear layer, and the gate of an MLP. Plain torch.

T tokens   E, F columns of x and of what comes out
"""

from __future__ import annotations

from typing import Literal

import torch
from torch.nn.functional import gelu, silu

from shoal.kernels.quantized import QuantizedWeight

_FEW_ROWS = (4, 48)


def linear(
    x_TE: torch.Tensor, weight: torch.Tensor | QuantizedWeight, bias_F: torch.Tensor | None
) -> torch.Tensor:
    """x @ weight.T + bias; a weight in few bits is undone to x's dtype first.

    With a few rows on a CPU the product is taken transposed: MKL's sgemm then runs 1.5 to 3
    times faster (docs/log.md).
    """
    weight_FE = weight if isinstance(weight, torch.Tensor) else weight.dequantize(x_TE.dtype)
    if x_TE.device.type != "cpu" or not _FEW_ROWS[0] <= len(x_TE) <= _FEW_ROWS[1]:
        return torch.nn.functional.linear(x_TE, weight_FE, bias_F)
    out_TF = torch.mm(weight_FE, x_TE.t()).t().contiguous()
    return out_TF if bias_F is None else out_TF.add_(bias_F)


def gated_activation(
    gate_up_TF: torch.Tensor, activation: Literal["silu", "gelu_tanh"]
) -> torch.Tensor:
    """activation(gate) * up, of [gate | up] side by side (arXiv 2002.05202)."""
    gate, up = gate_up_TF.chunk(2, -1)
    if activation == "silu":
        return silu(gate).mul_(up)
    return gelu(gate, approximate="tanh").mul_(up)
