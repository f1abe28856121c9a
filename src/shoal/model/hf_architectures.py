"""What an architecture's name says beyond its config.json, one row per architecture.

Facts of transformers' configuration classes; knows nothing of how they are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Family = Literal["mixtral", "olmoe", "qwen", "deepseek"] | None
"""Whose keys say what experts a model has; None: it has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What holds for every checkpoint of an architecture.

    Attributes:
        qkv_bias: q, k and v have a bias whatever attention_bias says, and o has none.
        qk_norm: RMS norms over heads of q and k.
        gemma: norms around both halves stored as w - 1, scaled embeddings, its own names of
            some keys.
        qk_norm_joint: those norms are over all heads together.
        latent: keys and values are made from latents.
        experts: see `Family`.
        ignores: keys that transformers ignores too.
        defaults: transformers' own: a key that equals them may be missing from config.json.
    """

    qkv_bias: bool = False
    qk_norm: bool = False
    gemma: bool = False
    qk_norm_joint: bool = False
    latent: bool = False
    experts: Family = None
    ignores: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)


_QWEN_DEFAULTS = {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28}
_LLAMA_IDS = {"bos_token_id": 1, "eos_token_id": 2}
_GEMMA = Rules(
    qk_norm=True,
    gemma=True,
    defaults={
        "vocab_size": 262_208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 131_072,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "bos_token_id": 2,
        "eos_token_id": 1,
    },
)
ARCHITECTURES: Mapping[str, Rules] = {
    "LlamaForCausalLM": Rules(defaults=_LLAMA_IDS),
    "MistralForCausalLM": Rules(
        defaults={"num_key_value_heads": 8, "sliding_window": 4096, **_LLAMA_IDS}
    ),
    "Qwen2ForCausalLM": Rules(qkv_bias=True, defaults=_QWEN_DEFAULTS),
    "Qwen3ForCausalLM": Rules(qk_norm=True, defaults={**_QWEN_DEFAULTS, "head_dim": 128}),
    "MixtralForCausalLM": Rules(
        experts="mixtral",
        defaults={
            **{"num_key_value_heads": 8, "num_experts_per_tok": 2},
            **{"rms_norm_eps": 1e-5, "rope_theta": 1_000_000.0, **_LLAMA_IDS},
        },
    ),
    "Qwen2MoeForCausalLM": Rules(
        experts="qwen",
        defaults={
            **{"sliding_window": 4096, "max_window_layers": 28, "qkv_bias": True},
            **{"num_key_value_heads": 16, "num_experts_per_tok": 4},
            **{"moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632},
        },
    ),
    "Qwen3MoeForCausalLM": Rules(
        qk_norm=True,
        experts="qwen",
        ignores=("max_window_layers", "layer_types", "shared_expert_intermediate_size"),
        defaults={
            **{"num_key_value_heads": 4, "sliding_window": 4096},
            **{"num_experts_per_tok": 8, "moe_intermediate_size": 768},
        },
    ),
    "OlmoeForCausalLM": Rules(
        qk_norm=True,
        qk_norm_joint=True,
        experts="olmoe",
        ignores=("sliding_window",),
        defaults={"num_experts_per_tok": 8, "rms_norm_eps": 1e-5, "eos_token_id": 50_279},
    ),
    "DeepseekV2ForCausalLM": Rules(
        latent=True,
        experts="deepseek",
        ignores=("sliding_window", "num_key_value_heads", "head_dim"),
        defaults={
            **{"n_shared_experts": 2, "moe_intermediate_size": 1407},
            **{"kv_lora_rank": 512, "q_lora_rank": 1536, "v_head_dim": 128},
            **{"qk_nope_head_dim": 128, "qk_rope_head_dim": 64},
        },
    ),
    "Gemma3ForCausalLM": _GEMMA,
    "Gemma3ForConditionalGeneration": _GEMMA,
}
