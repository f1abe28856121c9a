"""Reads a ModelSpec from a GGUF file's header.

The keys are those of the GGUF specification and llama.cpp (`gguf-py/gguf/constants.py`); where
a file is silent, llama.cpp's own default for the architecture counts. Reads no weights but
`rope_freqs.weight`, which is a setting in a tensor's clothes.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from shoal.core.errors import ModelError, UnsupportedModelError
from shoal.core.gguf_header import GGUFTensorInfo, read_gguf_header
from shoal.core.gguf_tokens import gguf_eos_token_ids
from shoal.core.model_spec import (
    MAX_EXPERTS,
    MAX_LAYERS,
    ExpertsSpec,
    LayerSpec,
    ModelSpec,
    RopeSpec,
)
from shoal.model.fields import Fields
from shoal.model.hf_rope import yarn_scale


def read_gguf_spec(path: Path) -> ModelSpec:
    """The spec of the model in the file; see `shoal.model.spec.read_spec` for errors."""
    header = read_gguf_header(path)
    metadata = Fields(str(path), header.metadata)
    if metadata.integer("split.count", 1) > 1:
        raise UnsupportedModelError(
            f"{path} is one part of a split GGUF; shoal reads whole files: join the parts with "
            "llama-gguf-split --merge"
        )
    architecture = metadata.text("general.architecture")
    if architecture not in _ARCHITECTURES:
        raise UnsupportedModelError(
            f"GGUF architecture {architecture!r} ({path}) is not supported; shoal runs "
            f"{', '.join(_ARCHITECTURES)}"
        )
    rules = _ARCHITECTURES[architecture]
    fields = Fields(str(path), header.metadata, prefix=architecture + ".")
    tensors = {tensor.name: tensor for tensor in header.tensors}

    hidden_size = fields.positive("embedding_length")
    num_heads = fields.positive("attention.head_count")
    head_dim = fields.positive("attention.key_length", hidden_size // num_heads)
    _refuse_what_is_not_run(fields, head_dim)
    layers = tuple(
        replace(layer, has_experts=f"blk.{index}.ffn_gate_inp.weight" in tensors)
        for index, layer in enumerate(_layers(fields, rules, _divisors(path, tensors)))
    )
    return ModelSpec(
        architecture=architecture,
        num_layers=len(layers),
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=fields.positive("attention.head_count_kv", num_heads),
        head_dim=head_dim,
        ffn_size=fields.positive("feed_forward_length"),
        vocab_size=_vocab_size(path, tensors),
        norm_eps=fields.above(0, "attention.layer_norm_rms_epsilon"),
        layers=layers,
        max_positions=fields.positive("context_length"),
        attention_scale=_attention_scale(fields, rules, head_dim, hidden_size // num_heads),
        tied_embeddings="output.weight" not in tensors,
        qkv_bias="blk.0.attn_q.bias" in tensors,
        output_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_down.bias" in tensors,
        qk_norm=rules.qk_norm,
        qk_norm_joint=rules.qk_norm_joint,
        post_norms=rules.gemma,
        activation="gelu_tanh" if rules.gemma else "silu",
        embedding_scale=hidden_size**0.5 if rules.gemma else 1.0,
        experts=_experts(fields, rules, tensors),
        final_softcap=fields.optional_number("final_logit_softcapping"),
        bos_token_id=metadata.integer("tokenizer.ggml.bos_token_id")
        if "tokenizer.ggml.bos_token_id" in metadata
        else None,
        eos_token_ids=gguf_eos_token_ids(header.metadata),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rules:
    """What an architecture's name says beyond its metadata.

    `renormalises`: the weights of the experts that are chosen.
    """

    qk_norm: bool = False
    qk_norm_joint: bool = False
    renormalises: bool = True
    gemma: bool = False


_ARCHITECTURES: Mapping[str, _Rules] = {
    "llama": _Rules(),
    "qwen2": _Rules(),
    "qwen3": _Rules(qk_norm=True),
    "gemma3": _Rules(qk_norm=True, gemma=True),
    "qwen2moe": _Rules(renormalises=False),
    "qwen3moe": _Rules(qk_norm=True),
    "olmoe": _Rules(qk_norm=True, qk_norm_joint=True, renormalises=False),
}
_GEMMA_LOCAL_THETA = 10_000.0
_GEMMA_PATTERN = 6
_GEMMA_27B_LAYERS = 62
_F32 = 0
_SOFTMAX = 1


def _refuse_what_is_not_run(fields: Fields, head_dim: int) -> None:
    if fields.integer("expert_gating_func", _SOFTMAX) != _SOFTMAX:
        raise UnsupportedModelError(
            f"{fields.source}: {fields.prefix}expert_gating_func is "
            f"{fields.integer('expert_gating_func')}; shoal chooses experts by a softmax "
            f"({_SOFTMAX})"
        )
    if fields.optional_number("attn_logit_softcapping"):
        raise UnsupportedModelError(
            f"{fields.source}: {fields.prefix}attn_logit_softcapping is "
            f"{fields.number('attn_logit_softcapping')}; shoal runs models without it"
        )
    for key in ("attention.value_length", "rope.dimension_count"):
        if fields.integer(key, head_dim) != head_dim:
            raise UnsupportedModelError(
                f"{fields.source}: {fields.prefix}{key} is {fields.integer(key)} and heads have "
                f"{head_dim} dimensions; shoal runs models where both are equal"
            )


def _experts(
    fields: Fields, rules: _Rules, tensors: Mapping[str, GGUFTensorInfo]
) -> ExpertsSpec | None:
    """Sizes are the tensors' own: metadata names them differently, or not at all."""
    if not fields.integer("expert_count", 0):
        return None
    gates = [each for name, each in tensors.items() if name.endswith(".ffn_gate_exps.weight")]
    if not gates or len(gates[0].dims) != 3:
        raise UnsupportedModelError(
            f"{fields.source} has {fields.integer('expert_count')} experts a layer, and no tensors "
            "ffn_gate_exps that hold those of a layer; convert the model with a newer llama.cpp"
        )
    shared = [each for name, each in tensors.items() if name.endswith(".ffn_gate_shexp.weight")]
    return ExpertsSpec(
        num_experts=fields.count("expert_count", MAX_EXPERTS),
        num_active=fields.positive("expert_used_count"),
        ffn_size=gates[0].dims[1],
        renormalises=rules.renormalises,
        shared_ffn_size=shared[0].dims[1] if shared else 0,
        shared_gate=any(name.endswith(".ffn_gate_inp_shexp.weight") for name in tensors),
    )


