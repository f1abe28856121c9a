"""ModelSpec: the shapes and rules of a decoder, whatever file it came from.

Read from config.json or a GGUF header by `model/spec.py`; read by everyone. Names no
model: an architecture is what these fields say.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MAX_LAYERS, MAX_EXPERTS = 4096, 65_536
"""Of a model, and of a layer: ten times what there is. A file that says more is corrupt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeSpec:
    """Rotary position embedding of a group of layers.

    Attributes:
        theta: base of the frequencies.
        scaling: "none"; "linear" (positions / factor); "llama3" (by wavelength, Llama 3.1);
            "yarn" (NTK-by-parts with attention scaling, arXiv 2309.00071); "divisors" (each
            frequency divided by its own number: how GGUF files carry llama3).
        factor, low_freq_factor, high_freq_factor, original_max_positions: of the scaling.
        beta_fast, beta_slow, attention_factor: of yarn.
        divisors: one per frequency, head_dim / 2 of them.
    """

    theta: float = 10_000.0
    scaling: Literal["none", "linear", "llama3", "yarn", "divisors"] = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    divisors: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """What sets one layer apart from its neighbours.

    `window`: tokens each token sees, itself included; None: all before it. `has_experts`: its MLP
    is a mixture, as `ModelSpec.experts` says.
    """

    rope: RopeSpec
    window: int | None = None
    has_experts: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsSpec:
    """A mixture of experts (arXiv 1701.06538): each token goes through a few of many MLPs.

    A token's scores are a softmax over all experts; the highest few are chosen, the first of
    equals, and what they give is summed with their scores as weights.

    Attributes:
        num_experts, num_active: in a layer, and those that a token goes through.
        ffn_size: of each.
        renormalises: the weights of the chosen ones are made to sum to 1.
        scale: multiplies the weights.
        num_groups, num_active_groups: consecutive experts are grouped, and only the groups with the
            highest score are chosen from (DeepSeek-V2); 1 and 1: all.
        shared_ffn_size: of an MLP beside them that every token goes through; 0: there is none.
        shared_gate: what that gives is multiplied by the sigmoid of a learned product (Qwen2-MoE).
    """

    num_experts: int
    num_active: int
    ffn_size: int
    renormalises: bool = True
    scale: float = 1.0
    num_groups: int = 1
    num_active_groups: int = 1
    shared_ffn_size: int = 0
    shared_gate: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentSpec:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434).

    Keys and values of all heads are made from one normed vector of `kv_rank` numbers and, for the
    part of a key that turns, `rope_dim` numbers that all heads share. A query or key has
    `plain_dim` numbers that don't turn, then `rope_dim` that do: `ModelSpec.head_dim` together.

    Attributes:
        query_rank: queries too are made from a vector of so many; None: from the hidden state.
        value_dim: of a head.
    """

    kv_rank: int
    query_rank: int | None
    plain_dim: int
    rope_dim: int
    value_dim: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Shapes and rules of a decoder.

    Attributes:
        architecture: as the checkpoint names it; for messages only.
        num_heads, num_kv_heads, head_dim: query heads per layer, KV heads, their size.
        attention_scale: multiplies q·k.
        qkv_bias, output_bias, mlp_bias: which projections have one.
        qk_norm: RMS norm over each head's q and k, before rope.
        qk_norm_joint: that norm is over all heads of q together, and of k (OLMoE).
        post_norms: norms also after attention and after the MLP (Gemma).
        norm_plus_one: norm weights are stored as w - 1 (Gemma checkpoints).
        activation: of the gate.
        embedding_scale: multiplies embeddings.
        final_softcap, attention_softcap: tanh caps on logits and scores; None: none.
        experts: of the layers that have some.
        latent: how keys and values are made, where not by plain projections.
        max_positions: longest context the checkpoint was made for.
        eos_token_ids: every id that ends a generation.
    """

    architecture: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int
    norm_eps: float
    layers: tuple[LayerSpec, ...]
    max_positions: int
    attention_scale: float
    tied_embeddings: bool
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    qk_norm_joint: bool = False
    post_norms: bool = False
    norm_plus_one: bool = False
    activation: Literal["silu", "gelu_tanh"] = "silu"
    embedding_scale: float = 1.0
    final_softcap: float | None = None
    attention_softcap: float | None = None
    experts: ExpertsSpec | None = None
    latent: LatentSpec | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @property
    def value_dim(self) -> int:
        """Of a head's value; `head_dim`, but where keys and values are made from a latent."""
        return self.latent.value_dim if self.latent else self.head_dim

    @property
    def rope_dim(self) -> int:
        """Of a head, the last numbers, which turn with the position; mostly all of them."""
        return self.latent.rope_dim if self.latent else self.head_dim

    def mlp_size(self, layer: int) -> int:
        """Columns of the MLP that every token goes through; 0: the layer has only experts."""
        if not self.layers[layer].has_experts:
            return self.ffn_size
        assert self.experts is not None
        return self.experts.shared_ffn_size
