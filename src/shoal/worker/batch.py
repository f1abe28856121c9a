"""A Step's rows as the index tensors kernels want. Knows nothing of models or sampling."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from shoal.core.split import Range
from shoal.core.step import BLOCK_SIZE, Step
from shoal.kernels import HeldBlocks, RaggedBatch
from shoal.kernels.cpu.step import HostBatch

_NO_BLOCK = 1 << 40  # an index beyond any row's


def to_device(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A host tensor on the device, without waiting for what the device has queued."""
    if device.type == "cuda":
        return host.pin_memory().to(device, non_blocking=True)
    return host


def make_batch(
    step: Step, device: torch.device, hop: int = 0, held: Range | None = None
) -> RaggedBatch:
    """Positions, KV slots and block tables of a Step at a hop (see `RaggedBatch`).

    Args:
        held: the instance's blocks that are here; None: all.
    """
    lens = torch.tensor([row.num_tokens for row in step.rows])
    starts = torch.tensor([row.start for row in step.rows])
    tables_RB = _padded([row.block_ids[hop] for row in step.rows])
    row_T = torch.repeat_interleave(lens)
    first_T = (lens.cumsum(0) - lens)[row_T]
    positions_T = starts[row_T] + torch.arange(len(row_T)) - first_T
    slots_T = tables_RB[row_T, positions_T // BLOCK_SIZE] * BLOCK_SIZE + positions_T % BLOCK_SIZE
    blocks = None
    if held is not None:
        slots_T -= held.start * BLOCK_SIZE
        is_here_T = (slots_T >= 0) & (slots_T < len(held) * BLOCK_SIZE)
        rows = [held_blocks(row.block_ids[hop], held) for row in step.rows]
        tables_RB = _padded([(*here.blocks, 0) for here in rows])
        indices_RB = _padded([(*here.indices, _NO_BLOCK) for here in rows], _NO_BLOCK)
        blocks = HeldBlocks(
            before=[here.before for here in rows],
            indices_RB=to_device(indices_RB, device),
            stored_S=to_device(is_here_T.nonzero().flatten(), device),
        )
        slots_T = slots_T[is_here_T]
    return RaggedBatch(
        positions_T=to_device(positions_T, device),
        slots_T=to_device(slots_T, device),
        query_lens=lens.tolist(),
        context_lens=(starts + lens).tolist(),
        block_tables_RB=to_device(tables_RB, device),
        held=blocks,
    )


@dataclass(frozen=True, slots=True)
class HeldRow:
    """Blocks of a row that are here: their ids here, their indices in the row, and how many are
    before each block of the row and before its end."""

    blocks: tuple[int, ...]
    indices: tuple[int, ...]
    before: tuple[int, ...]


def held_blocks(block_ids: Sequence[int], held: Range) -> HeldRow:
    """Which blocks of a row (ids in its instance) are among those held."""
    indices = tuple(index for index, block in enumerate(block_ids) if block in held)
    return HeldRow(
        blocks=tuple(block_ids[index] - held.start for index in indices),
        indices=indices,
        before=tuple(itertools.accumulate((block in held for block in block_ids), initial=0)),
    )


class HostBatches:
    """Makes a Step's rows for the compiled CPU path; keeps what does not change between Steps.

    Args:
        held: as of `make_batch`.
    """

    def __init__(self, held: Range | None = None) -> None:
        self._held = held
        self._tables: dict[int, tuple[tuple[int, ...], array[int], array[int] | None]] = {}

    def make(self, step: Step, hop: int = 0) -> HostBatch:
        tables = [self._table(row.sequence_id, row.block_ids[hop]) for row in step.rows]
        return HostBatch(
            array("q", [row.num_tokens for row in step.rows]),
            array("q", [row.end for row in step.rows]),
            [table for table, _ in tables],
            [before for _, before in tables if before is not None],
        )

    def forget(self, sequence_id: int) -> None:
        self._tables.pop(sequence_id, None)

    def _table(
        self, sequence_id: int, block_ids: tuple[int, ...]
    ) -> tuple[array[int], array[int] | None]:
        known = self._tables.get(sequence_id)
        if known is None or known[0] != block_ids:
            known = self._tables[sequence_id] = block_ids, *self._arrays(block_ids)
        return known[1:]

    def _arrays(self, block_ids: tuple[int, ...]) -> tuple[array[int], array[int] | None]:
        if self._held is None:
            return array("q", block_ids), None
        here = held_blocks(block_ids, self._held)
        return array("q", here.blocks), array("q", here.before)


def _padded(tables: Sequence[tuple[int, ...]], padding: int = 0) -> torch.Tensor:
    longest = max(map(len, tables))
    return torch.tensor(
        [table + (padding,) * (longest - len(table)) for table in tables], dtype=torch.int64
    )
