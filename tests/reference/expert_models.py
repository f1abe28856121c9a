"""Tiny models with experts, by name: every architecture, and what its settings change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from checkpoints import tiny_checkpoint

DEEPSEEK_YARN = {
    "rope_type": "yarn",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "mscale": 0.8,
    "mscale_all_dim": 1.3,
}
_QWEN = {"moe_intermediate_size": 32, "num_experts": 7, "num_experts_per_tok": 3}
_QWEN2 = {**_QWEN, "shared_expert_intermediate_size": 64}
_DEEPSEEK = {
    **{"moe_intermediate_size": 32, "n_routed_experts": 8, "num_experts_per_tok": 3},
    **{"kv_lora_rank": 32, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 16},
    "n_shared_experts": 2,
}

MODELS: dict[str, tuple[str, int, int, dict[str, Any]]] = {
    "mixtral": ("MixtralForCausalLM", 8, 2, {"num_local_experts": 5}),
    "mixtral-window": (
        "MixtralForCausalLM",
        9,
        3,
        {"num_local_experts": 4, "num_experts_per_tok": 1, "sliding_window": 11},
    ),
    "qwen3": ("Qwen3MoeForCausalLM", 8, 2, {**_QWEN, "norm_topk_prob": True, "head_dim": 16}),
    "qwen3-mixed": (
        "Qwen3MoeForCausalLM",
        14,
        2,
        {
            **_QWEN,
            **{"num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [3]},
            **{"attention_bias": True, "use_sliding_window": True, "sliding_window": 7},
        },
    ),
    "qwen2": ("Qwen2MoeForCausalLM", 8, 4, {**_QWEN2}),
    "qwen2-mixed": (
        "Qwen2MoeForCausalLM",
        9,
        3,
        {**_QWEN2, "norm_topk_prob": True, "mlp_only_layers": [1], "qkv_bias": False},
    ),
    "olmoe": ("OlmoeForCausalLM", 8, 8, {"num_experts": 6, "num_experts_per_tok": 2}),
    "olmoe-grouped": (
        "OlmoeForCausalLM",
        8,
        2,
        {"num_experts": 9, "norm_topk_prob": True, "attention_bias": True},
    ),
    "deepseek": (
        "DeepseekV2ForCausalLM",
        8,
        8,
        {**_DEEPSEEK, "q_lora_rank": None, "first_k_dense_replace": 1},
    ),
    "deepseek-groups": (
        "DeepseekV2ForCausalLM",
        6,
        6,
        {
            **_DEEPSEEK,
            **{"q_lora_rank": 32, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5},
            **{"topk_method": "group_limited_greedy", "rope_parameters": DEEPSEEK_YARN},
        },
    ),
}


def expert_checkpoint(folder: Path, name: str, **overrides: Any) -> Path:
    architecture, heads, kv_heads, settings = MODELS[name]
    return tiny_checkpoint(folder, architecture, heads, kv_heads, **{**settings, **overrides})
