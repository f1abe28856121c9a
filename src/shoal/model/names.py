"""What the tensors of a decoder are called in each kind of file.

A checkpoint's own name for a part, and how its rows lie. Knows nothing of shapes or values.

    part          Hugging Face                    GGUF
    q             ...self_attn.q_proj             ...attn_q
    ffn_norm      ...post_attention_layernorm     ...ffn_norm     (the norm before the MLP)
                  ...pre_feedforward_layernorm                    (where norms also follow)

Experts have a name each, even where a file stacks them in one tensor (`stacked_experts.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from shoal.core.model_spec import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorNames:
    """Names in one checkpoint.

    Attributes:
        layer: of layer i, with a place for it.
        parts: part → name, without ".weight" or ".bias".
        interleaved: q and k rows are ordered for rope over (2i, 2i+1) pairs, not half-split
            ones (llama GGUF files).
        ignored: fragments of names that are in files but are not weights we need.
    """

    layer: str
    parts: Mapping[str, str]
    interleaved: bool = False
    ignored: tuple[str, ...] = ()

    def top(self, part: str) -> str:
        return f"{self.parts[part]}.weight"

    def weight(self, layer: int, part: str) -> str:
        return f"{self.layer.format(layer)}{self.parts[part]}.weight"

    def bias(self, layer: int, part: str) -> str:
        return f"{self.layer.format(layer)}{self.parts[part]}.bias"

    def expert(self, layer: int, part: str, expert: int) -> str:
        """Of an expert's gate, up or down."""
        name = self.parts[f"expert_{part}"].format(expert)
        return f"{self.layer.format(layer)}{name}.weight"

    def mlp_part(self, spec: ModelSpec, layer: int, part: str) -> str:
        """gate, up or down of the MLP that every token goes through."""
        return f"shared_{part}" if spec.layers[layer].has_experts else part

    def is_ignored(self, name: str) -> bool:
        return any(fragment in name for fragment in self.ignored)


def hf_names(spec: ModelSpec, present: Collection[str]) -> TensorNames:
    """Names in a safetensors folder; a decoder nested in a larger model has a longer prefix."""
    prefixes = ("model.", "language_model.model.", "model.language_model.")
    prefix = next((each for each in prefixes if f"{each}norm.weight" in present), "model.")
    head = "language_model.lm_head" if prefix == prefixes[1] else "lm_head"
    norms = _HF_SANDWICH_NORMS if spec.post_norms else _HF_NORMS
    parts = {**_HF_LAYER, **norms}
    if any(".block_sparse_moe." in name for name in present):
        parts |= _HF_MIXTRAL
    if any(".mlp.shared_experts." in name for name in present):
        parts |= {part: parts[part].replace("expert.", "experts.") for part in _HF_SHARED}
    if spec.latent is not None and spec.latent.query_rank is not None:
        parts["q"] = "self_attn.q_a_proj"
    top = {"embedding": f"{prefix}embed_tokens", "final_norm": f"{prefix}norm", "head": head}
    return TensorNames(
        layer=prefix + "layers.{}.",
        parts={**top, **parts},
        ignored=(
            "rotary_emb.inv_freq",
            f"{head}.weight",
            "vision_tower.",
            "multi_modal_projector.",
        ),
    )


def qkv_parts(spec: ModelSpec) -> tuple[str, ...]:
    """What lies one below the other in the first product of attention."""
    return ("q", "k", "v") if spec.latent is None else ("q", "kv")


def gguf_names(spec: ModelSpec) -> TensorNames:
    """Names in a GGUF file."""
    return TensorNames(
        layer="blk.{}.",
        parts=_GGUF,
        interleaved=spec.architecture == "llama",
        ignored=("rope_freqs.weight",),
    )


_HF_LAYER = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "kv": "self_attn.kv_a_proj_with_mqa",
    "latent_q": "self_attn.q_b_proj",
    "latent_kv": "self_attn.kv_b_proj",
    "latent_q_norm": "self_attn.q_a_layernorm",
    "latent_kv_norm": "self_attn.kv_a_layernorm",
    "router": "mlp.gate",
    "expert_gate": "mlp.experts.{}.gate_proj",
    "expert_up": "mlp.experts.{}.up_proj",
    "expert_down": "mlp.experts.{}.down_proj",
    "shared_gate": "mlp.shared_expert.gate_proj",
    "shared_up": "mlp.shared_expert.up_proj",
    "shared_down": "mlp.shared_expert.down_proj",
    "shared_score": "mlp.shared_expert_gate",
}
_HF_SHARED = ("shared_gate", "shared_up", "shared_down")
_HF_MIXTRAL = {
    "router": "block_sparse_moe.gate",
    "expert_gate": "block_sparse_moe.experts.{}.w1",
    "expert_up": "block_sparse_moe.experts.{}.w3",
    "expert_down": "block_sparse_moe.experts.{}.w2",
}
_HF_NORMS = {"ffn_norm": "post_attention_layernorm"}
_HF_SANDWICH_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffn_norm": "post_feedforward_layernorm",
}
_GGUF = {
    "embedding": "token_embd",
    "final_norm": "output_norm",
    "head": "output",
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "o": "attn_output",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
    "attention_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
    "post_attention_norm": "post_attention_norm",
    "post_ffn_norm": "post_ffw_norm",
    "router": "ffn_gate_inp",
    "expert_gate": "ffn_gate_exps.{}",
    "expert_up": "ffn_up_exps.{}",
    "expert_down": "ffn_down_exps.{}",
    "shared_gate": "ffn_gate_shexp",
    "shared_up": "ffn_up_shexp",
    "shared_down": "ffn_down_shexp",
    "shared_score": "ffn_gate_inp_shexp",
}
