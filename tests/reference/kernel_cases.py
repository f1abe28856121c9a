"""Ragged batches, paged caches, weights in few bits and whole small decoders, all random, to hold
kernel sets against each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from shoal.core.model_spec import LayerSpec, ModelSpec, RopeSpec
from shoal.kernels import KernelSet, LayerKV, QuantizedWeight, RaggedBatch
from shoal.kernels.quantized import WeightFormat, pack_int4
from shoal.model.decoder import Decoder
from shoal.model.parameters import DecoderParameters, LayerParameters

BLOCK = 16
CODES = {"plain": None, "int8": torch.int8, "fp8": torch.float8_e4m3fn}


def make_batch(rows: Sequence[tuple[int, int]], device: str, seed: int = 0) -> RaggedBatch:
    """Rows of (new tokens, tokens in all), their blocks strewn over a cache of `num_blocks`."""
    generator = torch.Generator().manual_seed(seed)
    free = torch.randperm(num_blocks(rows), generator=generator).tolist()
    tables = [[free.pop() for _ in range(-(-context // BLOCK))] for _, context in rows]
    positions = [list(range(context - query, context)) for query, context in rows]
    slots = [
        table[p // BLOCK] * BLOCK + p % BLOCK
        for table, row in zip(tables, positions, strict=True)
        for p in row
    ]
    width = max(map(len, tables))
    padded = [table + [0] * (width - len(table)) for table in tables]
    return RaggedBatch(
        positions_T=torch.tensor([p for row in positions for p in row], device=device),
        slots_T=torch.tensor(slots, device=device),
        query_lens=[query for query, _ in rows],
        context_lens=[context for _, context in rows],
        block_tables_RB=torch.tensor(padded, device=device),
    )


def num_blocks(rows: Sequence[tuple[int, int]]) -> int:
    return 3 + sum(-(-context // BLOCK) for _, context in rows)


def make_kv(
    rows: Sequence[tuple[int, int]],
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    codes: torch.dtype | None,
    device: str,
) -> LayerKV:
    """A cache with something in every slot."""
    generator = torch.Generator().manual_seed(1)
    shape = (num_blocks(rows), BLOCK, num_kv_heads, head_dim)
    k, v = torch.randn((2, *shape), generator=generator)
    if codes is None:
        return LayerKV(k.to(device, dtype), v.to(device, dtype))
    scales = (torch.rand((2, *shape[:3]), generator=generator) / 50).to(device)
    if codes == torch.int8:
        k, v = ((x * 40).clamp(-127, 127).round() for x in (k, v))
    else:
        k, v = k * 60, v * 60
    return LayerKV(k.to(codes).to(device), v.to(codes).to(device), scales[0], scales[1])


def copy_of(kv: LayerKV) -> LayerKV:
    scales = kv.key_scales_NBH, kv.value_scales_NBH
    return LayerKV(
        kv.keys_NBHD.clone(),
        kv.values_NBHD.clone(),
        *(None if each is None else each.clone() for each in scales),
    )


def on_device_only(batch: RaggedBatch) -> RaggedBatch:
    """The batch as a CUDA graph has it: lengths on the device, lists that mean nothing."""
    contexts = torch.tensor(
        list(batch.context_lens), dtype=torch.int32, device=batch.positions_T.device
    )
    return replace(batch, query_lens=(), context_lens=(), context_lens_R=contexts, plans={})


def make_weight(
    weight_format: WeightFormat,
    rows: int,
    columns: int,
    group: int,
    *,
    device: str,
    minimums: bool = False,
    scale_dtype: torch.dtype = torch.float32,
) -> QuantizedWeight:
    """Random codes, each in use, with scales of a weight of a model."""
    generator = torch.Generator().manual_seed(rows + columns)
    if weight_format == "int8":
        codes = torch.randint(-127, 128, (rows, columns), generator=generator).to(torch.int8)
        size = 1 / 127
    elif weight_format == "fp8":
        codes = (torch.randn(rows, columns, generator=generator) * 100).to(torch.float8_e4m3fn)
        size = 1 / 448
    else:
        nibbles = torch.randint(16, (rows, columns), generator=generator).to(torch.uint8)
        codes, size = pack_int4(nibbles), 1 / 8
    shape = (rows, columns // group)
    scales = (torch.rand(shape, generator=generator) + 0.5) * size
    lows = torch.randn(shape, generator=generator) * size if minimums else None
    return QuantizedWeight(
        weight_format,
        codes.to(device),
        scales.to(device, scale_dtype),
        None if lows is None else lows.to(device, scale_dtype),
    )


GEMMA_LIKE = ModelSpec(
    architecture="test",
    num_layers=2,
    hidden_size=64,
    num_heads=3,
    num_kv_heads=1,
    head_dim=32,
    ffn_size=96,
    vocab_size=101,
    norm_eps=1e-6,
    layers=(
        LayerSpec(rope=RopeSpec(), window=20),
        LayerSpec(rope=RopeSpec(theta=1e6, scaling="linear", factor=2.0)),
    ),
    max_positions=256,
    attention_scale=0.2,
    tied_embeddings=True,
    qkv_bias=True,
    qk_norm=True,
    post_norms=True,
    activation="gelu_tanh",
    embedding_scale=8.0,
    final_softcap=30.0,
    attention_softcap=20.0,
)
"""Every feature a decoder can have, in small."""


def random_decoder(
    spec: ModelSpec,
    kernels: KernelSet,
    device: str,
    dtype: torch.dtype = torch.float32,
    weight_format: WeightFormat | None = None,
) -> Decoder:
    """The same weights each time, in the format asked for."""
    generator = torch.Generator().manual_seed(7)

    def plain(*shape: int) -> torch.Tensor:
        values = torch.randn(shape, generator=generator) * shape[-1] ** -0.5
        return values.to(device, dtype)

    def weight(rows: int, columns: int) -> torch.Tensor | QuantizedWeight:
        if weight_format is None:
            return plain(rows, columns)
        made = make_weight(weight_format, rows, columns, 32, device=device)
        return replace(made, scales_FG=made.scales_FG * columns**-0.5)

    def norm(*shape: int) -> torch.Tensor:
        return (torch.rand(shape, generator=generator) + 0.5).to(device)

    num_rotated = spec.num_heads + spec.num_kv_heads
    qkv_rows = (num_rotated + spec.num_kv_heads) * spec.head_dim
    hidden = spec.hidden_size
    layers = tuple(
        LayerParameters(
            attention_norm_E=norm(hidden),
            qkv_CE=weight(qkv_rows, hidden),
            qkv_bias_C=plain(qkv_rows) if spec.qkv_bias else None,
            qk_norm_HD=norm(num_rotated, spec.head_dim) if spec.qk_norm else None,
            o_EC=weight(hidden, spec.num_heads * spec.head_dim),
            o_bias_E=None,
            post_attention_norm_E=norm(hidden) if spec.post_norms else None,
            ffn_norm_E=norm(hidden),
            gate_up_FE=weight(2 * spec.ffn_size, hidden),
            gate_up_bias_F=None,
            down_EF=weight(hidden, spec.ffn_size),
            down_bias_E=None,
            post_ffn_norm_E=norm(hidden) if spec.post_norms else None,
        )
        for _ in range(spec.num_layers)
    )
    embedding_VE = plain(spec.vocab_size, hidden)
    parameters = DecoderParameters(
        embedding_VE=embedding_VE,
        layers=layers,
        final_norm_E=norm(hidden),
        head_VE=embedding_VE,
    )
    return Decoder(spec, parameters, kernels)
