"""Queries, keys and values of a shard's heads, normed and turned, from the first product on.

    plain     q k v ── norm of each head, or of all together ── turn
    latent    q | latent ── norm ── product ── heads, of which the last numbers turn

    T tokens   H query heads   K KV heads   D head size   C columns of the first product
    R numbers of a latent

Knows nothing of the cache or of attention.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from shoal.comm import Group
from shoal.core.model_spec import LatentSpec, ModelSpec
from shoal.core.split import Shard
from shoal.kernels import KernelSet
from shoal.kernels.cpu.arena import PackedWeight
from shoal.model.parameters import LatentParameters, LayerParameters, Weight

_LATENT_EPS = 1e-6  # whatever rms_norm_eps says: DeepSeek-V2's own code


class Heads:
    """Makes heads of what the first product of attention gives.

    Args:
        group: the ranks that have the other heads; None: there are none.
    """

    def __init__(
        self, spec: ModelSpec, shard: Shard, kernels: KernelSet, group: Group | None
    ) -> None:
        self._spec, self._kernels = spec, kernels
        self._num_heads, self._num_kv_heads = len(shard.heads), len(shard.kv_heads(spec))
        self._group = group
        # A KV head that ranks share counts on the one that has its first query head.
        self._is_shared = int(shard.head_offset(spec) > 0 and self._num_heads > 0)

    @property
    def are_plain(self) -> bool:
        """Whether `KernelSet.rope_and_store` may do it."""
        return self._spec.latent is None and not self._spec.qk_norm_joint

    def turned(
        self, qkv_TC: Tensor, parameters: LayerParameters, angles: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q [T, H, D], k and v [T, K, D]; values of fewer numbers than D end in zeros."""
        if self._spec.latent is not None:
            return self._from_latents(qkv_TC, parameters.latent, self._spec.latent, angles)
        num_rotated = self._num_heads + self._num_kv_heads
        num_all = num_rotated + self._num_kv_heads
        qkv_THD = qkv_TC.view(len(qkv_TC), num_all, self._spec.head_dim)
        qk_THD, v_TKD = qkv_THD[:, :num_rotated], qkv_THD[:, num_rotated:]
        if self._spec.qk_norm_joint:
            qk_THD = self._normed_jointly(qk_THD, parameters.qk_norm_HD)
        elif parameters.qk_norm_HD is not None:
            qk_THD = self._kernels.rms_norm(qk_THD, parameters.qk_norm_HD, self._spec.norm_eps)
        qk_THD = self._kernels.rope(qk_THD, *angles)
        return qk_THD[:, : self._num_heads], qk_THD[:, self._num_heads :], v_TKD

    def sit_out(self, like_TE: Tensor) -> None:
        """A rank without heads: its part of what the others add up."""
        if self._spec.qk_norm_joint and self._group is not None:
            self._group.all_reduce(like_TE.new_zeros(len(like_TE), 2, dtype=torch.float32))

    def _normed_jointly(self, qk_THD: Tensor, weight_HD: Tensor | None) -> Tensor:
        """As `KernelSet.rms_norm`, over the numbers of all heads of q, and of all of k."""
        spec, wide = self._spec, qk_THD.float()
        squares_TH = wide.square().sum(-1)
        q_T = squares_TH[:, : self._num_heads].sum(-1)
        k_T = squares_TH[:, self._num_heads + self._is_shared :].sum(-1)
        squares_T2 = torch.stack((q_T, k_T), -1)
        if self._group is not None:
            self._group.all_reduce(squares_T2)
        if weight_HD is None:
            return qk_THD
        counts = squares_T2.new_tensor([spec.num_heads, spec.num_kv_heads]) * spec.head_dim
        scales_T2 = torch.rsqrt(squares_T2 / counts + spec.norm_eps)
        scales_TH = scales_T2.repeat_interleave(
            torch.tensor([self._num_heads, self._num_kv_heads], device=qk_THD.device),
            -1,
            output_size=qk_THD.shape[1],
        )
        return (wide * scales_TH.unsqueeze(-1) * weight_HD).to(qk_THD.dtype)

    def _from_latents(
        self,
        qkv_TC: Tensor,
        parameters: LatentParameters | None,
        latent: LatentSpec,
        angles: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:
        T, H, D = len(qkv_TC), self._num_heads, self._spec.head_dim
        if parameters is None:
            nothing = qkv_TC.new_zeros(T, 0, D)
            return nothing, nothing, nothing
        num_q = latent.query_rank or H * D
        ends = [num_q, num_q + latent.kv_rank]
        q_TC, kv_TR, turning_TD = qkv_TC.tensor_split(ends, -1)
        if parameters.q_CR is not None and parameters.q_norm_R is not None:
            q_TC = self._product(q_TC, parameters.q_norm_R, parameters.q_CR)
        plain_THD, turning_THD = q_TC.reshape(T, H, D).tensor_split([latent.plain_dim], -1)
        q_THD = torch.cat((plain_THD, self._kernels.rope(turning_THD, *angles)), -1)
        kv_THD = self._product(kv_TR, parameters.kv_norm_R, parameters.kv_CR).view(T, H, -1)
        k_THD, v_THD = kv_THD.tensor_split([latent.plain_dim], -1)
        turned_T1D = self._kernels.rope(turning_TD.unsqueeze(1), *angles)
        k_THD = torch.cat((k_THD, turned_T1D.expand(-1, H, -1)), -1)
        return q_THD, k_THD, pad(v_THD, (0, D - latent.value_dim))

    def _product(self, x_TR: Tensor, norm_R: Tensor, weight: Weight) -> Tensor:
        assert not isinstance(weight, PackedWeight), "latents run in plain torch"
        normed_TR = self._kernels.rms_norm(x_TR.contiguous(), norm_R, _LATENT_EPS)
        return self._kernels.linear(normed_TR, weight, None)