def _vocab_size(path: Path, tensors: Mapping[str, GGUFTensorInfo]) -> int:
    # The tokens listed may be fewer than the rows: embeddings are padded.
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.dims) != 2:
        raise ModelError(f"{path} lacks the matrix token_embd.weight; fetch the file again")
    return embedding.dims[1]


def _attention_scale(fields: Fields, rules: _Rules, head_dim: int, hidden_per_head: int) -> float:
    # GGUF does not carry Gemma's query_pre_attn_scalar; as llama.cpp does, the one size that
    # departs from head_dim is known by its number of layers.
    is_27b = rules.gemma and fields.positive("block_count") == _GEMMA_27B_LAYERS
    default = hidden_per_head if is_27b else head_dim
    return fields.number("attention.scale", float(default) ** -0.5)


def _layers(fields: Fields, rules: _Rules, divisors: tuple[float, ...]) -> tuple[LayerSpec, ...]:
    full = LayerSpec(rope=_rope(fields, divisors))
    is_sliding = _sliding_layers(fields, rules)
    if not any(is_sliding):
        return (full,) * len(is_sliding)
    local_rope = full.rope
    if rules.gemma:
        local_rope = RopeSpec(theta=fields.above(1, "rope.freq_base_swa", _GEMMA_LOCAL_THETA))
    sliding = LayerSpec(rope=local_rope, window=fields.positive("attention.sliding_window"))
    return tuple(sliding if each else full for each in is_sliding)


def _sliding_layers(fields: Fields, rules: _Rules) -> list[bool]:
    num_layers = fields.count("block_count", MAX_LAYERS)
    if "attention.sliding_window" not in fields or not fields.integer("attention.sliding_window"):
        return [False] * num_layers
    key = "attention.sliding_window_pattern"
    listed = fields.values.get(fields.prefix + key)
    if isinstance(listed, Sequence):
        if len(listed) != num_layers:
            raise ModelError(
                f"{fields.source}: {key} lists {len(listed)} layers; needed {num_layers}"
            )
        return [bool(each) for each in listed]
    pattern = fields.integer(key, _GEMMA_PATTERN if rules.gemma else 0)
    # A pattern of n: every nth layer sees everything; 0: none does.
    return [pattern == 0 or (index + 1) % pattern != 0 for index in range(num_layers)]


def _rope(fields: Fields, divisors: tuple[float, ...]) -> RopeSpec:
    theta = fields.above(1, "rope.freq_base", 10_000.0)
    # Before there were kinds, files had a factor alone, under either name; 0 says none.
    factor = fields.number("rope.scaling.factor", fields.number("rope.scale_linear", 0.0)) or 1.0
    kind = fields.text("rope.scaling.type", "none" if factor == 1 else "linear")
    if divisors:
        if kind not in ("none", "llama3"):
            raise UnsupportedModelError(
                f"{fields.source} has both rope_freqs.weight and rope scaling {kind!r}; "
                "shoal runs one of them"
            )
        return RopeSpec(theta=theta, scaling="divisors", divisors=divisors)
    if kind == "none":
        return RopeSpec(theta=theta)
    if factor < 0:
        raise ModelError(f"{fields.source}: rope is scaled by {factor:g}; needed a factor above 0")
    if kind == "linear":
        return RopeSpec(theta=theta, scaling="linear", factor=factor)
    if kind == "yarn":
        return RopeSpec(
            theta=theta,
            scaling="yarn",
            factor=factor,
            original_max_positions=fields.positive(
                "rope.scaling.original_context_length", fields.positive("context_length")
            ),
            beta_fast=fields.above(0, "rope.scaling.yarn_beta_fast", 32.0),
            beta_slow=fields.above(0, "rope.scaling.yarn_beta_slow", 1.0),
            attention_factor=fields.above(0, "rope.scaling.attn_factor", 1.0)
            * yarn_scale(factor, 1.0),
        )
    raise UnsupportedModelError(
        f"{fields.source}: rope scaling {kind!r} is not supported; shoal runs none, linear, yarn"
    )


def _divisors(path: Path, tensors: Mapping[str, GGUFTensorInfo]) -> tuple[float, ...]:
    info = tensors.get("rope_freqs.weight")
    if info is None:
        return ()
    if info.type_id != _F32 or len(info.dims) != 1:
        raise UnsupportedModelError(f"{path}: rope_freqs.weight is not a vector of F32")
    with path.open("rb") as file:
        file.seek(info.offset)
        data = file.read(4 * info.dims[0])
    if len(data) != 4 * info.dims[0]:
        raise ModelError(f"{path} is truncated: rope_freqs.weight is cut; fetch the file again")
    return struct.unpack(f"<{info.dims[0]}f", data)
