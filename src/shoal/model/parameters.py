"""The weights of a decoder as it uses them, and which tensor of a checkpoint fills which part.

    E hidden size   V vocabulary   H all heads with a q or k norm   D head size
    C rows of q, k and v, one after another   F rows of gate and up, one after the other

Norm weights are fp32 whatever the rest is; they are small and their sums are not. Packed weights
(kernels/cpu) lie in an arena in the order they are read, and gate and up in turn, 16 rows each.
Knows nothing of file formats: names come from `names.py`, values from a source.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from shoal.core.model_spec import ModelSpec
from shoal.kernels.cpu.arena import LANES, Arena, PackedFormat, PackedWeight
from shoal.kernels.quantized import GROUP_SIZE, QuantizedWeight
from shoal.model.names import TensorNames
from shoal.model.precision import Format, WeightFormats

Weight = Tensor | QuantizedWeight | PackedWeight

_FP8_GROUP_SIZE = 128  # as in checkpoints with a scale for every 128 x 128 block


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerParameters:
    """Weights of one layer; None where the spec has no such part."""

    attention_norm_E: Tensor
    qkv_CE: Weight
    qkv_bias_C: Tensor | None
    qk_norm_HD: Tensor | None
    o_EC: Weight
    o_bias_E: Tensor | None
    post_attention_norm_E: Tensor | None
    ffn_norm_E: Tensor
    gate_up_FE: Weight
    gate_up_bias_F: Tensor | None
    down_EF: Weight
    down_bias_E: Tensor | None
    post_ffn_norm_E: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DecoderParameters:
    """Weights of a decoder; `head_VE` is `embedding_VE` itself where they are tied."""

    embedding_VE: Weight
    layers: tuple[LayerParameters, ...]
    final_norm_E: Tensor
    head_VE: Weight

    @property
    def size_bytes(self) -> int:
        tensors: list[Weight] = [self.embedding_VE, self.final_norm_E]
        if self.head_VE is not self.embedding_VE:
            tensors.append(self.head_VE)
        for layer in self.layers:
            parts = (getattr(layer, each.name) for each in fields(layer))
            tensors += [part for part in parts if part is not None]
        return sum(tensor.nbytes for tensor in tensors)


@dataclass(frozen=True, slots=True, eq=False)
class Placement:
    """A tensor of the checkpoint and the place it goes to.

    Attributes:
        name: in the checkpoint.
        shape: it must have there.
        target: what holds it, perhaps among others.
        places: int64, the target's row for each of its rows; None: it goes to every row (a norm
            that heads share).
    """

    name: str
    shape: tuple[int, ...]
    target: Weight
    places: Tensor | None


class Allocator:
    """Makes room for weights: plain tensors, or packed in an arena (of floats in `dtype`)."""

    def __init__(
        self, device: torch.device, dtype: torch.dtype, arena: Arena | None = None
    ) -> None:
        self._device = device
        self._dtype = dtype
        self._arena = arena

    @property
    def is_packed(self) -> bool:
        return self._arena is not None

    def weight(self, weight_format: Format, rows: int, columns: int) -> Weight:
        if self._arena is not None:
            return self._arena.take(packed_format(weight_format, self._dtype), rows, columns)
        if weight_format is None:
            return self._empty(self._dtype, rows, columns)
        return _quantized(weight_format, rows, columns, self._device)

    def bias(self, rows: int) -> Tensor:
        """Packed weights add fp32, a whole panel at a time."""
        if self._arena is None:
            return self._empty(self._dtype, rows)
        return torch.zeros(_whole_panels(rows))

    def norm(self, *shape: int) -> Tensor:
        return self._empty(torch.float32, *shape)

    def _empty(self, dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape, device=self._device, dtype=dtype)


def packed_format(weight_format: Format, dtype: torch.dtype) -> PackedFormat:
    """How packed weights keep a format; fp8 is kept in bf16, which holds its values."""
    if weight_format == "fp8" or (weight_format is None and dtype == torch.bfloat16):
        return "bfloat16"
    return "float32" if weight_format is None else weight_format


def weight_shapes(spec: ModelSpec, packed: bool) -> dict[str, tuple[int, int]]:
    """Rows and columns of a layer's weights and of the tables."""
    heads = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
    ffn = _whole_panels(spec.ffn_size) if packed else spec.ffn_size
    return {
        "qkv": (heads, spec.hidden_size),
        "o": (spec.hidden_size, spec.num_heads * spec.head_dim),
        "gate_up": (2 * ffn, spec.hidden_size),
        "down": (spec.hidden_size, spec.ffn_size),
        "table": (spec.vocab_size, spec.hidden_size),
    }


