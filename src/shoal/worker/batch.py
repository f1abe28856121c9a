"""A Step's rows as the index tensors kernels want. Knows nothing of models or sampling."""

from __future__ import annotations

from array import array

import torch

from shoal.core.step import BLOCK_SIZE, Step
from shoal.kernels import RaggedBatch
from shoal.kernels.cpu.step import HostBatch


def to_device(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A host tensor on the device, without waiting for what the device has queued."""
    if device.type == "cuda":
        return host.pin_memory().to(device, non_blocking=True)
    return host


def make_batch(step: Step, device: torch.device, hop: int = 0) -> RaggedBatch:
    """Positions, KV slots and block tables of a Step at a hop (see `RaggedBatch`)."""
    lens = torch.tensor([row.num_tokens for row in step.rows])
    starts = torch.tensor([row.start for row in step.rows])
    tables = [row.block_ids[hop] for row in step.rows]
    longest = max(map(len, tables))
    tables_RB = torch.tensor(
        [table + (0,) * (longest - len(table)) for table in tables], dtype=torch.int64
    )
    row_T = torch.repeat_interleave(lens)
    first_T = (lens.cumsum(0) - lens)[row_T]
    positions_T = starts[row_T] + torch.arange(len(row_T)) - first_T
    slots_T = tables_RB[row_T, positions_T // BLOCK_SIZE] * BLOCK_SIZE + positions_T % BLOCK_SIZE
    return RaggedBatch(
        positions_T=to_device(positions_T, device),
        slots_T=to_device(slots_T, device),
        query_lens=lens.tolist(),
        context_lens=(starts + lens).tolist(),
        block_tables_RB=to_device(tables_RB, device),
    )


class HostBatches:
    """Makes a Step's rows for the compiled CPU path; keeps what does not change between Steps."""

    def __init__(self) -> None:
        self._tables: dict[int, tuple[tuple[int, ...], array[int]]] = {}

    def make(self, step: Step, hop: int = 0) -> HostBatch:
        return HostBatch(
            array("q", [row.num_tokens for row in step.rows]),
            array("q", [row.end for row in step.rows]),
            [self._table(row.sequence_id, row.block_ids[hop]) for row in step.rows],
        )

    def forget(self, sequence_id: int) -> None:
        self._tables.pop(sequence_id, None)

    def _table(self, sequence_id: int, block_ids: tuple[int, ...]) -> array[int]:
        known = self._tables.get(sequence_id)
        if known is None or known[0] != block_ids:
            known = self._tables[sequence_id] = block_ids, array("q", block_ids)
        return known[1]
