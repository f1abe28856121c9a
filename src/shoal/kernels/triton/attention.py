"""Attention over the paged cache for any mix of rows: who decodes, who prefills, in what tiles.

Rows with one new token go to `attention_decode.py` (keys split over the GPU), all others to
`attention_prefill.py` (queries in tiles). What that needs of the batch is uploaded once for all
layers, without waiting for the device; a batch that brings its lengths on the device (a CUDA
graph's) is taken to be all decode, and nothing of the host's lists is read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.kernels.batch import LayerKV, RaggedBatch
from shoal.kernels.triton.attention_decode import decode_attention
from shoal.kernels.triton.attention_prefill import prefill_attention, queries_per_tile


@dataclass(frozen=True, slots=True, eq=False)
class AttentionRows:
    """A batch as the kernels read it, int32, on the device.

    Attributes:
        starts: [R+1], first token of each row.
        contexts: [R], tokens of each row's sequence.
        decode: rows with one new token.
        tiles: [tiles, 2], row and first query of each tile of the other rows.
    """

    starts: Tensor
    contexts: Tensor
    decode: Tensor
    tiles: Tensor


def attention(
    q_THD: Tensor,
    kv: LayerKV,
    batch: RaggedBatch,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """As the reference."""
    group = q_THD.shape[1] // kv.keys_NBHD.shape[2]
    rows = _rows(batch, queries_per_tile(group, q_THD.dtype))
    out_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
    tables_RB = batch.block_tables_RB
    if len(rows.decode):
        decode_attention(
            q_THD,
            kv,
            out_THD,
            tables_RB,
            rows.decode,
            rows.starts,
            rows.contexts,
            scale=scale,
            window=window,
            softcap=softcap,
        )
    if len(rows.tiles):
        prefill_attention(
            q_THD,
            kv,
            out_THD,
            tables_RB,
            rows.tiles,
            rows.starts,
            rows.contexts,
            scale=scale,
            window=window,
            softcap=softcap,
        )
    return out_THD


def _rows(batch: RaggedBatch, tile: int) -> AttentionRows:
    key = ("triton", tile)
    if key not in batch.plans:
        batch.plans[key] = _on_device(batch) or _from_lists(batch, tile)
    rows: AttentionRows = batch.plans[key]
    return rows


def _on_device(batch: RaggedBatch) -> AttentionRows | None:
    if batch.context_lens_R is None:
        return None
    contexts = batch.context_lens_R
    starts = torch.arange(len(contexts) + 1, dtype=torch.int32, device=contexts.device)
    return AttentionRows(starts, contexts, starts[:-1], starts.new_empty((0, 2)))


def _from_lists(batch: RaggedBatch, tile: int) -> AttentionRows:
    starts, decode, tiles = [0], [], []
    for row, num_queries in enumerate(batch.query_lens):
        starts.append(starts[-1] + num_queries)
        if num_queries == 1:
            decode.append(row)
        else:
            # The last queries see most keys: they go first.
            tiles += [(row, first) for first in reversed(range(0, num_queries, tile))]
    columns = [*starts, *batch.context_lens, *decode, *(n for pair in tiles for n in pair)]
    sizes = [len(starts), len(batch.context_lens), len(decode), 2 * len(tiles)]
    on_device = _upload(columns, batch.positions_T.device)
    starts_R1, contexts_R, decode_rows, tile_pairs = torch.split(on_device, sizes)
    return AttentionRows(starts_R1, contexts_R, decode_rows, tile_pairs.view(-1, 2))


def _upload(values: list[int], device: torch.device) -> Tensor:
    is_cuda = device.type == "cuda"
    host = torch.tensor(values, dtype=torch.int32, pin_memory=is_cuda)
    return host.to(device, non_blocking=is_cuda)