def allocate(spec: ModelSpec, formats: WeightFormats, allocator: Allocator) -> DecoderParameters:
    """Uninitialised weights in the shapes of the spec, in the order they are read."""
    shapes = weight_shapes(spec, allocator.is_packed)
    hidden_size = spec.hidden_size
    num_rotated = spec.num_heads + spec.num_kv_heads

    def norm_if(wanted: bool) -> Tensor | None:
        return allocator.norm(hidden_size) if wanted else None

    def bias_if(wanted: bool, part: str) -> Tensor | None:
        return allocator.bias(shapes[part][0]) if wanted else None

    layers = tuple(
        LayerParameters(
            attention_norm_E=allocator.norm(hidden_size),
            qkv_CE=allocator.weight(each.qkv, *shapes["qkv"]),
            qkv_bias_C=bias_if(spec.qkv_bias, "qkv"),
            qk_norm_HD=allocator.norm(num_rotated, spec.head_dim) if spec.qk_norm else None,
            o_EC=allocator.weight(each.o, *shapes["o"]),
            o_bias_E=bias_if(spec.output_bias, "o"),
            post_attention_norm_E=norm_if(spec.post_norms),
            ffn_norm_E=allocator.norm(hidden_size),
            gate_up_FE=allocator.weight(each.gate_up, *shapes["gate_up"]),
            gate_up_bias_F=bias_if(spec.mlp_bias, "gate_up"),
            down_EF=allocator.weight(each.down, *shapes["down"]),
            down_bias_E=bias_if(spec.mlp_bias, "down"),
            post_ffn_norm_E=norm_if(spec.post_norms),
        )
        for each in formats.layers
    )
    head_VE = allocator.weight(formats.head, *shapes["table"])
    tied = spec.tied_embeddings
    return DecoderParameters(
        embedding_VE=head_VE if tied else allocator.weight(formats.embedding, *shapes["table"]),
        layers=layers,
        final_norm_E=allocator.norm(hidden_size),
        head_VE=head_VE,
    )


def placements(
    spec: ModelSpec, parameters: DecoderParameters, names: TensorNames
) -> Iterator[Placement]:
    """Every tensor the decoder needs, with the place it fills; together they fill everything."""
    table = (spec.vocab_size, spec.hidden_size)
    for index, layer in enumerate(parameters.layers):
        yield from _attention_placements(spec, index, layer, names)
        yield from _mlp_placements(spec, index, layer, names)
    yield _whole(names.top("final_norm"), (spec.hidden_size,), parameters.final_norm_E)
    yield _whole(names.top("embedding"), table, parameters.embedding_VE)
    if not spec.tied_embeddings:
        yield _whole(names.top("head"), table, parameters.head_VE)


