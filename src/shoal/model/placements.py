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
    ExpertParameters,
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
        for part, shape in {**_weights(spec, index), **_vectors(spec)}.items():
            shapes[names.weight(index, part)] = shape
        for part, has_bias in _biases(spec).items():
            if has_bias:
                shapes[names.bias(index, part)] = _weights(spec, index)[part][:1]
        if spec.layers[index].has_experts:
            shapes |= expert_shapes(spec, names, index)
    return shapes


def placements(
    spec: ModelSpec, shard: Shard, parameters: DecoderParameters, names: TensorNames
) -> Iterator[Placement]:
    """Everything that the shard needs, with the place it fills; together they fill it all."""
    for local, layer in enumerate(parameters.layers):
        yield from layer_placements(spec, shard, shard.layers.start + local, layer, names)
    yield from table_placements(spec, shard, parameters, names)


def layer_placements(
    spec: ModelSpec, shard: Shard, index: int, layer: LayerParameters, names: TensorNames
) -> Iterator[Placement]:
    """Of one layer of the model."""
    yield from _attention_placements(spec, shard, index, layer, names)
    yield from _mlp_placements(spec, shard, index, layer, names)
    if layer.experts is not None:
        yield from _routing_placements(spec, index, layer.experts, names)
        yield from expert_placements(spec, index, layer.experts, names)


def table_placements(
    spec: ModelSpec, shard: Shard, parameters: DecoderParameters, names: TensorNames
) -> Iterator[Placement]:
    """Of what is before the first layer and behind the last."""
    if parameters.final_norm_E is not None:
        yield _whole(names.top("final_norm"), parameters.final_norm_E, (spec.hidden_size,))
    table = spec.vocab_size, spec.hidden_size
    embedding_VE, head_VE = parameters.embedding_VE, parameters.head_VE
    if embedding_VE is not None:
        yield _rows(names.top("embedding"), table, embedding_VE, shard.vocab)
    if head_VE is not None and head_VE is not embedding_VE:
        name = names.top("embedding" if spec.tied_embeddings else "head")
        yield _rows(name, table, head_VE, shard.vocab)


def _weights(spec: ModelSpec, layer: int) -> dict[str, tuple[int, int]]:
    """All matrices of a layer but those of its mixture."""
    hidden, heads = spec.hidden_size, spec.num_heads * spec.head_dim
    kv_heads = spec.num_kv_heads * spec.head_dim
    weights = {
        "q": (heads, hidden),
        "k": (kv_heads, hidden),
        "v": (kv_heads, hidden),
        "o": (hidden, spec.num_heads * spec.value_dim),
    }
    if (latent := spec.latent) is not None:
        del weights["k"], weights["v"]
        weights["kv"] = latent.kv_rank + latent.rope_dim, hidden
        per_head = latent.plain_dim + latent.value_dim
        weights["latent_kv"] = spec.num_heads * per_head, latent.kv_rank
        if latent.query_rank:
            weights |= {"q": (latent.query_rank, hidden), "latent_q": (heads, latent.query_rank)}
    prefix = "shared_" if spec.layers[layer].has_experts else ""
    if ffn := spec.mlp_size(layer):
        weights |= {f"{prefix}gate": (ffn, hidden), f"{prefix}up": (ffn, hidden)}
        weights[f"{prefix}down"] = hidden, ffn
    return weights


def expert_shapes(spec: ModelSpec, names: TensorNames, layer: int) -> dict[str, tuple[int, ...]]:
    """Tensors of a layer's mixture, without the MLP beside it."""
    assert spec.experts is not None
    ffn, hidden = spec.experts.ffn_size, spec.hidden_size
    shapes: dict[str, tuple[int, ...]] = {
        names.expert(layer, part, expert): shape
        for expert in range(spec.experts.num_experts)
        for part, shape in (("gate", (ffn, hidden)), ("up", (ffn, hidden)), ("down", (hidden, ffn)))
    }
    shapes[names.weight(layer, "router")] = spec.experts.num_experts, hidden
    if spec.experts.shared_gate:
        shapes[names.weight(layer, "shared_score")] = 1, hidden
    return shapes


