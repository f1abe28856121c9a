"""Reads a ModelSpec from a Hugging Face folder: config.json and generation_config.json.

Reads both spellings of rope (transformers 4: rope_theta and rope_scaling; transformers 5:
rope_parameters). A feature that would change the arithmetic and is not run here is refused by
name, never ignored. Knows nothing of tensors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from shoal.core.errors import ModelError, ModelNotFoundError, UnsupportedModelError
from shoal.core.model_spec import MAX_LAYERS, LayerSpec, ModelSpec, RopeSpec
from shoal.model.fields import Fields
from shoal.model.hf_architectures import ARCHITECTURES, Rules
from shoal.model.hf_experts import latent_scale, layers_with_experts, read_experts, read_latent
from shoal.model.hf_rope import read_rope


def read_hf_spec(folder: Path) -> ModelSpec:
    """The spec of the checkpoint in `folder`; see `shoal.model.spec.read_spec` for errors."""
    path = folder / "config.json"
    config = _read_json(path)
    architecture = _architecture(path, config)
    rules = ARCHITECTURES[architecture]
    text_config = config.get("text_config") or {}
    if not isinstance(text_config, dict):
        raise ModelError(f"{path}: text_config is no object; fetch the file again")
    # Gemma 3 with vision nests the decoder; the ids that end a generation stay outside.
    values = {**rules.defaults, **config, **text_config}
    values = {key: value for key, value in values.items() if key not in rules.ignores}
    fields = Fields(str(path), values)
    _refuse_what_is_not_run(fields, architecture)

    latent = read_latent(fields) if rules.latent else None
    head_dim = latent.plain_dim + latent.rope_dim if latent else _head_dim(fields)
    num_heads = fields.positive("num_attention_heads")
    num_kv_heads = fields.positive("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise ModelError(
            f"{path}: num_attention_heads is {num_heads}, not a multiple of "
            f"num_key_value_heads ({num_kv_heads})"
        )
    experts = read_experts(fields, rules.experts)
    layers = _layers(fields)
    if experts is not None:
        has_experts = layers_with_experts(fields, rules.experts, len(layers))
        layers = tuple(
            replace(layer, has_experts=has) for layer, has in zip(layers, has_experts, strict=True)
        )
    hidden_size = fields.positive("hidden_size")
    attention_bias = fields.flag("attention_bias")
    return ModelSpec(
        architecture=architecture,
        num_layers=len(layers),
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        ffn_size=fields.positive("intermediate_size"),
        vocab_size=fields.positive("vocab_size"),
        norm_eps=fields.above(0, "rms_norm_eps", 1e-6),
        layers=layers,
        max_positions=_max_positions(fields, layers),
        attention_scale=_attention_scale(fields, rules, head_dim),
        tied_embeddings=fields.flag("tie_word_embeddings", rules.gemma),
        qkv_bias=rules.qkv_bias or attention_bias or fields.flag("qkv_bias"),
        output_bias=attention_bias and not rules.qkv_bias,
        mlp_bias=fields.flag("mlp_bias"),
        qk_norm=rules.qk_norm,
        qk_norm_joint=rules.qk_norm_joint,
        post_norms=rules.gemma,
        norm_plus_one=rules.gemma,
        activation=_activation(fields, "hidden_activation" if rules.gemma else "hidden_act"),
        embedding_scale=hidden_size**0.5 if rules.gemma else 1.0,
        final_softcap=fields.optional_number("final_logit_softcapping") if rules.gemma else None,
        experts=experts,
        latent=latent,
        bos_token_id=next(iter(fields.ids("bos_token_id")), None),
        eos_token_ids=_eos_token_ids(folder, fields),
    )


_EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size")
_ACTIVATIONS: Mapping[str, Literal["silu", "gelu_tanh"]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def _architecture(path: Path, config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise UnsupportedModelError(
            f"{path} names no architecture; needed `architectures` with one of "
            f"{', '.join(ARCHITECTURES)}"
        )
    if names[0] not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"architecture {names[0]} ({path}) is not supported; shoal runs "
            f"{', '.join(ARCHITECTURES)}"
        )
    return names[0]


def _refuse_what_is_not_run(fields: Fields, architecture: str) -> None:
    for key in _EXPERT_KEYS:
        if key in fields and ARCHITECTURES[architecture].experts is None:
            raise UnsupportedModelError(
                f"{fields.source}: {key} is {fields.values[key]}, so {architecture} has experts "
                f"here; shoal runs experts of {', '.join(_with_experts())}"
            )
    # Gemma 3's own config has the field, its transformers, vLLM and llama.cpp code ignores it.
    if "attn_logit_softcapping" in fields:
        cap = fields.number("attn_logit_softcapping")
        raise UnsupportedModelError(
            f"{fields.source}: attn_logit_softcapping is {cap}; shoal runs {architecture} "
            "without it: set it to null"
        )
    for key, causal in (("use_bidirectional_attention", False), ("is_causal", True)):
        if fields.flag(key, causal) is not causal:
            raise UnsupportedModelError(
                f"{fields.source}: {key} is {str(not causal).lower()}; shoal runs causal models"
            )


def _with_experts() -> list[str]:
    return [name for name, rules in ARCHITECTURES.items() if rules.experts is not None]


def _attention_scale(fields: Fields, rules: Rules, head_dim: int) -> float:
    if rules.latent:
        return latent_scale(fields, head_dim)
    size = fields.above(0, "query_pre_attn_scalar", head_dim) if rules.gemma else head_dim
    return float(size**-0.5)


def _head_dim(fields: Fields) -> int:
    if "head_dim" in fields:
        return fields.positive("head_dim")
    hidden_size, num_heads = fields.positive("hidden_size"), fields.positive("num_attention_heads")
    if hidden_size % num_heads:
        raise ModelError(
            f"{fields.source}: head_dim is missing and hidden_size ({hidden_size}) is not a "
            f"multiple of num_attention_heads ({num_heads})"
        )
    return hidden_size // num_heads


def _activation(fields: Fields, key: str) -> Literal["silu", "gelu_tanh"]:
    name = fields.text(key, "silu")
    if name not in _ACTIVATIONS:
        raise UnsupportedModelError(
            f"{fields.source}: {key} is {name!r}; shoal runs {', '.join(_ACTIVATIONS)}"
        )
    return _ACTIVATIONS[name]


def _layers(fields: Fields) -> tuple[LayerSpec, ...]:
    full = LayerSpec(rope=read_rope(fields, "full_attention"))
    window = _window(fields)
    if window is None:
        kinds = {"full_attention": full, "sliding_attention": full}
    else:
        sliding = LayerSpec(rope=read_rope(fields, "sliding_attention"), window=window)
        kinds = {"full_attention": full, "sliding_attention": sliding}
    types = _layer_types(fields)
    unknown = sorted(set(types) - kinds.keys())
    if unknown:
        raise UnsupportedModelError(
            f"{fields.source}: layer_types has {unknown[0]!r}; shoal runs {', '.join(kinds)}"
        )
    return tuple(kinds[each] for each in types)


def _window(fields: Fields) -> int | None:
    architecture = fields.values["architectures"][0]
    if architecture == "LlamaForCausalLM" or "sliding_window" not in fields:
        return None
    if architecture.startswith("Qwen") and not fields.flag("use_sliding_window"):
        return None
    return fields.positive("sliding_window")


def _layer_types(fields: Fields) -> list[str]:
    """Per layer, as listed or as the older keys imply it."""
    num_layers = fields.count("num_hidden_layers", MAX_LAYERS)
    if "layer_types" in fields:
        types = fields.values["layer_types"]
        if not isinstance(types, list) or len(types) != num_layers:
            raise ModelError(
                f"{fields.source}: layer_types is {types!r}; needed a list of {num_layers} names"
            )
        return [str(each) for each in types]
    if "sliding_window_pattern" in fields:
        pattern = fields.positive("sliding_window_pattern")
        is_full = [(index + 1) % pattern == 0 for index in range(num_layers)]
    else:
        first_sliding = fields.integer("max_window_layers", 0)
        is_full = [index < first_sliding for index in range(num_layers)]
    return ["full_attention" if full else "sliding_attention" for full in is_full]


def _max_positions(fields: Fields, layers: tuple[LayerSpec, ...]) -> int:
    declared = fields.positive("max_position_embeddings")
    stretched = [_yarn_positions(layer.rope) for layer in layers]
    return max(declared, *stretched)


def _yarn_positions(rope: RopeSpec) -> int:
    # Qwen declares the length before stretching and leaves the product to the reader.
    return round(rope.original_max_positions * rope.factor) if rope.scaling == "yarn" else 0


def _eos_token_ids(folder: Path, fields: Fields) -> tuple[int, ...]:
    ids = fields.ids("eos_token_id")
    path = folder / "generation_config.json"
    if path.is_file():
        ids += Fields(str(path), _read_json(path)).ids("eos_token_id")
    return tuple(dict.fromkeys(ids + _end_of_turn(folder)))


def _end_of_turn(folder: Path) -> tuple[int, ...]:
    """The id of the tokenizer's own eos_token, which is how tuned models often say where a turn
    ends, with a config.json that is still their base model's. vLLM stops there too."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return ()
    config = _read_json(path)
    eos, added = config.get("eos_token"), config.get("added_tokens_decoder")
    text = eos.get("content") if isinstance(eos, dict) else eos
    if not isinstance(text, str) or not isinstance(added, dict):
        return ()
    return tuple(
        int(token_id)
        for token_id, token in added.items()
        if isinstance(token, dict) and token.get("content") == text and token_id.isdecimal()
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ModelNotFoundError(
            f"{path} does not exist; name a folder with config.json, or a .gguf file"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path} holds a {type(config).__name__}; needed a JSON object")
    return config
