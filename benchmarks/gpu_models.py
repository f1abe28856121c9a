"""Models of random weights for benchmarks/gpu.py: our decoder and transformers' of a shape.

Speed depends on shapes and formats, not on what the weights say; with experts, on which of them
tokens choose: random ones, by random routers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from shoal.core.model_spec import ExpertsSpec, LayerSpec, ModelSpec, RopeSpec
from shoal.core.split import WHOLE_SHARE, ExpertShare
from shoal.core.step import BLOCK_SIZE
from shoal.kernels import ExpertWeights, KernelSet, QuantizedWeight, RaggedBatch
from shoal.kernels.experts import rows_of, slots
from shoal.model.decoder import Decoder
from shoal.model.parameters import DecoderParameters, ExpertParameters, LayerParameters

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


def experts_spec(spec: ModelSpec, num_experts: int, num_active: int) -> ModelSpec:
    """The same with experts of `ffn_size` in every layer."""
    rules = ExpertsSpec(num_experts=num_experts, num_active=num_active, ffn_size=spec.ffn_size)
    layers = tuple(replace(layer, has_experts=True) for layer in spec.layers)
    return replace(spec, architecture="qwen3_moe", qk_norm=True, experts=rules, layers=layers)


MOE_7B = experts_spec(llama_spec(16, 2048, 16, 16, 1024, 50304, tied=False), 64, 8)
"""OLMoE's sizes, 7B of which a token uses 1B, in Qwen3-MoE's architecture."""
TINY_MOE = experts_spec(llama_spec(2, 64, 4, 2, 64, 256, tied=False), 8, 2)


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

    def ones(*shape: int) -> torch.Tensor:
        return torch.ones(*shape, device=device)

    norm = None
    if spec.qk_norm:
        norm = ones(spec.num_heads + spec.num_kv_heads, spec.head_dim)
    layers = tuple(
        LayerParameters(
            attention_norm_E=ones(hidden),
            qkv_CE=weight(qkv_rows, hidden),
            qkv_bias_C=None,
            qk_norm_HD=norm,
            o_EC=weight(hidden, spec.num_heads * spec.head_dim),
            o_bias_E=None,
            post_attention_norm_E=None,
            ffn_norm_E=ones(hidden),
            gate_up_FE=None if spec.experts else weight(2 * spec.ffn_size, hidden),
            gate_up_bias_F=None,
            down_EF=None if spec.experts else weight(hidden, spec.ffn_size),
            down_bias_E=None,
            post_ffn_norm_E=None,
            experts=random_experts(spec, weight_format, device) if spec.experts else None,
        )
        for _ in range(spec.num_layers)
    )
    embedding = random_weight("bf16", spec.vocab_size, hidden, device)
    head = embedding if spec.tied_embeddings else random_weight("bf16", *embedding.shape, device)
    parameters = DecoderParameters(
        embedding_VE=embedding, layers=layers, final_norm_E=ones(hidden), head_VE=head
    )
    return Decoder(spec, parameters, kernels)


def random_experts(spec: ModelSpec, weight_format: str, device: torch.device) -> ExpertParameters:
    """All experts of a layer, and a router to which all are alike."""
    assert spec.experts is not None
    count, ffn, hidden = spec.experts.num_experts, spec.experts.ffn_size, spec.hidden_size
    gate_up = random_weight(weight_format, count * 2 * ffn, hidden, device)
    down = random_weight(weight_format, count * hidden, ffn, device)
    places = [(expert, 0, WHOLE_SHARE) for expert in range(count)]
    return ExpertParameters(
        shares=tuple(ExpertShare(*place) for place in places),
        router_XE=torch.randn(count, hidden, device=device),
        gate_up_FE=tuple(rows_of(gate_up, n * 2 * ffn, (n + 1) * 2 * ffn) for n in range(count)),
        down_EF=tuple(rows_of(down, n * hidden, (n + 1) * hidden) for n in range(count)),
        stack=ExpertWeights(slots(count, places).to(device), gate_up, down),
    )


def distinct_experts(spec: ModelSpec, num_tokens: int) -> float:
    """Experts of a layer that some token goes through, expected where all are as likely."""
    assert spec.experts is not None
    missed = 1 - spec.experts.num_active / spec.experts.num_experts
    return spec.experts.num_experts * (1 - missed**num_tokens)


def bytes_read_in_decode(decoder: Decoder, batch: int) -> int:
    """Weights that a decode step reads: all but the embedding, unless it is the head too; of
    experts, as many as are expected.
    """
    spec = decoder.spec
    embedding = 0 if spec.tied_embeddings else spec.vocab_size * spec.hidden_size * 2
    idle = 0.0
    if spec.experts is not None:
        share = 1 - distinct_experts(spec, batch) / spec.experts.num_experts
        idle = share * expert_bytes(decoder)
    return decoder.weight_bytes - embedding - round(idle)


def expert_bytes(decoder: Decoder) -> int:
    """Of all experts of all layers."""
    layers = [layer.experts for layer in decoder._parameters.layers]
    return sum(
        weight.nbytes
        for experts in layers
        if experts is not None
        for weight in (*experts.gate_up_FE, *experts.down_EF)
    )


def transformers_model(spec: ModelSpec, device: torch.device) -> Any:
    """transformers' Llama or Qwen3-MoE of the same shape, bf16, random."""
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig

    experts: dict[str, Any] = {}
    if spec.experts is not None:
        experts = {
            "num_experts": spec.experts.num_experts,
            "num_experts_per_tok": spec.experts.num_active,
            "moe_intermediate_size": spec.experts.ffn_size,
            "norm_topk_prob": spec.experts.renormalises,
            "head_dim": spec.head_dim,
        }
    config = (Qwen3MoeConfig if experts else LlamaConfig)(
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.ffn_size,
        num_hidden_layers=spec.num_layers,
        num_attention_heads=spec.num_heads,
        num_key_value_heads=spec.num_kv_heads,
        max_position_embeddings=spec.max_positions,
        tie_word_embeddings=spec.tied_embeddings,
        dtype=torch.bfloat16,
        **experts,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            return AutoModelForCausalLM.from_config(config).eval()
    finally:
        torch.set_default_dtype(before)


def decode_batch(batch: int, context: int, device: torch.device) -> tuple[RaggedBatch, int]:
    """Rows that decode at `context`, and the blocks they need."""
    per_row = -(-context // BLOCK_SIZE)
    tables = torch.arange(batch * per_row, device=device).view(batch, per_row)
    last = context - 1
    made = RaggedBatch(
        positions_T=torch.full((batch,), last, device=device),
        slots_T=tables[:, -1] * BLOCK_SIZE + last % BLOCK_SIZE,
        query_lens=(1,) * batch,
        context_lens=(context,) * batch,
        block_tables_RB=tables,
    )
    return made, batch * per_row


def some_tokens(count: int, spec: ModelSpec, device: torch.device) -> torch.Tensor:
    """All kinds of them: a mixture's tokens are to go different ways."""
    generator = torch.Generator().manual_seed(count)
    return torch.randint(spec.vocab_size, (count,), generator=generator).to(device)
