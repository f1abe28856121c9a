"""Physical KV: one allocation on the device, cut into layers and blocks.

Knows nothing of which block belongs to whom.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from shoal.core.errors import ConfigError, DeviceError
from shoal.core.model_spec import ModelSpec
from shoal.core.step import BLOCK_SIZE
from shoal.kernels import KVCache


@dataclass(frozen=True, slots=True)
class KVPool:
    """The cache the decoder reads and writes, and its size."""

    cache: KVCache
    num_blocks: int
    device: torch.device


def num_blocks_for(spec: ModelSpec, dtype: torch.dtype, budget_bytes: int) -> int:
    """Blocks that fit the budget.

    Raises:
        ConfigError: not even one does.
    """
    block_bytes = spec.kv_bytes_per_token(dtype.itemsize) * BLOCK_SIZE
    num_blocks = budget_bytes // block_bytes
    if num_blocks < 1:
        raise ConfigError(
            f"{budget_bytes} bytes are left for the KV cache; one block of {BLOCK_SIZE} tokens "
            f"takes {block_bytes}; raise --kv-cache-memory-bytes, or use a smaller model"
        )
    return num_blocks


def allocate(spec: ModelSpec, num_blocks: int, dtype: torch.dtype, device: torch.device) -> KVPool:
    """Zeroed KV of every layer: [layer, k or v, block, slot, KV head, head size]."""
    shape = (spec.num_layers, 2, num_blocks, BLOCK_SIZE, spec.num_kv_heads, spec.head_dim)
    pool = _zeros(shape, dtype, device)
    cache = KVCache(keys=tuple(pool[:, 0]), values=tuple(pool[:, 1]))
    return KVPool(cache, num_blocks, device)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    size = int(np.prod(shape)) * dtype.itemsize
    try:
        if device.type == "cpu":
            # Fresh pages are zero already: memory is taken only as blocks are written.
            return torch.from_numpy(np.zeros(size, dtype=np.uint8)).view(dtype).view(shape)
        return torch.zeros(shape, dtype=dtype, device=device)
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise DeviceError(
            f"a KV cache of {size / 2**30:.1f} GiB does not fit the free memory of {device}; "
            f"lower --kv-cache-memory-bytes"
        ) from error
