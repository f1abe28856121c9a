"""Physical KV: one allocation on the device, cut into layers and blocks.

Knows nothing of which block belongs to whom.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
import time
from dataclasses import dataclass

import torch

from shoal.core.errors import ConfigError, DeviceError
from shoal.core.model_spec import ModelSpec
from shoal.core.step import BLOCK_SIZE
from shoal.kernels import KVCache

_MADV_POPULATE_WRITE = 23  # Linux 5.14; not in Python's mmap module
_BITE_BYTES = 4 << 20
_SHARE_OF_TIME = 0.2


@dataclass(frozen=True, slots=True)
class KVPool:
    """The cache the decoder reads and writes, and its size; `memory` is its mapping on a CPU."""

    cache: KVCache
    num_blocks: int
    device: torch.device
    memory: mmap.mmap | None = None

    def populate(self) -> None:
        """Take a CPU's pages for good, so that memory in use does not grow as traffic comes.

        Contents stay as they are. In small bites, most of the time asleep: the first requests
        may be there already. Through ctypes, which lets go of the GIL; mmap's own does not.
        """
        if self.memory is None or sys.platform != "linux":
            return
        madvise = ctypes.CDLL(None).madvise
        madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        base, size = self.cache.keys[0].data_ptr(), len(self.memory)
        for start in range(0, size, _BITE_BYTES):
            began_s = time.perf_counter()
            if madvise(base + start, min(_BITE_BYTES, size - start), _MADV_POPULATE_WRITE) != 0:
                return  # an older kernel: pages come as they are touched
            time.sleep((time.perf_counter() - began_s) * (1 / _SHARE_OF_TIME - 1))


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
    size = math.prod(shape) * dtype.itemsize
    memory = None
    try:
        if device.type == "cpu":
            # Zeros that cost nothing until they are touched; huge pages make gathers faster.
            memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                memory.madvise(mmap.MADV_HUGEPAGE)
            pool = torch.frombuffer(memory, dtype=torch.uint8).view(dtype).view(shape)
        else:
            pool = torch.zeros(shape, dtype=dtype, device=device)
    except (OSError, MemoryError, torch.OutOfMemoryError) as error:
        raise DeviceError(
            f"a KV cache of {size / 2**30:.1f} GiB does not fit the free memory of {device}; "
            f"lower --kv-cache-memory-bytes"
        ) from error
    return KVPool(
        KVCache(keys=tuple(pool[:, 0]), values=tuple(pool[:, 1])), num_blocks, device, memory
    )
