"""A shard's parameters as the compiled path takes them: structs of packed weights, and shapes.

    L layers of the shard   X experts of a layer

Knows the spec and the shard; runs nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shoal.core.model_spec import ModelSpec
from shoal.core.split import WHOLE_SHARE, Shard
from shoal.kernels.cpu.arena import GROUP, PackedWeight
from shoal.kernels.cpu.experts import ExpertRules, PackedExperts
from shoal.kernels.cpu.layers import PackedLayer, PackedModel, TokenRanges
from shoal.model.parameters import DecoderParameters, ExpertParameters, LayerParameters, Weight
from shoal.model.rope import attention_factor, inverse_frequencies


def packed_model(
    spec: ModelSpec,
    shard: Shard,
    parameters: DecoderParameters,
    dtype: torch.dtype,
    reduce: tuple[int, int] | None,
    rank: int,
    counts_LX: Tensor | None,
) -> PackedModel:
    """A shard's layers and ends.

    Args:
        reduce: see `PackedModel`.
        rank: of the shard.
        counts_LX: see `packed_experts`, of each layer.
    """
    ropes = list(dict.fromkeys(layer.rope for layer in spec.layers))
    return PackedModel(
        hidden_size=spec.hidden_size,
        num_heads=len(shard.heads),
        num_kv_heads=len(shard.kv_heads(spec)),
        head_dim=spec.head_dim,
        group_size=spec.num_heads // spec.num_kv_heads,
        head_offset=shard.head_offset(spec),
        activation=spec.activation,
        norm_eps=spec.norm_eps,
        attention_scale=spec.attention_scale,
        attention_softcap=spec.attention_softcap,
        layers=[
            _layer(each, index, ropes.index(spec.layers[index].rope), spec, shard, counts_LX)
            for index, each in enumerate(parameters.layers, shard.layers.start)
        ],
        inv_freqs=torch.stack([inverse_frequencies(rope, spec.head_dim) for rope in ropes]),
        rope_factors=torch.tensor([attention_factor(rope) for rope in ropes]),
        final_norm=parameters.final_norm_E,
        embedding=packed(parameters.embedding_VE),
        # Gemma was trained with the scale rounded to the weights' precision.
        embedding_scale=torch.tensor(spec.embedding_scale, dtype=dtype).item(),
        head=packed(parameters.head_VE),
        first_id=shard.vocab.start,
        reduce=reduce,
        token_ranges=_token_ranges(spec, shard, rank),
        joint_norm_heads=(spec.num_heads, spec.num_kv_heads) if spec.qk_norm_joint else None,
        expert_rules=_rules(spec),
    )


def _token_ranges(spec: ModelSpec, shard: Shard, rank: int) -> TokenRanges | None:
    if not shard.has_token_ranges:
        return None
    return TokenRanges(
        num_ranks=shard.num_ranks,
        rank=rank,
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        first_head=shard.heads.start,
        first_kv_head=shard.kv_heads(spec).start,
    )


def _layer(
    layer: LayerParameters,
    index: int,
    rope: int,
    spec: ModelSpec,
    shard: Shard,
    counts_LX: Tensor | None,
) -> PackedLayer:
    o, experts = packed(layer.o_EC), None
    if layer.experts is not None:
        assert counts_LX is not None, "tokens of experts are counted"
        counts_X = counts_LX[index - shard.layers.start]
        experts = packed_experts(shard, index, layer.experts, counts_X)
    first_column = shard.heads.start * spec.head_dim
    return PackedLayer(
        qkv=packed(layer.qkv_CE),
        o=o,
        gate_up=packed(layer.gate_up_FE),
        down=packed(layer.down_EF),
        qkv_bias=layer.qkv_bias_C,
        o_bias=layer.o_bias_E,
        gate_up_bias=layer.gate_up_bias_F,
        down_bias=layer.down_bias_E,
        attention_norm=layer.attention_norm_E,
        qk_norm=layer.qk_norm_HD,
        post_attention_norm=layer.post_attention_norm_E,
        ffn_norm=layer.ffn_norm_E,
        post_ffn_norm=layer.post_ffn_norm_E,
        window=spec.layers[index].window,
        rope=rope,
        # Quantised columns come in whole groups; where they end with the heads, they begin so too.
        o_lead=first_column % GROUP if o and o.cols > len(shard.heads) * spec.head_dim else 0,
        experts=experts,
    )


def packed_experts(
    shard: Shard, layer: int, experts: ExpertParameters, counts_X: Tensor
) -> PackedExperts:
    """What a shard has of a layer of the model.

    Without hidden states it is sent just the tokens that are for it, and takes them all.

    Args:
        counts_X: int64, the tokens of each expert are added to it.
    """
    return PackedExperts(
        layer=layer,
        shares=[
            (each.expert, each.start, each.stop)
            if shard.has_stream
            else (each.expert, 0, WHOLE_SHARE)
            for each in experts.shares
        ],
        router_XE=experts.router_XE,
        shared_gate_E=experts.shared_gate_E,
        gate_up=[_weight(each) for each in experts.gate_up_FE],
        down=[_weight(each) for each in experts.down_EF],
        counts_X=counts_X,
    )


def _rules(spec: ModelSpec) -> ExpertRules | None:
    rules = spec.experts
    if rules is None:
        return None
    return ExpertRules(
        num_experts=rules.num_experts,
        num_active=rules.num_active,
        num_groups=rules.num_groups,
        num_active_groups=rules.num_active_groups,
        renormalises=rules.renormalises,
        scale=rules.scale,
        ffn_size=rules.ffn_size,
    )


def packed(weight: Weight | None) -> PackedWeight | None:
    """A weight that was allocated in an arena."""
    return None if weight is None else _weight(weight)


def _weight(weight: Weight) -> PackedWeight:
    assert isinstance(weight, PackedWeight)
    return weight
