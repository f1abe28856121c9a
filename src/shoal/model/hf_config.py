"""A ModelSpec as the config.json that says the same: for models that came without one (GGUF).

In the spelling of transformers 4, which transformers 5 and vLLM read too. What was written is
read back and compared, so a feature that config.json cannot say is an error. Knows nothing of
tensors or tokenizers.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from shoal.core.errors import UnsupportedModelError
from shoal.core.model_spec import ModelSpec, RopeSpec
from shoal.model.rope import attention_factor, inverse_frequencies


def hf_config(spec: ModelSpec) -> dict[str, Any]:
    """config.json of a decoder read from a GGUF file; see `check_read_back`.

    Raises:
        UnsupportedModelError: a feature that no architecture's config.json says.
    """
    name, model_type = _architecture(spec)
    sliding = [layer for layer in spec.layers if layer.window is not None]
    full = next((layer for layer in spec.layers if layer.window is None), spec.layers[0])
    config: dict[str, Any] = {
        "architectures": [name],
        "model_type": model_type,
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.ffn_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "rms_norm_eps": spec.norm_eps,
        "max_position_embeddings": spec.max_positions,
        "tie_word_embeddings": spec.tied_embeddings,
        "attention_bias": spec.output_bias,
        "mlp_bias": spec.mlp_bias,
        "bos_token_id": spec.bos_token_id,
        "eos_token_id": list(spec.eos_token_ids),
        "torch_dtype": "bfloat16",
        **_rope(full.rope, spec.head_dim),
    }
    if spec.post_norms:
        config["hidden_activation"] = "gelu_pytorch_tanh"
        config["query_pre_attn_scalar"] = round(spec.attention_scale**-2)
        config["final_logit_softcapping"] = spec.final_softcap
        config["attn_logit_softcapping"] = None
    else:
        config["hidden_act"] = "silu"
    if sliding:
        config["sliding_window"] = sliding[0].window
        if spec.post_norms:
            config["rope_local_base_freq"] = sliding[0].rope.theta
        if model_type.startswith("qwen"):
            config["use_sliding_window"] = True
    if not model_type.startswith(("llama", "mistral")):
        kinds = {True: "full_attention", False: "sliding_attention"}
        config["layer_types"] = [kinds[layer.window is None] for layer in spec.layers]
    elif model_type == "mistral" and not sliding:
        config["sliding_window"] = None
    return config


def check_read_back(spec: ModelSpec, written: ModelSpec) -> None:
    """That a config.json read again is the model it was made from.

    Raises:
        UnsupportedModelError: it is not; the message names the difference.
    """
    same = replace(
        written,
        architecture=spec.architecture,
        norm_plus_one=spec.norm_plus_one,
        eos_token_ids=spec.eos_token_ids,
        max_positions=spec.max_positions,
        layers=spec.layers,
    )
    different = [
        field
        for field in ModelSpec.__dataclass_fields__
        if not _is_close(getattr(spec, field), getattr(same, field))
    ]
    for ours, theirs in zip(spec.layers, written.layers, strict=False):
        if ours.window != theirs.window or not _is_same_rope(ours.rope, theirs.rope, spec.head_dim):
            different.append("layers")
            break
    if different or len(spec.layers) != len(written.layers):
        raise UnsupportedModelError(
            f"a config.json cannot say this GGUF model's {', '.join(different)}; quantise the "
            "model's safetensors folder instead"
        )


_ORIGINAL_LENGTHS = [2**power for power in range(4, 21)]


def _architecture(spec: ModelSpec) -> tuple[str, str]:
    slides = any(layer.window is not None for layer in spec.layers)
    names = {
        "llama": ("MistralForCausalLM", "mistral") if slides else ("LlamaForCausalLM", "llama"),
        "qwen2": ("Qwen2ForCausalLM", "qwen2"),
        "qwen3": ("Qwen3ForCausalLM", "qwen3"),
        "gemma3": ("Gemma3ForCausalLM", "gemma3_text"),
    }
    if spec.architecture not in names or spec.experts is not None:
        raise UnsupportedModelError(
            f"no config.json is known for the GGUF architecture {spec.architecture!r}"
            f"{' with experts' if spec.experts else ''}; shoal "
            f"writes those of {', '.join(names)}: quantise the model's safetensors folder instead"
        )
    return names[spec.architecture]


def _rope(rope: RopeSpec, head_dim: int) -> dict[str, Any]:
    if rope.scaling == "divisors":
        rope = _llama3_of_divisors(rope, head_dim)
    scaling: dict[str, Any] | None = None
    if rope.scaling == "linear":
        scaling = {"rope_type": "linear", "factor": rope.factor}
    elif rope.scaling == "llama3":
        scaling = {
            "rope_type": "llama3",
            "factor": rope.factor,
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_max_positions,
        }
    elif rope.scaling == "yarn":
        scaling = {
            "rope_type": "yarn",
            "factor": rope.factor,
            "original_max_position_embeddings": rope.original_max_positions,
            "beta_fast": rope.beta_fast,
            "beta_slow": rope.beta_slow,
            "attention_factor": rope.attention_factor,
        }
    return {"rope_theta": rope.theta, "rope_scaling": scaling}


def _llama3_of_divisors(rope: RopeSpec, head_dim: int) -> RopeSpec:
    """What GGUF keeps as a number per frequency, as the settings it was made with."""
    factor = max(rope.divisors)
    if factor == 1:
        return RopeSpec(theta=rope.theta)
    wanted = inverse_frequencies(rope, head_dim)
    for length in _ORIGINAL_LENGTHS:
        # 1 and 4 in every llama3 checkpoint there is.
        tried = RopeSpec(
            theta=rope.theta,
            scaling="llama3",
            factor=factor,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_positions=length,
        )
        if torch.allclose(inverse_frequencies(tried, head_dim), wanted, rtol=1e-4):
            return tried
    raise UnsupportedModelError(
        "the GGUF file's rope_freqs.weight fit no llama3 rope scaling, and a config.json has no "
        "other place for them; quantise the model's safetensors folder instead"
    )


def _is_same_rope(one: RopeSpec, other: RopeSpec, head_dim: int) -> bool:
    frequencies, others = inverse_frequencies(one, head_dim), inverse_frequencies(other, head_dim)
    return torch.allclose(frequencies, others, rtol=1e-4) and _is_close(
        attention_factor(one), attention_factor(other)
    )


def _is_close(one: object, other: object) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-5)
    return one == other
