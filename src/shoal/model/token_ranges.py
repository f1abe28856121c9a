"""Attention of ranks that split KV by token ranges: each has all KV heads of some blocks.

    q k v of own heads ──► of all heads, on every rank        zeros elsewhere, and a sum
    k v ──► the rank that has the token's block
    all heads over the blocks here ──► a part, and the sum of its scores' exponentials
    parts, weighted by those sums ──► attention, on every rank   again a sum

    T tokens   H query heads   K KV heads   D head size   R ranks

Merging is flash-decoding's (arXiv 2205.14135, §3.1; PyTorch blog 2023-10-13). Knows nothing of
weights, or of which blocks are where.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shoal.comm import Group
from shoal.core.errors import ConfigError
from shoal.core.model_spec import LayerSpec, ModelSpec
from shoal.core.split import Shard
from shoal.kernels import KernelSet, LayerKV, RaggedBatch


class TokenRanges:
    """One rank's side of it.

    Args:
        shard: its query heads are those that it makes, and wants the attention of.
        group: all ranks of the instance.

    Raises:
        ConfigError: kernels that cannot compute a part of attention.
    """

    def __init__(self, spec: ModelSpec, shard: Shard, group: Group, kernels: KernelSet) -> None:
        if kernels.partial_attention is None:
            raise ConfigError(
                f"KV is to be split by tokens, which the {kernels.name} kernels cannot; use "
                "--kernels reference, or split it by heads"
            )
        self._spec = spec
        self._shard = shard
        self._group = group
        self._kernels = kernels
        self._partial = kernels.partial_attention

    def attend(
        self,
        own: tuple[Tensor, Tensor, Tensor],
        layer: LayerSpec,
        batch: RaggedBatch,
        kv: LayerKV,
    ) -> Tensor:
        """What each of the shard's query heads gives, [T, h, D].

        Args:
            own: q, k and v of the shard's heads (it may have none); q and k are turned.
        """
        spec, heads = self._spec, self._shard.heads
        all_THD = self._gather(*own)
        num_rotated = spec.num_heads + spec.num_kv_heads
        keys_TKD, values_TKD = all_THD[:, spec.num_heads : num_rotated], all_THD[:, num_rotated:]
        self._kernels.store_kv(keys_TKD, values_TKD, kv, batch)
        part_THD, sums_TH = self._partial(
            all_THD[:, : spec.num_heads],
            kv,
            batch,
            scale=spec.attention_scale,
            window=layer.window,
            softcap=spec.attention_softcap,
        )
        merged_THD = self._merge(part_THD, sums_TH)
        return merged_THD[:, heads.start : heads.stop].to(all_THD.dtype)

    def _gather(self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
        """[T, H + 2K, D]; a KV head that ranks share comes from the one with its first queries."""
        spec, heads, kv_heads = self._spec, self._shard.heads, self._shard.kv_heads(self._spec)
        num_heads, num_kv_heads = spec.num_heads, spec.num_kv_heads
        all_THD = q_THD.new_zeros(len(q_THD), num_heads + 2 * num_kv_heads, spec.head_dim)
        all_THD[:, heads.start : heads.stop] = q_THD
        is_shared = int(self._shard.head_offset(spec) > 0 and len(heads) > 0)
        for part_TKD, first in ((k_TKD, num_heads), (v_TKD, num_heads + num_kv_heads)):
            own = slice(first + kv_heads.start + is_shared, first + kv_heads.stop)
            all_THD[:, own] = part_TKD[:, is_shared:]
        self._group.all_reduce(all_THD)
        return all_THD

    def _merge(self, part_THD: Tensor, sums_TH: Tensor) -> Tensor:
        """fp32; every token sees itself at least, so that one rank has a finite sum."""
        weights_RTH = torch.softmax(self._group.all_gather(sums_TH.contiguous()), 0)
        merged_THD = part_THD.float() * weights_RTH[self._group.rank].unsqueeze(-1)
        self._group.all_reduce(merged_THD)
        return merged_THD
