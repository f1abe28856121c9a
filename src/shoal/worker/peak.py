"""What the largest step takes of a GPU's memory beyond weights and KV: measured by running it.

Knows nothing of what the memory left is used for.
"""

from __future__ import annotations

import torch

from shoal.core.logits import sampling_bytes
from shoal.core.step import BLOCK_SIZE
from shoal.kernels import RaggedBatch
from shoal.model.decoder import Decoder
from shoal.worker.graphs import graph_sizes
from shoal.worker.kv_pool import allocate

# A recorded graph's own nodes and what the allocator rounds up.
_GRAPH_BYTES = 24 << 20


@torch.inference_mode()
def step_bytes(
    decoder: Decoder, kv_dtype: torch.dtype, *, num_tokens: int, max_num_seqs: int
) -> int:
    """Peak of a prompt chunk of `num_tokens` and of sampling `max_num_seqs` rows, with the
    graphs that `worker/graphs.py` will record. Also compiles what such a step needs.
    """
    device, spec = decoder.device, decoder.spec
    num_blocks = -(-num_tokens // BLOCK_SIZE)
    kv = allocate(spec, decoder.shard, num_blocks, kv_dtype, device)
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    positions_T = torch.arange(num_tokens, device=device)
    batch = RaggedBatch(
        positions_T=positions_T,
        slots_T=positions_T,
        query_lens=(num_tokens,),
        context_lens=(num_tokens,),
        block_tables_RB=torch.arange(num_blocks, device=device)[None],
    )
    hidden_TD = decoder.forward(torch.zeros_like(positions_T), batch, kv.cache)
    decoder.logits(hidden_TD[:max_num_seqs])
    torch.cuda.synchronize(device)
    activations = torch.cuda.max_memory_allocated(device) - before
    del hidden_TD, batch, positions_T, kv
    torch.cuda.empty_cache()
    sampling = sampling_bytes(spec, max_num_seqs)
    graphs = len(graph_sizes(max_num_seqs)) * _GRAPH_BYTES if decoder.fits_cuda_graphs else 0
    return activations + sampling + graphs
