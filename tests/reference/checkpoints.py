"""Tiny random checkpoints as transformers writes them, and transformers' own logits for them.

Every weight is drawn so that it matters: norms differ from 1, biases from 0, and scores are
large enough for a wrong mask, scale or angle to move logits by far more than 1e-3.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

VOCAB_SIZE = 128


def tiny_checkpoint(
    folder: Path,
    architecture: str = "LlamaForCausalLM",
    heads: int = 9,
    kv_heads: int = 3,
    *,
    seed: int = 0,
    shard_size: int | str = "5GB",
    **overrides: Any,
) -> Path:
    """Writes config.json and safetensors into `folder`; returns it.

    Args:
        shard_size: largest file; small ones give shards with an index.
        overrides: of the config, by transformers' names.
    """
    config = tiny_config(architecture, heads, kv_heads, **overrides)
    torch.manual_seed(seed)
    model = getattr(transformers, architecture)(config)
    _randomise(model)
    model.save_pretrained(folder, max_shard_size=shard_size)
    return folder


def tiny_config(architecture: str, heads: int, kv_heads: int, **overrides: Any) -> Any:
    head_dim = overrides.get("head_dim", 8)
    settings: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": heads * head_dim,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
        "attn_implementation": "eager",
    }
    name = architecture.removesuffix("ForCausalLM") + ("Text" if "Gemma3" in architecture else "")
    return getattr(transformers, f"{name}Config")(**{**settings, **overrides})


def reference_model(folder: Path) -> Any:
    """transformers' model of the checkpoint, fp32."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def reference_logits(model: Any, token_ids: Sequence[int], **arguments: Any) -> torch.Tensor:
    """fp32 logits [tokens, vocabulary] of one sequence, in one go."""
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([list(token_ids)]), **arguments).logits[0]
    return logits


def _randomise(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                # Queries and keys are made large: attention must tell tokens apart.
                gain = 2.0 if "q_proj" in name or "k_proj" in name else 1.0
                parameter.normal_(0.0, gain * parameter.shape[-1] ** -0.5)
            elif "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            else:
                parameter.normal_(0.0, 0.5)