def _attention_placements(
    spec: ModelSpec, index: int, layer: LayerParameters, names: TensorNames
) -> Iterator[Placement]:
    hidden = (spec.hidden_size,)
    heads = {"q": spec.num_heads, "k": spec.num_kv_heads, "v": spec.num_kv_heads}
    first = 0
    for part, num_heads in heads.items():
        places = first + _head_rows(num_heads, spec.head_dim, names.interleaved and part != "v")
        first += len(places)
        shape = (len(places), spec.hidden_size)
        yield Placement(names.weight(index, part), shape, layer.qkv_CE, places)
        if layer.qkv_bias_C is not None:
            yield Placement(names.bias(index, part), shape[:1], layer.qkv_bias_C, places)
    yield _whole(names.weight(index, "attention_norm"), hidden, layer.attention_norm_E)
    if layer.qk_norm_HD is not None:
        counts = [spec.num_heads, spec.num_kv_heads]
        norms = torch.split(layer.qk_norm_HD, counts)
        for part, norm_HD in zip(("q_norm", "k_norm"), norms, strict=True):
            yield Placement(names.weight(index, part), (spec.head_dim,), norm_HD, None)
    shape = (spec.hidden_size, spec.num_heads * spec.head_dim)
    yield _whole(names.weight(index, "o"), shape, layer.o_EC)
    if layer.o_bias_E is not None:
        yield _whole(names.bias(index, "o"), hidden, layer.o_bias_E)
    if layer.post_attention_norm_E is not None:
        name = names.weight(index, "post_attention_norm")
        yield _whole(name, hidden, layer.post_attention_norm_E)


def _mlp_placements(
    spec: ModelSpec, index: int, layer: LayerParameters, names: TensorNames
) -> Iterator[Placement]:
    hidden = (spec.hidden_size,)
    rows = torch.arange(spec.ffn_size)
    for number, part in enumerate(("gate", "up")):
        if isinstance(layer.gate_up_FE, PackedWeight):  # panels of both in turn
            places = rows // LANES * 2 * LANES + rows % LANES + number * LANES
        else:
            places = rows + number * spec.ffn_size
        shape = (spec.ffn_size, spec.hidden_size)
        yield Placement(names.weight(index, part), shape, layer.gate_up_FE, places)
        if layer.gate_up_bias_F is not None:
            yield Placement(names.bias(index, part), shape[:1], layer.gate_up_bias_F, places)
    yield _whole(names.weight(index, "ffn_norm"), hidden, layer.ffn_norm_E)
    shape = (spec.hidden_size, spec.ffn_size)
    yield _whole(names.weight(index, "down"), shape, layer.down_EF)
    if layer.down_bias_E is not None:
        yield _whole(names.bias(index, "down"), hidden, layer.down_bias_E)
    if layer.post_ffn_norm_E is not None:
        yield _whole(names.weight(index, "post_ffn_norm"), hidden, layer.post_ffn_norm_E)


def _whole(name: str, shape: tuple[int, ...], target: Weight) -> Placement:
    return Placement(name, shape, target, torch.arange(shape[0]))


def _head_rows(num_heads: int, head_dim: int, interleaved: bool) -> Tensor:
    """Rows (2i, 2i+1) of a head in the file are rows (i, i + D/2) here."""
    rows = torch.arange(num_heads * head_dim)
    if not interleaved:
        return rows
    return rows.view(num_heads, 2, head_dim // 2).transpose(1, 2).flatten()


def _whole_panels(rows: int) -> int:
    return -(-rows // LANES) * LANES


def _quantized(
    weight_format: Format, rows: int, columns: int, device: torch.device
) -> QuantizedWeight:
    """Groups as small as any we keep; coarser ones of a checkpoint are repeated."""
    codes = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}.get(weight_format or "", torch.uint8)
    width = columns if weight_format in ("fp8", "int8") else columns // 2
    group_size = _FP8_GROUP_SIZE if weight_format == "fp8" else GROUP_SIZE
    groups = columns // group_size if columns % group_size == 0 else 1
    scale_dtype = torch.float32 if weight_format == "fp8" else torch.float16
    scales = torch.empty(rows, groups, device=device, dtype=scale_dtype)
    minimums = torch.empty_like(scales) if weight_format == "int4_min" else None
    kind = "int4" if weight_format == "int4_min" else weight_format
    assert kind is not None
    return QuantizedWeight(
        kind, torch.empty(rows, width, device=device, dtype=codes), scales, minimums
    )
