"""Which range of which tensor of a checkpoint fills which part of a shard's weights.

    q, k, v, gate, up    rows of the shard's heads and FFN columns
    o, down              columns of them
    embedding, head      rows of its token ids
    norms, o's and down's bias    all of it

Knows nothing of file formats: names come from `names.py`, values from a source.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from shoal.core.model_spec import ModelSpec
from shoal.core.split import Range, Shard
from shoal.kernels.cpu.arena import LANES, PackedWeight
from shoal.model.names import TensorNames
from shoal.model.parameters import (
    DecoderParameters,
    LayerParameters,
    Placement,
    Weight,
    held_head_columns,
)


def tensor_shapes(spec: ModelSpec, names: TensorNames) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint that the whole model needs."""
    table = spec.vocab_size, spec.hidden_size
    shapes: dict[str, tuple[int, ...]] = {names.top("embedding"): table}
    shapes[names.top("final_norm")] = table[1:]
    if not spec.tied_embeddings:
        shapes[names.top("head")] = table
    for index in range(spec.num_layers):
        for part, shape in _weights(spec).items():
            shapes[names.weight(index, part)] = shape
        shapes |= {names.weight(index, part): each for part, each in _vectors(spec).items()}
        for part, has_bias in _biases(spec).items():
            if has_bias:
                shapes[names.bias(index, part)] = _weights(spec)[part][:1]
    return shapes


def placements(
    spec: ModelSpec, shard: Shard, parameters: DecoderParameters, names: TensorNames
) -> Iterator[Placement]:
    """Everything that the shard needs, with the place it fills; together they fill it all."""
    for local, layer in enumerate(parameters.layers):
        index = shard.layers.start + local
        yield from _attention_placements(spec, shard, index, layer, names)
        yield from _mlp_placements(spec, shard, index, layer, names)
    if parameters.final_norm_E is not None:
        yield _whole(names.top("final_norm"), parameters.final_norm_E, (spec.hidden_size,))
    table = spec.vocab_size, spec.hidden_size
    embedding_VE, head_VE = parameters.embedding_VE, parameters.head_VE
    if embedding_VE is not None:
        yield _rows(names.top("embedding"), table, embedding_VE, shard.vocab)
    if head_VE is not None and head_VE is not embedding_VE:
        name = names.top("embedding" if spec.tied_embeddings else "head")
        yield _rows(name, table, head_VE, shard.vocab)


def _weights(spec: ModelSpec) -> dict[str, tuple[int, int]]:
    hidden, ffn = spec.hidden_size, spec.ffn_size
    heads, kv_heads = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    return {
        "q": (heads, hidden),
        "k": (kv_heads, hidden),
        "v": (kv_heads, hidden),
        "o": (hidden, heads),
        "gate": (ffn, hidden),
        "up": (ffn, hidden),
        "down": (hidden, ffn),
    }


