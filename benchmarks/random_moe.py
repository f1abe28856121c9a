"""Writes a mixture of experts with random weights: a folder as Hugging Face keeps them.

    tokenizer    one token a byte
    router       of `hot` experts, rows are longer, so that most tokens go to them

Knows nothing of what is measured with it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

_END = "<|end|>"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes of the model; `hot`: experts that most tokens go to, and how long their rows are."""

    num_layers: int = 8
    hidden_size: int = 512
    num_heads: int = 8
    num_kv_heads: int = 4
    num_experts: int = 16
    num_active: int = 2
    expert_size: int = 1024
    vocab_size: int = 512
    hot: tuple[int, ...] = ()
    heat: float = 4.0

    @property
    def num_parameters(self) -> int:
        experts = 3 * self.num_experts * self.expert_size
        attention = 2 * (self.num_heads + self.num_kv_heads) * 64
        layer = self.hidden_size * (experts + attention + self.num_experts)
        return self.num_layers * layer + 2 * self.vocab_size * self.hidden_size


def write_model(folder: Path, shape: Shape, dtype: torch.dtype = torch.bfloat16) -> Path:
    """The folder, with config, weights and tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "torch_dtype": str(dtype).removeprefix("torch."),
        "num_hidden_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.expert_size,
        "moe_intermediate_size": shape.expert_size,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": 64,
        "num_experts": shape.num_experts,
        "num_experts_per_tok": shape.num_active,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(
        {name: each.to(dtype).contiguous() for name, each in _weights(shape).items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    _write_tokenizer(folder)
    return folder


def _weights(shape: Shape) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    hidden, size = shape.hidden_size, shape.expert_size
    heads, kv_heads = shape.num_heads * 64, shape.num_kv_heads * 64

    def random(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) / columns**0.5

    weights = {
        "model.embed_tokens.weight": random(shape.vocab_size, hidden) * hidden**0.5,
        "model.norm.weight": torch.ones(hidden),
        "lm_head.weight": random(shape.vocab_size, hidden) * 4,
    }
    for layer in range(shape.num_layers):
        prefix = f"model.layers.{layer}"
        router = random(shape.num_experts, hidden)
        router[list(shape.hot)] *= shape.heat
        weights |= {
            f"{prefix}.input_layernorm.weight": torch.ones(hidden),
            f"{prefix}.post_attention_layernorm.weight": torch.ones(hidden),
            f"{prefix}.self_attn.q_proj.weight": random(heads, hidden),
            f"{prefix}.self_attn.k_proj.weight": random(kv_heads, hidden),
            f"{prefix}.self_attn.v_proj.weight": random(kv_heads, hidden),
            f"{prefix}.self_attn.o_proj.weight": random(hidden, heads),
            f"{prefix}.self_attn.q_norm.weight": torch.ones(64),
            f"{prefix}.self_attn.k_norm.weight": torch.ones(64),
            f"{prefix}.mlp.gate.weight": router,
        }
        for expert in range(shape.num_experts):
            own = f"{prefix}.mlp.experts.{expert}"
            weights[f"{own}.gate_proj.weight"] = random(size, hidden)
            weights[f"{own}.up_proj.weight"] = random(size, hidden)
            weights[f"{own}.down_proj.weight"] = random(hidden, size)
    return weights


def _write_tokenizer(folder: Path) -> None:
    symbols = [_END, *sorted(ByteLevel.alphabet())]
    vocabulary = {symbol: index for index, symbol in enumerate(symbols)}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_special_tokens([_END])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": _END}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
