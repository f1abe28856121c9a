"""Physical KV: one allocation on the device, cut into layers and blocks.

    [layer, k or v, block, slot, KV head, head size]   then, for codes, [the same but head size]

Layers and KV heads are those that the worker's shard keeps; it may be none. Knows nothing of which
block belongs to whom.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from dataclasses import dataclass

import torch

from shoal.core.errors import ConfigError, DeviceError
from shoal.core.model_spec import ModelSpec
from shoal.core.options import KVCacheDType
from shoal.core.split import Shard
from shoal.core.step import BLOCK_SIZE
from shoal.kernels import KVCache, LayerKV

_DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
}
_SCALED = (torch.int8, torch.float8_e4m3fn)
_SCALE_BYTES = 4


@dataclass(frozen=True, slots=True)
class KVPool:
    """The cache the decoder reads and writes, and its size."""

    cache: KVCache
    num_blocks: int
    size_bytes: int
    device: torch.device


def kv_dtype(name: KVCacheDType, model_dtype: torch.dtype) -> torch.dtype:
    """What --kv-cache-dtype means."""
    return model_dtype if name == "auto" else _DTYPES[name]


def token_bytes(spec: ModelSpec, shard: Shard, dtype: torch.dtype) -> int:
    """KV of one token on this shard: keys and values of its heads in its layers, with scales."""
    head_bytes = spec.head_dim * dtype.itemsize + (_SCALE_BYTES if dtype in _SCALED else 0)
    return 2 * len(shard.layers) * len(shard.kept_kv_heads(spec)) * head_bytes


def num_blocks_for(
    spec: ModelSpec, shard: Shard, dtype: torch.dtype, budget_bytes: int
) -> int | None:
    """Blocks that fit the budget; None: this shard keeps no KV.

    Raises:
        ConfigError: not even one does.
    """
    block_bytes = token_bytes(spec, shard, dtype) * BLOCK_SIZE
    if block_bytes == 0:
        return None
    num_blocks = budget_bytes // block_bytes
    if num_blocks < 1:
        raise ConfigError(
            f"{budget_bytes} bytes are left for the KV cache; one block of {BLOCK_SIZE} tokens "
            f"takes {block_bytes}; raise --kv-cache-memory-bytes, or use a smaller model"
        )
    return num_blocks


def allocate(
    spec: ModelSpec, shard: Shard, num_blocks: int, dtype: torch.dtype, device: torch.device
) -> KVPool:
    """Zeroed KV of every layer of a shard, with scales where the dtype holds codes.

    Raises:
        DeviceError: the device lacks the memory.
    """
    size = token_bytes(spec, shard, dtype) * BLOCK_SIZE * num_blocks
    try:
        pool = _zeros(size, device)
    except (OSError, MemoryError, OverflowError, torch.OutOfMemoryError) as error:
        raise DeviceError(
            f"a KV cache of {size / 2**30:.1f} GiB does not fit the free memory of {device}; "
            f"lower --kv-cache-memory-bytes"
        ) from error
    heads = (len(shard.layers), 2, num_blocks, BLOCK_SIZE, len(shard.kept_kv_heads(spec)))
    codes_bytes = math.prod(heads) * spec.head_dim * dtype.itemsize
    numbers = pool[:codes_bytes].view(dtype).view(*heads, spec.head_dim)
    if dtype not in _SCALED:
        layers = [LayerKV(k, v) for k, v in numbers]
    else:
        # Whole blocks of 16 tokens keep this offset a multiple of 4.
        scales = pool[codes_bytes:].view(torch.float32).view(heads)
        layers = [LayerKV(k, v, ks, vs) for (k, v), (ks, vs) in zip(numbers, scales, strict=True)]
    return KVPool(KVCache(tuple(layers)), num_blocks, size, device)


def _zeros(size: int, device: torch.device) -> torch.Tensor:
    if device.type != "cpu" or size == 0:
        return torch.zeros(size, dtype=torch.uint8, device=device)
    # Zeros that cost nothing until they are touched; huge pages make gathers faster.
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError, AttributeError):  # kernels without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
