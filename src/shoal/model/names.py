"""What the tensors of a decoder are called in each kind of file.

A checkpoint's own name for a part, and how its rows lie. Knows nothing of shapes or values.

    part          Hugging Face                    GGUF
    q             ...self_attn.q_proj             ...attn_q
    ffn_norm      ...post_attention_layernorm     ...ffn_norm     (the norm before the MLP)
                  ...pre_feedforward_layernorm                    (where norms also follow)
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

    def is_ignored(self, name: str) -> bool:
        return any(fragment in name for fragment in self.ignored)


def hf_names(spec: ModelSpec, present: Collection[str]) -> TensorNames:
    """Names in a safetensors folder; a decoder nested in a larger model has a longer prefix."""
    prefixes = ("model.", "language_model.model.", "model.language_model.")
    prefix = next((each for each in prefixes if f"{each}norm.weight" in present), "model.")
    head = "language_model.lm_head" if prefix == prefixes[1] else "lm_head"
    norms = _HF_SANDWICH_NORMS if spec.post_norms else _HF_NORMS
    top = {"embedding": f"{prefix}embed_tokens", "final_norm": f"{prefix}norm", "head": head}
    return TensorNames(
        layer=prefix + "layers.{}.",
        parts={**top, **_HF_LAYER, **norms},
        ignored=(
            "rotary_emb.inv_freq",
            f"{head}.weight",
            "vision_tower.",
            "multi_modal_projector.",
        ),
    )


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
}
