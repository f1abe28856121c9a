"""A worker's KV as bytes: some heads of a layer of some blocks, to be read or written.

Whoever exchanges KV arranges blocks alike: the kernels are part of what names them. Knows nothing
of leases, peers or requests.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shoal.core.split import Range
from shoal.kernels import KVCache, LayerKV
from shoal.wire.kv_messages import Part


class KVBytes:
    """
    Args:
        kv: the cache, of `layers` and KV heads `heads` of the model.
        heads_first: how the kernels arrange a block (`Worker.kv_heads_first`).
    """

    def __init__(self, kv: KVCache, layers: Range, heads: Range, *, heads_first: bool) -> None:
        self.layers = layers
        self.heads = heads
        self._kv = kv
        self._heads_first = heads_first

    @property
    def block_bytes(self) -> int:
        """Of one layer."""
        return max(1, sum(each[0].numel() for each in self._of_layer(self.layers.start)))

    def has(self, part: Part) -> bool:
        """Whether its layer and heads are kept here."""
        start, stop = self._heads_of(part)
        return part.layer in self.layers and 0 <= start < stop <= len(self.heads)

    def size(self, part: Part) -> int:
        start, stop = self._heads_of(part)
        block = sum(each[0, start:stop].numel() for each in self._of_layer(part.layer))
        return (part.stop - part.first) * block

    def read(self, part: Part, blocks: Sequence[int]) -> bytes:
        start, stop = self._heads_of(part)
        chosen = list(blocks)
        kept = [each[:, start:stop][chosen] for each in self._of_layer(part.layer)]
        return b"".join(each.cpu().numpy().tobytes() for each in kept)

    def write(self, part: Part, blocks: Sequence[int], payload: Tensor) -> None:
        """As `read` gave them: uint8 [size]."""
        start, stop = self._heads_of(part)
        chosen = list(blocks)
        offset = 0
        for kept in self._of_layer(part.layer):
            taken = kept[:, start:stop]
            size = taken[0].numel() * len(chosen)
            new = payload[offset : offset + size].view(len(chosen), *taken.shape[1:])
            taken[chosen] = new.to(taken.device)
            offset += size

    def _heads_of(self, part: Part) -> tuple[int, int]:
        return part.head_start - self.heads.start, part.head_stop - self.heads.start

    def _of_layer(self, layer: int) -> list[Tensor]:
        return bytes_of(self._kv.layers[layer - self.layers.start], self._heads_first)


def bytes_of(layer: LayerKV, heads_first: bool) -> list[Tensor]:
    """Keys, values and their scales, each [blocks, heads, ...] in bytes."""
    kept = [layer.keys_NBHD, layer.values_NBHD]
    scales = (layer.key_scales_NBH, layer.value_scales_NBH)
    kept += [each[..., None] for each in scales if each is not None]
    if heads_first:
        return [_heads_first(each).view(torch.uint8) for each in kept]
    return [each.view(torch.uint8).transpose(1, 2) for each in kept]


def _heads_first(tensor: Tensor) -> Tensor:
    """The same memory, as kernels see it that keep all 16 tokens of a head side by side."""
    num_blocks, num_slots, num_heads, size = tensor.shape
    return tensor.view(num_blocks, num_heads, num_slots * size)
