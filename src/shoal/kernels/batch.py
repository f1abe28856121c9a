"""What attention works on: the rows of one step, and the paged KV they read and write.

    R rows   T tokens of all rows, one after another   N KV blocks   B tokens in a block
    H KV heads   D head size

A token's KV lies in slot block * B + position % B. Knows nothing of how attention is computed;
a kernel set keeps what it derives from a batch in `RaggedBatch.plans`, once for all layers.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(slots=True, eq=False)
class RaggedBatch:
    """Rows of different lengths, each the newest tokens of one sequence.

    Attributes:
        positions_T: int64, absolute position of each token; consecutive within a row.
        slots_T: int64, where each token's KV is written.
        query_lens: tokens of each row; at least 1.
        context_lens: tokens of each row's sequence once this step has run, the row's included.
        block_tables_RB: int64, blocks of positions 0, 1, ... of each row; padded with any
            valid block.
        plans: what a kernel set derived from the above; empty at first.
    """

    positions_T: torch.Tensor
    slots_T: torch.Tensor
    query_lens: Sequence[int]
    context_lens: Sequence[int]
    block_tables_RB: torch.Tensor
    plans: dict[Hashable, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True, eq=False)
class KVCache:
    """Keys and values of every layer held here: one k_NBHD and one v_NBHD per layer."""

    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]
