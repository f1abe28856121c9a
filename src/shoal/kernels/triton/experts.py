"""A mixture's experts: which kernels for how many tokens.

    T <= 4      each token reads its experts' weights by itself (`experts_vector.py`)
    beyond      tokens sorted by expert, each expert's weights multiplied with tiles of its own
                (`experts_tiles.py`)

Nothing here waits for the device, and shapes follow from T, K and the experts held: a CUDA graph
may hold it. Sums are taken in the order of a token's experts: the same bits each time.
"""
# mypy: ignore-errors

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from shoal.kernels.experts import ExpertWeights
from shoal.kernels.triton.experts_tiles import experts_in_tiles
from shoal.kernels.triton.experts_vector import experts_by_token

MAX_VECTORS = 4


def experts(
    x_TE: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    experts: ExpertWeights,
    phase: Tensor,
    activation: Literal["silu", "gelu_tanh"],
) -> Tensor:
    """As the reference."""
    if not len(x_TE) or not experts.down_EF.shape[0]:
        return torch.zeros_like(x_TE)
    run = experts_by_token if len(x_TE) <= MAX_VECTORS else experts_in_tiles
    return run(
        x_TE.contiguous(),
        ids_TK.contiguous(),
        weights_TK.contiguous(),
        experts,
        phase,
        activation == "silu",
    )