def _vectors(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    hidden, head = (spec.hidden_size,), (spec.head_dim,)
    vectors: dict[str, tuple[int, ...]] = {"attention_norm": hidden, "ffn_norm": hidden}
    if spec.qk_norm_joint:
        vectors["q_norm"] = (spec.num_heads * spec.head_dim,)
        vectors["k_norm"] = (spec.num_kv_heads * spec.head_dim,)
    elif spec.qk_norm:
        vectors |= {"q_norm": head, "k_norm": head}
    if spec.latent is not None:
        vectors["latent_kv_norm"] = (spec.latent.kv_rank,)
        if spec.latent.query_rank:
            vectors["latent_q_norm"] = (spec.latent.query_rank,)
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
    hidden = (spec.hidden_size,)
    if layer.latent is not None:
        yield from latent_placements(spec, shard, index, layer, names)
    elif layer.qkv_CE is not None:
        yield from _qkv_placements(spec, shard, index, layer, names)
    yield _whole(names.weight(index, "attention_norm"), layer.attention_norm_E, hidden)
    if layer.qk_norm_HD is not None:
        yield from _qk_norm_placements(spec, shard, index, layer.qk_norm_HD, names)
    if layer.o_EC is not None:
        columns = held_head_columns(spec, shard, layer.o_EC)
        shape = spec.hidden_size, spec.num_heads * spec.value_dim
        yield _columns(names.weight(index, "o"), shape, layer.o_EC, columns)
    if layer.o_bias_E is not None:
        yield _whole(names.bias(index, "o"), layer.o_bias_E, hidden)
    if layer.post_attention_norm_E is not None:
        name = names.weight(index, "post_attention_norm")
        yield _whole(name, layer.post_attention_norm_E, hidden)


def _qk_norm_placements(
    spec: ModelSpec, shard: Shard, index: int, qk_norm_HD: Tensor, names: TensorNames
) -> Iterator[Placement]:
    kv_heads = shard.kv_heads(spec)
    norms = torch.split(qk_norm_HD, [len(shard.heads), len(kv_heads)])
    parts = (("q_norm", shard.heads, spec.num_heads), ("k_norm", kv_heads, spec.num_kv_heads))
    for (part, heads, total), norm_HD in zip(parts, norms, strict=True):
        name = names.weight(index, part)
        if spec.qk_norm_joint:  # a weight for every number of every head
            places = _head_rows(len(heads), spec.head_dim, names.interleaved)
            shape = (total * spec.head_dim,)
            yield Placement(name, shape, norm_HD.view(-1), places, heads.start * spec.head_dim)
        else:
            yield Placement(name, (spec.head_dim,), norm_HD, None)


def _qkv_placements(
    spec: ModelSpec, shard: Shard, index: int, layer: LayerParameters, names: TensorNames
) -> Iterator[Placement]:
    kv_heads, shapes = shard.kv_heads(spec), _weights(spec, index)
    first = 0
    for part, heads in (("q", shard.heads), ("k", kv_heads), ("v", kv_heads)):
        places = first + _head_rows(len(heads), spec.head_dim, names.interleaved and part != "v")
        first += len(places)
        start, shape = heads.start * spec.head_dim, shapes[part]
        assert layer.qkv_CE is not None
        yield Placement(names.weight(index, part), shape, layer.qkv_CE, places, start)
        if layer.qkv_bias_C is not None:
            yield Placement(names.bias(index, part), shape[:1], layer.qkv_bias_C, places, start)


def latent_placements(
    spec: ModelSpec, shard: Shard, index: int, layer: LayerParameters, names: TensorNames
) -> Iterator[Placement]:
    """Of latent attention; what turns comes in neighbouring pairs, and is kept half-split."""
    latent, parts, shapes = spec.latent, layer.latent, _weights(spec, index)
    assert latent is not None and parts is not None and layer.qkv_CE is not None
    heads, norms = shard.heads, _vectors(spec)
    q_rows = _turned_rows(len(heads), latent.plain_dim, latent.rope_dim)
    q_start = heads.start * spec.head_dim
    if parts.q_CR is None:
        yield Placement(names.weight(index, "q"), shapes["q"], layer.qkv_CE, q_rows, q_start)
        first = len(q_rows)
    else:
        assert latent.query_rank and parts.q_norm_R is not None
        yield _whole(names.weight(index, "q"), layer.qkv_CE, shapes["q"])
        name = names.weight(index, "latent_q")
        yield Placement(name, shapes["latent_q"], parts.q_CR, q_rows, q_start)
        norm = names.weight(index, "latent_q_norm")
        yield _whole(norm, parts.q_norm_R, norms["latent_q_norm"])
        first = latent.query_rank
    kv_rows = first + _turned_rows(1, latent.kv_rank, latent.rope_dim)
    yield Placement(names.weight(index, "kv"), shapes["kv"], layer.qkv_CE, kv_rows)
    per_head = latent.plain_dim + latent.value_dim
    rows = Range(heads.start * per_head, heads.stop * per_head)
    yield _rows(names.weight(index, "latent_kv"), shapes["latent_kv"], parts.kv_CR, rows)
    norm = names.weight(index, "latent_kv_norm")
    yield _whole(norm, parts.kv_norm_R, norms["latent_kv_norm"])


def _mlp_placements(
    spec: ModelSpec, shard: Shard, index: int, layer: LayerParameters, names: TensorNames
) -> Iterator[Placement]:
    hidden, columns = (spec.hidden_size,), shard.mlp_columns(spec, index)
    shape = spec.mlp_size(index), spec.hidden_size
    for number, part in enumerate(("gate", "up")):
        if layer.gate_up_FE is None:
            continue
        places = _gate_up_rows(len(columns), number, layer.gate_up_FE)
        name = names.weight(index, names.mlp_part(spec, index, part))
        yield Placement(name, shape, layer.gate_up_FE, places, columns.start)
        if layer.gate_up_bias_F is not None:
            bias = layer.gate_up_bias_F
            yield Placement(names.bias(index, part), shape[:1], bias, places, columns.start)
    yield _whole(names.weight(index, "ffn_norm"), layer.ffn_norm_E, hidden)
    if layer.down_EF is not None:
        name = names.weight(index, names.mlp_part(spec, index, "down"))
        yield _columns(name, (shape[1], shape[0]), layer.down_EF, columns)
    if layer.down_bias_E is not None:
        yield _whole(names.bias(index, "down"), layer.down_bias_E, hidden)
    if layer.post_ffn_norm_E is not None:
        yield _whole(names.weight(index, "post_ffn_norm"), layer.post_ffn_norm_E, hidden)


def _routing_placements(
    spec: ModelSpec, index: int, experts: ExpertParameters, names: TensorNames
) -> Iterator[Placement]:
    shapes = expert_shapes(spec, names, index)
    router = names.weight(index, "router")
    yield _whole(router, experts.router_XE, shapes[router])
    if experts.shared_gate_E is not None:
        score = names.weight(index, "shared_score")
        yield _whole(score, experts.shared_gate_E.unsqueeze(0), shapes[score])


def expert_placements(
    spec: ModelSpec, index: int, experts: ExpertParameters, names: TensorNames
) -> Iterator[Placement]:
    """The weights of those experts of a layer that a shard has."""
    assert spec.experts is not None
    ffn, hidden = spec.experts.ffn_size, spec.hidden_size
    held = zip(experts.shares, experts.gate_up_FE, experts.down_EF, strict=True)
    for share, gate_up_FE, down_EF in held:
        for number, part in enumerate(("gate", "up")):
            name = names.expert(index, part, share.expert)
            places = _gate_up_rows(ffn, number, gate_up_FE)
            yield Placement(name, (ffn, hidden), gate_up_FE, places)
        yield _whole(names.expert(index, "down", share.expert), down_EF, (hidden, ffn))


def _gate_up_rows(num_rows: int, number: int, target: Weight) -> Tensor:
    """Places of gate (number 0) or up (1)."""
    rows = torch.arange(num_rows)
    if isinstance(target, PackedWeight):  # panels of both in turn
        return rows // LANES * 2 * LANES + rows % LANES + number * LANES
    return rows + number * num_rows


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


def _turned_rows(num_heads: int, plain: int, turned: int) -> Tensor:
    """As `_head_rows`, interleaved, of heads that turn in their last numbers alone."""
    rows = torch.arange(num_heads * (plain + turned)).view(num_heads, -1)
    turned_rows = rows[:, plain:].reshape(num_heads, 2, turned // 2).transpose(1, 2)
    return torch.cat((rows[:, :plain], turned_rows.flatten(1)), 1).flatten()
