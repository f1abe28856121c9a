"""Sums in rank order, wide enough: the same bits on every rank.

Knows nothing of where the parts come from.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def sum_in_rank_order(parts: Sequence[Tensor], out: Tensor) -> None:
    """((part 0 + part 1) + part 2) + ... into `out`; bf16 and fp16 are summed as fp32."""
    narrow = out.dtype in (torch.bfloat16, torch.float16)
    total = parts[0].to(torch.float32 if narrow else out.dtype, copy=True)
    for part in parts[1:]:
        total += part
    out.copy_(total)