def _vectors(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    hidden, head = (spec.hidden_size,), (spec.head_dim,)
    vectors: dict[str, tuple[int, ...]] = {"attention_norm": hidden, "ffn_norm": hidden}
    if spec.qk_norm:
        vectors |= {"q_norm": head, "k_norm": head}
    if spec.post_norms:
        vectors |= {"post_attention_norm": hidden, "post_ffn_norm": hidden}
    return vectors


def _biases(spec: ModelSpec) -> dict[str, bool]:
    return {
        **dict.fromkeys(("q", "k", "v"), spec.qkv_bias),
        "o": spec.output_bias,
        **dict.fromkeys(("gate", "up", "down"), spec.mlp_bias),
    }


def _attention_placements(
    spec: ModelSpec, shard: Shard, index: int, layer: LayerParameters, names: TensorNames
) -> Iterator[Placement]:
    hidden, shapes = (spec.hidden_size,), _weights(spec)
    if layer.qkv_CE is not None:
        yield from _qkv_placements(spec, shard, index, layer, names)
    yield _whole(names.weight(index, "attention_norm"), layer.attention_norm_E, hidden)
    if layer.qk_norm_HD is not None:
        counts = [len(shard.heads), len(shard.kv_heads(spec))]
        norms = torch.split(layer.qk_norm_HD, counts)
        for part, norm_HD in zip(("q_norm", "k_norm"), norms, strict=True):
            yield Placement(names.weight(index, part), (spec.head_dim,), norm_HD, None)
    if layer.o_EC is not None:
        columns = held_head_columns(spec, shard, layer.o_EC)
        yield _columns(names.weight(index, "o"), shapes["o"], layer.o_EC, columns)
    if layer.o_bias_E is not None:
        yield _whole(names.bias(index, "o"), layer.o_bias_E, hidden)
    if layer.post_attention_norm_E is not None:
        name = names.weight(index, "post_attention_norm")
        yield _whole(name, layer.post_attention_norm_E, hidden)


def _qkv_placements(
    spec: ModelSpec, shard: Shard, index: int, layer: LayerParameters, names: TensorNames
) -> Iterator[Placement]:
    kv_heads, shapes = shard.kv_heads(spec), _weights(spec)
    first = 0
    for part, heads in (("q", shard.heads), ("k", kv_heads), ("v", kv_heads)):
        places = first + _head_rows(len(heads), spec.head_dim, names.interleaved and part != "v")
        first += len(places)
        start, shape = heads.start * spec.head_dim, shapes[part]
        assert layer.qkv_CE is not None
        yield Placement(names.weight(index, part), shape, layer.qkv_CE, places, start)
        if layer.qkv_bias_C is not None:
            yield Placement(names.bias(index, part), shape[:1], layer.qkv_bias_C, places, start)


def _mlp_placements(
    spec: ModelSpec, shard: Shard, index: int, layer: LayerParameters, names: TensorNames
) -> Iterator[Placement]:
    hidden, shapes = (spec.hidden_size,), _weights(spec)
    rows = torch.arange(len(shard.ffn))
    for number, part in enumerate(("gate", "up")):
        if layer.gate_up_FE is None:
            continue
        if isinstance(layer.gate_up_FE, PackedWeight):  # panels of both in turn
            places = rows // LANES * 2 * LANES + rows % LANES + number * LANES
        else:
            places = rows + number * len(shard.ffn)
        start, shape = shard.ffn.start, shapes[part]
        yield Placement(names.weight(index, part), shape, layer.gate_up_FE, places, start)
        if layer.gate_up_bias_F is not None:
            bias = layer.gate_up_bias_F
            yield Placement(names.bias(index, part), shape[:1], bias, places, start)
    yield _whole(names.weight(index, "ffn_norm"), layer.ffn_norm_E, hidden)
    if layer.down_EF is not None:
        yield _columns(names.weight(index, "down"), shapes["down"], layer.down_EF, shard.ffn)
    if layer.down_bias_E is not None:
        yield _whole(names.bias(index, "down"), layer.down_bias_E, hidden)
    if layer.post_ffn_norm_E is not None:
        yield _whole(names.weight(index, "post_ffn_norm"), layer.post_ffn_norm_E, hidden)


def _whole(name: str, target: Weight, shape: tuple[int, ...]) -> Placement:
    return Placement(name, shape, target, torch.arange(shape[0]))


def _rows(name: str, shape: tuple[int, ...], target: Weight, rows: Range) -> Placement:
    return Placement(name, shape, target, torch.arange(len(rows)), rows.start)


def _columns(name: str, shape: tuple[int, ...], target: Weight, columns: Range) -> Placement:
    some = None if len(columns) == shape[1] else columns
    return Placement(name, shape, target, torch.arange(shape[0]), columns=some)


def _head_rows(num_heads: int, head_dim: int, interleaved: bool) -> Tensor:
    """Rows (2i, 2i+1) of a head in the file are rows (i, i + D/2) here."""
    rows = torch.arange(num_heads * head_dim)
    if not interleaved:
        return rows
    return rows.view(num_heads, 2, head_dim // 2).transpose(1, 2).flatten()
