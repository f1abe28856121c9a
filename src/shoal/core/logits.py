"""How many rows of logits are sampled from at once, and what that takes."""

from __future__ import annotations

from shoal.core.model_spec import ModelSpec

SAMPLED_AT_ONCE = 64
"""Rows; of a larger batch one part after the other."""

_WORKED_ON = 16
"""fp32 and int64 arrays of the logits' shape that sampling works on (noise, sorting)."""
_KEPT = 3
"""Of the other rows: the logits, and what their logprobs are told from."""
_FP32_BYTES = 4


def sampling_bytes(spec: ModelSpec, num_rows: int) -> int:
    """Of the rows of one Step, at most."""
    at_once = min(num_rows, SAMPLED_AT_ONCE)
    copies = _WORKED_ON * at_once + _KEPT * (num_rows - at_once)
    return copies * spec.vocab_size * _FP32_BYTES
