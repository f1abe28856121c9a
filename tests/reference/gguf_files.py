"""Writes a tiny checkpoint as a GGUF file, the way llama.cpp's convert_hf_to_gguf.py does."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

_ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Gemma3ForCausalLM": "gemma3",
    "MixtralForCausalLM": "llama",
    "Qwen2MoeForCausalLM": "qwen2moe",
    "Qwen3MoeForCausalLM": "qwen3moe",
    "OlmoeForCausalLM": "olmoe",
}
_PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_GEMMA_PARTS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def write_gguf(
    model: Any,
    path: Path,
    kind: gguf.GGMLQuantizationType,
    extra: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
) -> None:
    """Writes a transformers model; its matrices become what `kind` makes of them.

    Args:
        model: changed in place: its weights take the values that the file holds.
        extra: adds metadata of its own.
    """
    config = model.config
    name = type(model).__name__
    writer = gguf.GGUFWriter(path, _ARCHITECTURES[name])
    _write_metadata(writer, config)
    extra(writer)
    for tensor_name, tensor in model.named_parameters():
        if ".experts." in tensor_name:
            _write_experts(writer, tensor_name, tensor, kind)
            continue
        _write_tensor(writer, config, name, tensor_name, tensor, kind)
    _write_rope(writer, config)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_metadata(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)
    if count := getattr(config, "num_experts", None):
        writer.add_expert_count(count)
        writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)


def _write_rope(writer: gguf.GGUFWriter, config: Any) -> None:
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", _llama3_divisors(rope, config.head_dim))
    elif rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
        if rope["rope_type"] == "yarn":
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def _llama3_divisors(rope: dict[str, Any], head_dim: int) -> np.ndarray:
    divisors = []
    original = rope["original_max_position_embeddings"]
    for exponent in range(0, head_dim, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (exponent / head_dim)
        if wavelength < original / rope["high_freq_factor"]:
            divisors.append(1.0)
        elif wavelength > original / rope["low_freq_factor"]:
            divisors.append(rope["factor"])
        else:
            smooth = (original / wavelength - rope["low_freq_factor"]) / (
                rope["high_freq_factor"] - rope["low_freq_factor"]
            )
            divisors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(divisors, dtype=np.float32)


def _write_tensor(
    writer: gguf.GGUFWriter,
    config: Any,
    architecture: str,
    hf_name: str,
    tensor: torch.Tensor,
    kind: gguf.GGMLQuantizationType,
) -> None:
    name = _gguf_name(hf_name, architecture)
    values = tensor.detach().numpy()
    if "ffn_gate_inp" in name:  # converters leave these as they are
        writer.add_tensor(name, (values[0] if len(values) == 1 else values).copy())
        return
    if tensor.dim() > 1:
        data = gguf.quantize(values, kind)
        with torch.no_grad():
            tensor.copy_(torch.from_numpy(gguf.dequantize(data, kind)))
        if _ARCHITECTURES[architecture] == "llama":
            data = _permuted(data, name, config)
        writer.add_tensor(name, data, raw_dtype=kind)
        return
    values = values + 1 if architecture.startswith("Gemma") and "norm" in name else values.copy()
    if _ARCHITECTURES[architecture] == "llama":
        values = _permuted(values, name, config)
    writer.add_tensor(name, values)


def _write_experts(
    writer: gguf.GGUFWriter,
    hf_name: str,
    tensor: torch.Tensor,
    kind: gguf.GGMLQuantizationType,
) -> None:
    """All experts of a layer in one tensor, gate and up in one each."""
    layer = hf_name.split(".")[2]
    fused = hf_name.endswith("gate_up_proj")
    parts = dict(zip(("gate", "up"), tensor.chunk(2, 1), strict=True)) if fused else None
    for part, values in (parts or {"down": tensor}).items():
        data = gguf.quantize(values.detach().contiguous().numpy(), kind)
        with torch.no_grad():
            values.copy_(torch.from_numpy(gguf.dequantize(data, kind)))
        writer.add_tensor(f"blk.{layer}.ffn_{part}_exps.weight", data, raw_dtype=kind)


def _gguf_name(hf_name: str, architecture: str) -> str:
    top = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if hf_name in top:
        return top[hf_name]
    _, _, layer, part = hf_name.split(".", 3)
    part, suffix = part.rsplit(".", 1)
    parts = {**_PARTS, **(_GEMMA_PARTS if architecture.startswith("Gemma") else {})}
    return f"blk.{layer}.{parts[part]}.{suffix}"


def _permuted(rows: np.ndarray, name: str, config: Any) -> np.ndarray:
    """The converter's reordering of q and k for rope over neighbouring pairs (whole rows)."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for part, num_heads in heads.items():
        if f".{part}." in name:
            halves = rows.reshape(num_heads, 2, rows.shape[0] // num_heads // 2, *rows.shape[1:])
            return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows.shape))
    return rows


@contextlib.contextmanager
def parsed_once() -> Iterator[None]:
    """transformers parses a file two or three times, and 10 s long where it has a vocabulary."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "GGUFReader", functools.cache(gguf.GGUFReader))
        yield
