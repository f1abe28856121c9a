"""Reads mixtures of experts and latent attention from config.json, in each family's own keys.

A setting that would change the arithmetic and is not run here is refused by name. Knows nothing
of tensors.
"""

from __future__ import annotations

from typing import Any

from shoal.core.errors import ModelError, UnsupportedModelError
from shoal.core.model_spec import MAX_EXPERTS, ExpertsSpec, LatentSpec
from shoal.model.fields import Fields
from shoal.model.hf_architectures import Family
from shoal.model.hf_rope import yarn_scale


def read_experts(fields: Fields, family: Family) -> ExpertsSpec | None:
    """What layers with experts have; None: no layer has any."""
    if family is None:
        return None
    count = next((key for key in _COUNT_KEYS if key in fields), _COUNT_KEYS[0])
    if not fields.integer(count):
        return None
    _refuse_what_is_not_run(fields, family)
    experts = ExpertsSpec(
        num_experts=fields.count(count, MAX_EXPERTS),
        num_active=fields.positive("num_experts_per_tok"),
        ffn_size=fields.positive(_FFN_KEYS[family]),
        renormalises=family == "mixtral"
        or (family != "deepseek" and fields.flag("norm_topk_prob")),
        **_more(fields, family),
    )
    _check(fields, experts)
    return experts


def layers_with_experts(fields: Fields, family: Family, num_layers: int) -> list[bool]:
    """Of each layer."""
    if family == "deepseek":
        first = fields.integer("first_k_dense_replace", 0)
        return [layer >= first for layer in range(num_layers)]
    if family != "qwen":
        return [True] * num_layers
    step, dense = fields.positive("decoder_sparse_step", 1), fields.ids("mlp_only_layers")
    return [layer not in dense and (layer + 1) % step == 0 for layer in range(num_layers)]


def read_latent(fields: Fields) -> LatentSpec:
    """Sizes of latent attention."""
    latent = LatentSpec(
        kv_rank=fields.positive("kv_lora_rank"),
        query_rank=fields.positive("q_lora_rank") if "q_lora_rank" in fields else None,
        plain_dim=fields.positive("qk_nope_head_dim"),
        rope_dim=fields.positive("qk_rope_head_dim"),
        value_dim=fields.positive("v_head_dim"),
    )
    if latent.value_dim > latent.plain_dim + latent.rope_dim:
        raise UnsupportedModelError(
            f"{fields.source}: v_head_dim is {latent.value_dim}; shoal runs values of up to the "
            f"size of keys ({latent.plain_dim + latent.rope_dim})"
        )
    if fields.flag("attention_bias"):
        raise UnsupportedModelError(
            f"{fields.source}: attention_bias is true; shoal runs latent attention without it"
        )
    return latent


def latent_scale(fields: Fields, head_dim: int) -> float:
    """What multiplies q·k: yarn's mscale counts twice (DeepSeek-V2's own code)."""
    key = "rope_parameters" if "rope_parameters" in fields else "rope_scaling"
    scale = float(head_dim**-0.5)
    if key not in fields:
        return scale
    rope = fields.child(key)
    if rope.text("rope_type", rope.text("type", "default")) == "default":
        return scale
    all_dim = rope.number("mscale_all_dim", 0.0)
    return scale * float(yarn_scale(rope.number("factor"), all_dim) ** 2) if all_dim else scale


# Spelt differently by different versions of transformers.
_COUNT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts")
_FFN_KEYS = {
    "mixtral": "intermediate_size",
    "olmoe": "intermediate_size",
    "qwen": "moe_intermediate_size",
    "deepseek": "moe_intermediate_size",
}


def _more(fields: Fields, family: str) -> dict[str, Any]:
    if family == "qwen" and "shared_expert_intermediate_size" in fields:
        size = fields.integer("shared_expert_intermediate_size")
        return {"shared_ffn_size": size, "shared_gate": size > 0}
    if family != "deepseek":
        return {}
    more: dict[str, Any] = {
        "scale": fields.number("routed_scaling_factor", 1.0),
        "shared_ffn_size": fields.positive("moe_intermediate_size")
        * fields.integer("n_shared_experts", 0),
    }
    if fields.text("topk_method", "greedy") == "group_limited_greedy":
        more["num_groups"] = fields.positive("n_group")
        more["num_active_groups"] = fields.positive("topk_group")
    return more


def _refuse_what_is_not_run(fields: Fields, family: str) -> None:
    runs: dict[str, tuple[Any, ...]] = {"clip_qkv": (None,), "mlp_bias": (None, False)}
    if family == "deepseek":
        runs |= {
            "topk_method": (None, "greedy", "group_limited_greedy"),
            "scoring_func": (None, "softmax"),
            "norm_topk_prob": (None, False),
            "moe_layer_freq": (None, 1),
        }
    for key, values in runs.items():
        if (found := fields.values.get(key)) not in values:
            wanted = " or ".join(repr(each) for each in values if each is not None) or "null"
            raise UnsupportedModelError(
                f"{fields.source}: {key} is {found!r}; shoal runs mixtures of experts with {wanted}"
            )


def _check(fields: Fields, experts: ExpertsSpec) -> None:
    size, rest = divmod(experts.num_experts, experts.num_groups)
    if rest or experts.num_active_groups > experts.num_groups:
        raise ModelError(
            f"{fields.source}: {experts.num_experts} experts in {experts.num_groups} groups, "
            f"{experts.num_active_groups} of them chosen; needed groups of one size, and no more "
            "chosen than there are"
        )
    if experts.num_active > size * experts.num_active_groups:
        raise ModelError(
            f"{fields.source}: num_experts_per_tok is {experts.num_active}; needed at most "
            f"{size * experts.num_active_groups}, which may be chosen from"
        )
