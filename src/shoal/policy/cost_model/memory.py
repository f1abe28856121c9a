"""Bytes that a shard takes of its device: weights, KV, and what a Step needs beside them.

    KV of a token    2 x layers x KV heads x (head size x bytes + scale)     worker/kv_pool.py
    activations      tokens x widest row that lives at once, + logits        an upper bound

Weights and KV are exact (a test compares them with what is allocated). Activations are those of
plain torch: the residual, its norm, and the larger of attention's rows and the MLP's.
"""

from __future__ import annotations

from shoal.core.logits import sampling_bytes
from shoal.core.model_spec import ModelSpec
from shoal.core.split import Shard
from shoal.core.step import BLOCK_SIZE
from shoal.policy.cost_model.matrices import expert_matrices, layer_matrices, qkv_rows, table
from shoal.policy.cost_model.numbers import Numbers, whole_panels

_SCALE_BYTES = 4
_FP32_BYTES = 4


def weight_bytes(spec: ModelSpec, shard: Shard, numbers: Numbers) -> int:
    """Of all weights of a shard: matrices, tables, norms, biases, experts."""
    layers = range(shard.layers.start, shard.layers.stop)
    # Layers that are alike are worked out once: a plan is weighed thousands of times.
    kinds = {(spec.layers[n].has_experts, len(shard.experts_of(n))): n for n in layers}
    each = {kind: _layer_bytes(spec, shard, n, numbers) for kind, n in kinds.items()}
    total = sum(each[spec.layers[n].has_experts, len(shard.experts_of(n))] for n in layers)
    if shard.has_head:
        total += table(spec, shard, "head", numbers).size_bytes
        total += spec.hidden_size * _FP32_BYTES  # the last norm
    if shard.has_embedding and not (shard.has_head and spec.tied_embeddings):
        total += table(spec, shard, "embedding", numbers).size_bytes
    return total


def kv_token_bytes(spec: ModelSpec, shard: Shard, numbers: Numbers) -> int:
    """KV of one token; of a shard that splits KV by tokens, if it is the one that keeps it."""
    scale = _SCALE_BYTES if numbers.kv in ("int8", "fp8") else 0
    head_bytes = spec.head_dim * numbers.kv_bytes + scale
    return 2 * len(shard.layers) * len(shard.kept_kv_heads(spec)) * head_bytes


def kv_blocks(spec: ModelSpec, shard: Shard, numbers: Numbers, budget_bytes: int) -> int | None:
    """Blocks that fit a budget; None: the shard keeps no KV."""
    block_bytes = kv_token_bytes(spec, shard, numbers) * BLOCK_SIZE
    return budget_bytes // block_bytes if block_bytes else None


def activation_bytes(
    spec: ModelSpec, shard: Shard, numbers: Numbers, *, num_tokens: int, num_sampled: int
) -> int:
    """What the largest Step takes beside weights and KV.

    Args:
        num_tokens: of the Step.
        num_sampled: rows whose logits are made, and sampled from.
    """
    heads, kv_heads = len(shard.heads), len(shard.kv_heads(spec))
    attention = (2 * heads + 2 * kv_heads) * spec.head_dim + heads * spec.value_dim
    layers = range(shard.layers.start, shard.layers.stop)
    widest = max((len(shard.mlp_columns(spec, layer)) for layer in layers), default=0)
    if spec.experts is not None:
        widest = max(widest, spec.experts.num_active * spec.experts.ffn_size)
    row = 3 * spec.hidden_size + max(attention, 3 * widest)
    total = num_tokens * row * numbers.activation_bytes
    if shard.has_head:
        total += sampling_bytes(spec, num_sampled)
    return total


def _layer_bytes(spec: ModelSpec, shard: Shard, layer: int, numbers: Numbers) -> int:
    total = sum(each.size_bytes for each in layer_matrices(spec, shard, layer, numbers))
    total += _norm_bytes(spec, shard) + _bias_bytes(spec, shard, layer, numbers)
    if spec.experts is not None and spec.layers[layer].has_experts:
        total += spec.experts.num_experts * spec.hidden_size * _FP32_BYTES  # the router
        if spec.experts.shared_gate and len(shard.mlp_columns(spec, layer)):
            total += spec.hidden_size * _FP32_BYTES
        own = len(shard.experts_of(layer))
        total += own * sum(each.size_bytes for each in expert_matrices(spec, numbers))
    return total


def _norm_bytes(spec: ModelSpec, shard: Shard) -> int:
    total = spec.hidden_size * (4 if spec.post_norms else 2)
    if spec.qk_norm:
        total += (len(shard.heads) + len(shard.kv_heads(spec))) * spec.head_dim
    if spec.latent is not None and len(shard.heads):
        total += (spec.latent.query_rank or 0) + spec.latent.kv_rank
    return total * _FP32_BYTES


def _bias_bytes(spec: ModelSpec, shard: Shard, layer: int, numbers: Numbers) -> int:
    ffn, hidden = len(shard.mlp_columns(spec, layer)), spec.hidden_size
    gate_up = 2 * (whole_panels(ffn) if numbers.packed else ffn)
    rows = [
        qkv_rows(spec, shard) if spec.qkv_bias else 0,
        hidden if spec.output_bias and shard.is_first else 0,
        gate_up if spec.mlp_bias else 0,
        hidden if spec.mlp_bias and shard.is_first else 0,
    ]
    if numbers.packed:
        return sum(whole_panels(each) for each in rows) * _FP32_BYTES
    return sum(rows) * numbers.activation_bytes
