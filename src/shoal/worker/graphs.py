"""CUDA graphs for decode: one launch for a step in which every row has one new token.

A graph replays kernels on fixed memory, so a step's inputs are copied into buffers and its rows
padded to the next size for which there is a graph; padding rows have no keys and store nothing:

    rows 5    →  size 8  [ 5 rows | 3 of padding: length 0, slot -1 ]  →  logits of the 5

All graphs share one memory pool and one buffer of logits: they run one after the other on the
worker's stream, and what follows them there (sampling) is done before the next one writes.
Knows nothing of sequences or sampling.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from shoal.core.step import BLOCK_SIZE, Step
from shoal.kernels import RaggedBatch
from shoal.model.decoder import Decoder
from shoal.worker.batch import to_device
from shoal.worker.kv_pool import KVPool

_SMALL_SIZES = (1, 2, 4, 8)
_SIZE_STEP = 8
_WARM_UPS = 2


class DecodeGraphs:
    """Graphs of a decoder's decode steps, recorded by `record_all`.

    Args:
        max_num_seqs: rows of the largest step.
        max_model_len: tokens of the longest sequence.
    """

    def __init__(
        self, decoder: Decoder, kv: KVPool, *, max_num_seqs: int, max_model_len: int
    ) -> None:
        device = decoder.device
        max_blocks = -(-max_model_len // BLOCK_SIZE)
        self.sizes = graph_sizes(max_num_seqs)
        self._decoder = decoder
        self._kv = kv
        self._replays: dict[int, Callable[[], None]] = {}
        self._token_ids_M = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        self._positions_M = torch.zeros_like(self._token_ids_M)
        self._slots_M = torch.full_like(self._token_ids_M, -1)
        self._contexts_M = torch.zeros_like(self._token_ids_M, dtype=torch.int32)
        self._tables_MB = torch.zeros((max_num_seqs, max_blocks), dtype=torch.int64, device=device)
        self._logits_MV = torch.zeros((max_num_seqs, decoder.spec.vocab_size), device=device)
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def record_all(self) -> None:
        """Record every size; the largest first, so that the others fit into its memory."""
        for size in reversed(self.sizes):
            self._replays[size] = self._record(size)

    def take(self, step: Step) -> bool:
        """Whether there is a graph for this step: each row gets one token and samples one."""
        rows, most = len(step.rows), self._tables_MB.shape[1]
        return rows <= self.sizes[-1] and all(
            row.num_tokens == 1 and row.samples and len(row.block_ids[0]) <= most
            for row in step.rows
        )

    def logits(self, token_ids_R: Tensor, batch: RaggedBatch) -> Tensor:
        """fp32 logits [R, V] of a step that `take` accepts; valid until the next replay."""
        rows = len(token_ids_R)
        size = next(size for size in self.sizes if size >= rows)
        contexts = torch.tensor(list(batch.context_lens), dtype=torch.int32)
        width = batch.block_tables_RB.shape[1]
        self._token_ids_M[:rows].copy_(token_ids_R)
        self._positions_M[:rows].copy_(batch.positions_T)
        self._slots_M[:rows].copy_(batch.slots_T)
        self._contexts_M[:rows].copy_(to_device(contexts, self._decoder.device))
        self._tables_MB[:rows, :width].copy_(batch.block_tables_RB)
        if rows < size:
            self._slots_M[rows:size].fill_(-1)
            self._contexts_M[rows:size].zero_()
        self._replays[size]()
        return self._logits_MV[:rows]

    def _record(self, size: int) -> Callable[[], None]:
        """A function that runs the decoder on the first `size` rows of the buffers."""
        self._slots_M.fill_(-1)
        self._contexts_M.zero_()
        compute = partial(self._compute, size)
        stream = torch.cuda.Stream(self._decoder.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what is compiled or chosen at first use, is so now
            for _ in range(_WARM_UPS):
                compute()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            compute()
        return graph.replay

    def _compute(self, size: int) -> None:
        batch = RaggedBatch(
            positions_T=self._positions_M[:size],
            slots_T=self._slots_M[:size],
            query_lens=(),
            context_lens=(),
            block_tables_RB=self._tables_MB[:size],
            context_lens_R=self._contexts_M[:size],
        )
        hidden_TD = self._decoder.forward(self._token_ids_M[:size], batch, self._kv.cache)
        self._logits_MV[:size].copy_(self._decoder.logits(hidden_TD))


def graph_sizes(max_num_seqs: int) -> tuple[int, ...]:
    """1, 2, 4, 8, then every eighth, and the largest."""
    sizes = {*_SMALL_SIZES, *range(_SIZE_STEP, max_num_seqs, _SIZE_STEP), max_num_seqs}
    return tuple(sorted(size for size in sizes if size <= max_num_seqs))
