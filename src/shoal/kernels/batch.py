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
        context_lens_R: `context_lens` in int32 on the device, where a CUDA graph runs the batch:
            then every row has one token, the lists above mean nothing, and rows of padding have
            length 0 and slot -1.
        plans: what a kernel set derived from the above; empty at first.
    """

    positions_T: torch.Tensor
    slots_T: torch.Tensor
    query_lens: Sequence[int]
    context_lens: Sequence[int]
    block_tables_RB: torch.Tensor
    context_lens_R: torch.Tensor | None = None
    plans: dict[Hashable, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True, eq=False)
class LayerKV:
    """Keys and values of one layer, as numbers or as codes: value = code * scale.

    Attributes:
        keys_NBHD, values_NBHD: floating point, or codes in int8 or float8_e4m3fn.
        key_scales_NBH, value_scales_NBH: fp32, one for each token and KV head; None: no codes.
    """

    keys_NBHD: torch.Tensor
    values_NBHD: torch.Tensor
    key_scales_NBH: torch.Tensor | None = None
    value_scales_NBH: torch.Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class KVCache:
    """The KV of every layer held here."""

    layers: tuple[LayerKV, ...]
