"""Bytes of the cost model against what `model/` and `worker/` allocate: equal, on random shards."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.core.model_spec import ExpertsSpec, LatentSpec, LayerSpec, ModelSpec, RopeSpec
from shoal.core.split import Range, Shard, shards, split_by_weights
from shoal.kernels.cpu.arena import ArenaSize
from shoal.kernels.cpu.library import load_library
from shoal.model.allocation import Allocator, allocate
from shoal.model.precision import Format, LayerFormats, WeightFormats
from shoal.policy.cost_model import Numbers, kv_token_bytes, weight_bytes
from shoal.policy.cost_model.numbers import Kept
from shoal.worker.kv_pool import kv_dtype, token_bytes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@st.composite
def specs(draw: st.DrawFn) -> ModelSpec:
    kv_heads = draw(st.integers(1, 3))
    heads = kv_heads * draw(st.integers(1, 3))
    has_experts = draw(st.booleans())
    head_dim = draw(st.sampled_from([32, 48]))
    experts = latent = None
    if has_experts:
        experts = ExpertsSpec(
            num_experts=draw(st.integers(2, 6)),
            num_active=2,
            ffn_size=draw(st.sampled_from([32, 80])),
            shared_ffn_size=draw(st.sampled_from([0, 96])),
            shared_gate=draw(st.booleans()),
        )
    if draw(st.booleans()):
        kv_heads = heads
        latent = LatentSpec(
            kv_rank=64,
            query_rank=draw(st.sampled_from([None, 96])),
            plain_dim=head_dim - 16,
            rope_dim=16,
            value_dim=draw(st.sampled_from([32, 64])),
        )
    layer = LayerSpec(rope=RopeSpec())
    return ModelSpec(
        architecture="test",
        num_layers=3,
        hidden_size=draw(st.sampled_from([64, 96, 100, 256])),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        ffn_size=draw(st.sampled_from([128, 160, 384])),
        vocab_size=draw(st.sampled_from([100, 160])),
        norm_eps=1e-5,
        layers=(layer, replace(layer, has_experts=has_experts), layer),
        max_positions=64,
        attention_scale=1.0,
        tied_embeddings=draw(st.booleans()),
        qkv_bias=latent is None and draw(st.booleans()),
        output_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
        qk_norm=latent is None and draw(st.booleans()),
        post_norms=draw(st.booleans()),
        experts=experts,
        latent=latent,
    )


@st.composite
def shards_of(draw: st.DrawFn, spec: ModelSpec) -> Shard:
    weights = draw(st.lists(st.sampled_from([0.0, 1.0, 2.5]), min_size=1, max_size=3))
    split = split_by_weights(spec, weights if sum(weights) else [1.0], granule=32)
    if draw(st.booleans()):
        split = replace(split, kv="tokens")
    ends = sorted(draw(st.lists(st.integers(0, 3), min_size=2, max_size=2)))
    held = shards(
        split,
        Range(*ends),
        has_embedding=draw(st.booleans()),
        has_head=draw(st.booleans()),
    )
    return draw(st.sampled_from(held))


@st.composite
def numbers(draw: st.DrawFn) -> Numbers:
    packed = draw(st.booleans())
    floats = draw(st.sampled_from(["float32", "bfloat16"] + ([] if packed else ["float16"])))
    few = draw(st.sampled_from([floats, "int8", "int4", "int4_min", "fp8"]))
    return Numbers(
        weights=few,
        activations=floats,
        kv=draw(st.sampled_from(["float32", "bfloat16", "int8", "fp8"])),
        packed=packed,
    )


@settings(max_examples=250, deadline=None)
@given(st.data())
def test_weights_are_counted_to_the_byte(data: st.DataObject) -> None:
    spec, kept = data.draw(specs()), data.draw(numbers())
    shard = data.draw(shards_of(spec))
    assert weight_bytes(spec, shard, kept) == _allocated(spec, shard, kept)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_kv_is_counted_to_the_byte(data: st.DataObject) -> None:
    spec, kept = data.draw(specs()), data.draw(numbers())
    shard = data.draw(shards_of(spec))
    dtype = kv_dtype(kept.kv, DTYPES[kept.activations])  # type: ignore[arg-type]
    assert kv_token_bytes(spec, shard, kept) == token_bytes(spec, shard, dtype)


def _allocated(spec: ModelSpec, shard: Shard, kept: Numbers) -> int:
    size = ArenaSize(load_library()) if kept.packed else None
    allocator = Allocator(torch.device("cpu"), DTYPES[kept.activations], size)
    parameters = allocate(spec, shard, _formats(spec, kept), allocator)
    return parameters.size_bytes + (size.bytes if size else 0)


def _formats(spec: ModelSpec, kept: Numbers) -> WeightFormats:
    """What `model/precision.py` settles for a checkpoint whose every weight is asked for so."""

    def of(columns: int) -> Format:
        return _format(kept.weights, kept, columns)

    hidden, latent, experts = spec.hidden_size, spec.latent, spec.experts
    layers = tuple(
        LayerFormats(
            qkv=of(hidden),
            latent_q=of(latent.query_rank or 0) if latent else None,
            latent_kv=of(latent.kv_rank) if latent else None,
            o=of(spec.num_heads * spec.value_dim),
            gate_up=of(hidden),
            down=of(spec.mlp_size(layer)),
            expert_gate_up=of(hidden) if experts else None,
            expert_down=of(experts.ffn_size) if experts else None,
        )
        for layer in range(spec.num_layers)
    )
    table: Kept = "int8" if kept.weights in ("int4", "int4_min") else kept.weights
    return WeightFormats(layers, _format(table, kept, hidden), _format(table, kept, hidden))


def _format(asked: Kept, kept: Numbers, columns: int) -> Format:
    match asked:
        case "int8" | "int4" | "int4_min" | "fp8" if columns % 32 == 0:
            return asked
    return None
