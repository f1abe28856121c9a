"""ModelSpec: the shapes and rules of a dense decoder, whatever file it came from.

Read from config.json or a GGUF header by `model/spec.py`; read by everyone. Names no
model: an architecture is what these fields say.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


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

    `window`: tokens each token sees, itself included; None: all before it.
    """

    rope: RopeSpec
    window: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Shapes and rules of a dense decoder.

    Attributes:
        architecture: as the checkpoint names it; for messages only.
        num_heads, num_kv_heads, head_dim: query heads per layer, KV heads, their size.
        attention_scale: multiplies q·k.
        qkv_bias, output_bias, mlp_bias: which projections have one.
        qk_norm: RMS norm over each head's q and k, before rope.
        post_norms: norms also after attention and after the MLP (Gemma).
        norm_plus_one: norm weights are stored as w - 1 (Gemma checkpoints).
        activation: of the gate.
        embedding_scale: multiplies embeddings.
        final_softcap, attention_softcap: tanh caps on logits and scores; None: none.
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
    post_norms: bool = False
    norm_plus_one: bool = False
    activation: Literal["silu", "gelu_tanh"] = "silu"
    embedding_scale: float = 1.0
    final_softcap: float | None = None
    attention_softcap: float | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
