"""Inverse frequencies of a RopeSpec (rotary embedding, arXiv 2104.09864, and its stretchings)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from shoal.core.model_spec import RopeSpec


def inverse_frequencies(rope: RopeSpec, head_dim: int) -> Tensor:
    """Radians per position, fp32 [head_dim / 2]."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    inv_freq = 1.0 / rope.theta**exponents
    match rope.scaling:
        case "none":
            return inv_freq
        case "linear":
            return inv_freq / rope.factor
        case "divisors":
            return inv_freq / torch.tensor(rope.divisors, dtype=torch.float32)
        case "llama3":
            return _llama3(inv_freq, rope)
        case "yarn":
            return _yarn(inv_freq, rope, head_dim)


def attention_factor(rope: RopeSpec) -> float:
    """What cos and sin are multiplied by."""
    return 1.0 if rope.attention_factor is None else rope.attention_factor


def _llama3(inv_freq: Tensor, rope: RopeSpec) -> Tensor:
    """Long waves are stretched, short ones kept, those between blended (Llama 3.1's code)."""
    turns = rope.original_max_positions * inv_freq / (2 * math.pi)
    kept = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    kept = kept.clamp(0.0, 1.0)
    return inv_freq * (kept + (1 - kept) / rope.factor)


def _yarn(inv_freq: Tensor, rope: RopeSpec, head_dim: int) -> Tensor:
    """NTK-by-parts (arXiv 2309.00071, section 3.2), its ramp over dimensions cut to integers."""

    def dimension(turns: float) -> float:
        waves = rope.original_max_positions / (turns * 2 * math.pi)
        return head_dim * math.log(waves) / (2 * math.log(rope.theta))

    low = max(math.floor(dimension(rope.beta_fast)), 0)
    high = min(math.ceil(dimension(rope.beta_slow)), head_dim - 1)
    ramp = (torch.arange(head_dim // 2) - low) / max(high - low, 0.001)
    kept = 1 - ramp.clamp(0.0, 1.0)
    return inv_freq * (kept + (1 - kept) / rope.factor)
