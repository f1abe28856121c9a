"""Models of random weights for benchmarks/gpu.py: our decoder and transformers' of one shape.

Speed depends on shapes and formats, not on what the weights say.
"""

from __future__ import annotations

from typing import Any

import torch

from shoal.core.model_spec import LayerSpec, ModelSpec, RopeSpec
from shoal.kernels import KernelSet, QuantizedWeight
from shoal.model.decoder import Decoder
from shoal.model.parameters import DecoderParameters, LayerParameters

FORMATS = ("bf16", "fp8", "int8", "int4")
GROUP_SIZE = {"fp8": 64, "int8": 32, "int4": 32}


def llama_spec(
    layers: int, hidden: int, heads: int, kv_heads: int, ffn: int, vocab: int, tied: bool
) -> ModelSpec:
    return ModelSpec(
        architecture="llama",
        num_layers=layers,
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=hidden // heads,
        ffn_size=ffn,
        vocab_size=vocab,
        norm_eps=1e-5,
        layers=(LayerSpec(rope=RopeSpec()),) * layers,
        max_positions=8192,
        attention_scale=(hidden // heads) ** -0.5,
        tied_embeddings=tied,
    )


LLAMA_8B = llama_spec(32, 4096, 32, 8, 14336, 128256, tied=False)
SMOLLM2_135M = llama_spec(30, 576, 9, 3, 1536, 49152, tied=True)
TINY = llama_spec(2, 64, 4, 2, 128, 256, tied=True)


def random_weight(
    weight_format: str, rows: int, columns: int, device: torch.device
) -> torch.Tensor | QuantizedWeight:
    if weight_format == "bf16":
        weight = torch.empty(rows, columns, dtype=torch.bfloat16, device=device)
        return weight.normal_(std=columns**-0.5)
    width = columns // 2 if weight_format == "int4" else columns
    # Byte 127 and 255 are no numbers in fp8.
    codes = torch.randint(0, 127, (rows, width), dtype=torch.uint8, device=device)
    scales = torch.full((rows, columns // GROUP_SIZE[weight_format]), columns**-0.5, device=device)
    match weight_format:
        case "fp8":
            return QuantizedWeight("fp8", codes.view(torch.float8_e4m3fn), scales / 100)
        case "int8":
            return QuantizedWeight("int8", codes.view(torch.int8), scales.half() / 64)
        case _:
            return QuantizedWeight("int4", codes, scales.half() / 4)


def random_decoder(
    spec: ModelSpec, weight_format: str, kernels: KernelSet, device: torch.device
) -> Decoder:
    """Embedding and head stay in bf16 (as in most checkpoints in few bits)."""
    hidden = spec.hidden_size
    qkv_rows = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim

    def weight(rows: int, columns: int) -> torch.Tensor | QuantizedWeight:
        return random_weight(weight_format, rows, columns, device)

    def ones() -> torch.Tensor:
        return torch.ones(hidden, device=device)

    layers = tuple(
        LayerParameters(
            attention_norm_E=ones(),
            qkv_CE=weight(qkv_rows, hidden),
            qkv_bias_C=None,
            qk_norm_HD=None,
            o_EC=weight(hidden, spec.num_heads * spec.head_dim),
            o_bias_E=None,
            post_attention_norm_E=None,
            ffn_norm_E=ones(),
            gate_up_FE=weight(2 * spec.ffn_size, hidden),
            gate_up_bias_F=None,
            down_EF=weight(hidden, spec.ffn_size),
            down_bias_E=None,
            post_ffn_norm_E=None,
        )
        for _ in range(spec.num_layers)
    )
    embedding = random_weight("bf16", spec.vocab_size, hidden, device)
    head = embedding if spec.tied_embeddings else random_weight("bf16", *embedding.shape, device)
    parameters = DecoderParameters(
        embedding_VE=embedding, layers=layers, final_norm_E=ones(), head_VE=head
    )
    return Decoder(spec, parameters, kernels)


def bytes_read_in_decode(decoder: Decoder) -> int:
    """Weights that a decode step reads: all but the embedding, unless it is the head too."""
    spec = decoder.spec
    embedding = 0 if spec.tied_embeddings else spec.vocab_size * spec.hidden_size * 2
    return decoder.weight_bytes - embedding


def transformers_model(spec: ModelSpec, device: torch.device) -> Any:
    """transformers' Llama of the same shape, bf16, random."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.ffn_size,
        num_hidden_layers=spec.num_layers,
        num_attention_heads=spec.num_heads,
        num_key_value_heads=spec.num_kv_heads,
        max_position_embeddings=spec.max_positions,
        tie_word_embeddings=spec.tied_embeddings,
        dtype=torch.bfloat16,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
