"""What attention works on: the rows of one step, and the paged KV they read and write.

    R rows   T tokens of all rows, one after another   N KV blocks   B tokens in a block
    H KV heads   D head size

A token's KV lies in slot block * B + position % B. Where other ranks hold some of a row's blocks
(`HeldBlocks`), the keys that are here are numbered without gaps. Knows nothing of how attention is
computed; a kernel set keeps what it derives from a batch in `RaggedBatch.plans`, once for all
layers.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True, slots=True, eq=False)
class HeldBlocks:
    """Which blocks of each row are here, where KV is split over ranks by token ranges.

        blocks of a row     0  1  2  3        held: 1 and 3, in blocks 7 and 2 of this rank
        before              0  0  1  1  2     a block is here where the count goes up
        table, indices      7 2, 1 3

    Attributes:
        before: of each row, blocks here before each of its blocks, and before its end.
        indices_RB: int64, which of its row's blocks each block of the table is; padded, each row
            by at least one, with more than any row has.
        stored_S: int64, the batch's tokens whose KV is written here, one for each slot.
    """

    before: Sequence[Sequence[int]]
    indices_RB: torch.Tensor
    stored_S: torch.Tensor

    def num_keys(self, row: int, position: int, block_size: int) -> int:
        """Keys here of what is before a position of a row."""
        before = self.before[row]
        block, rest = divmod(position, block_size)
        is_here = rest and before[block + 1] > before[block]
        return before[block] * block_size + (rest if is_here else 0)


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
        held: None: all blocks are here. Otherwise `block_tables_RB` has those that are, and
            `slots_T` those of the tokens that are stored here.
        plans: what a kernel set derived from the above; empty at first.
    """

    positions_T: torch.Tensor
    slots_T: torch.Tensor
    query_lens: Sequence[int]
    context_lens: Sequence[int]
    block_tables_RB: torch.Tensor
    context_lens_R: torch.Tensor | None = None
    held: HeldBlocks | None = None
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
