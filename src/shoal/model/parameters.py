"""The weights of a decoder as it uses them: shapes of a shard, and room for them.

    E hidden size   V vocabulary   H all heads with a q or k norm   D head size
    C rows of q, k and v, one after another   F rows of gate and up, one after the other

Every size is the shard's own: its heads and the KV heads that they read, its FFN columns, its
token ids. Norm weights are fp32 whatever the rest is; they are small and their sums are not.
Packed weights (kernels/cpu) lie in an arena in the order they are read, and gate and up in turn,
16 rows each. Knows nothing of files: what fills the weights is for `placements.py` to say.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from shoal.core.model_spec import ModelSpec
from shoal.core.split import Range, Shard
from shoal.kernels.cpu.arena import LANES, Arena, PackedFormat, PackedWeight
from shoal.kernels.quantized import GROUP_SIZE, QuantizedWeight
from shoal.model.precision import Format, LayerFormats, WeightFormats

Weight = Tensor | QuantizedWeight | PackedWeight

_FP8_GROUP_SIZE = 128  # as in checkpoints with a scale for every 128 x 128 block


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerParameters:
    """Weights of one layer; None where the spec has no such part, or the shard nothing of it.

    A shard without heads has no qkv and o, one without FFN columns no gate, up and down; biases
    of o and down are the first shard's. o may have columns more than the shard's heads, at both
    ends, where their edges lie inside a group of quantised columns: the heads' range, snapped.
    """

    attention_norm_E: Tensor
    qkv_CE: Weight | None
    qkv_bias_C: Tensor | None
    qk_norm_HD: Tensor | None
    o_EC: Weight | None
    o_bias_E: Tensor | None
    post_attention_norm_E: Tensor | None
    ffn_norm_E: Tensor
    gate_up_FE: Weight | None
    gate_up_bias_F: Tensor | None
    down_EF: Weight | None
    down_bias_E: Tensor | None
    post_ffn_norm_E: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DecoderParameters:
    """Weights of a decoder's shard; `head_VE` is `embedding_VE` itself where they are tied.

    Without an embedding, a head, or token ids of its own, a shard has None of them.
    """

    embedding_VE: Weight | None
    layers: tuple[LayerParameters, ...]
    final_norm_E: Tensor | None
    head_VE: Weight | None

    @property
    def size_bytes(self) -> int:
        tensors: list[Weight | None] = [self.embedding_VE, self.final_norm_E]
        if self.head_VE is not self.embedding_VE:
            tensors.append(self.head_VE)
        for layer in self.layers:
            tensors += [getattr(layer, each.name) for each in fields(layer)]
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


@dataclass(frozen=True, slots=True, eq=False)
class Placement:
    """A tensor of the checkpoint and the place that a range of it goes to.

    Attributes:
        name: in the checkpoint.
        shape: of all of it, there.
        target: what holds the range, perhaps among others.
        places: int64, the target's row for each row of the range; None: it goes to every row (a
            norm that heads share).
        start: first row of the range.
        columns: of the range; None: all.
    """

    name: str
    shape: tuple[int, ...]
    target: Weight
    places: Tensor | None
    start: int = 0
    columns: Range | None = None

    @property
    def num_rows(self) -> int:
        return self.shape[0] if self.places is None else len(self.places)


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

    def weight(self, weight_format: Format, rows: int, columns: int, granule: int) -> Weight | None:
        """None for nothing; `granule`: `granule_of` the whole weight."""
        if not rows or not columns:
            return None
        if self._arena is not None:
            return self._arena.take(packed_format(weight_format, self._dtype), rows, columns)
        if weight_format is None:
            return self._empty(self._dtype, rows, columns)
        return _quantized(weight_format, rows, columns, granule, self._device)

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


def granule_of(weight_format: Format | PackedFormat, columns: int, packed: bool) -> int:
    """Where a weight may be cut along its columns: between groups that share a scale.

    Args:
        columns: of the whole weight.
        packed: fp8 has no scales then.
    """
    if weight_format in ("int8", "int4", "int4_min"):
        return GROUP_SIZE
    if weight_format == "fp8" and not packed and columns % _FP8_GROUP_SIZE == 0:
        return _FP8_GROUP_SIZE
    return 1  # floats, and fp8 with one scale a row


def head_columns(spec: ModelSpec, shard: Shard, granule: int) -> Range:
    """Columns of o that a shard holds: those of its heads, and what shares a group with them."""
    heads = Range(shard.heads.start * spec.head_dim, shard.heads.stop * spec.head_dim)
    return heads.snapped(granule)


def held_head_columns(spec: ModelSpec, shard: Shard, o_EC: Weight) -> Range:
    """Columns of o that a shard's weight holds."""
    weight_format = None if isinstance(o_EC, Tensor) else o_EC.format
    packed, columns = isinstance(o_EC, PackedWeight), spec.num_heads * spec.head_dim
    return head_columns(spec, shard, granule_of(weight_format, columns, packed))


def weight_shapes(
    spec: ModelSpec, shard: Shard, formats: LayerFormats, packed: bool
) -> dict[str, tuple[int, int]]:
    """Rows and columns of a layer's weights; 0 of either where the shard has none."""
    ffn = len(shard.ffn)
    heads = len(shard.heads) + 2 * len(shard.kv_heads(spec))
    granule = granule_of(formats.o, spec.num_heads * spec.head_dim, packed)
    return {
        "qkv": (heads * spec.head_dim, spec.hidden_size),
        "o": (spec.hidden_size, len(head_columns(spec, shard, granule))),
        "gate_up": (2 * (_whole_panels(ffn) if packed else ffn), spec.hidden_size),
        "down": (spec.hidden_size, ffn),
    }


def table_formats(spec: ModelSpec, shard: Shard, formats: WeightFormats) -> dict[str, Format]:
    """The tables that a shard holds, and their formats; a tied one serves as both."""
    wanted: dict[str, Format] = {}
    if shard.has_head:
        wanted["head"] = formats.head
    if shard.has_embedding and not (shard.has_head and spec.tied_embeddings):
        wanted["embedding"] = formats.embedding
    return wanted


def allocate(
    spec: ModelSpec, shard: Shard, formats: WeightFormats, allocator: Allocator
) -> DecoderParameters:
    """Uninitialised weights in the shapes of the shard, in the order they are read."""
    layers = tuple(
        _layer(spec, shard, formats.layers[index], allocator)
        for index in range(shard.layers.start, shard.layers.stop)
    )
    rows, columns = len(shard.vocab), spec.hidden_size
    tables = {
        name: allocator.weight(each, rows, columns, granule_of(each, columns, allocator.is_packed))
        for name, each in table_formats(spec, shard, formats).items()
    }
    head_VE = tables.get("head")
    return DecoderParameters(
        embedding_VE=tables.get("embedding", head_VE if shard.has_embedding else None),
        layers=layers,
        final_norm_E=allocator.norm(spec.hidden_size) if shard.has_head else None,
        head_VE=head_VE,
    )


def _layer(
    spec: ModelSpec, shard: Shard, formats: LayerFormats, allocator: Allocator
) -> LayerParameters:
    shapes = weight_shapes(spec, shard, formats, allocator.is_packed)
    whole_columns = {
        "qkv": spec.hidden_size,
        "o": spec.num_heads * spec.head_dim,
        "gate_up": spec.hidden_size,
        "down": spec.ffn_size,
    }

    def weight(part: str) -> Weight | None:
        weight_format: Format = getattr(formats, part)
        granule = granule_of(weight_format, whole_columns[part], allocator.is_packed)
        return allocator.weight(weight_format, *shapes[part], granule)

    def bias(part: str, wanted: bool) -> Tensor | None:
        rows = shapes[part][0]
        return allocator.bias(rows) if wanted and rows else None

    def norm(wanted: bool = True) -> Tensor | None:
        return allocator.norm(spec.hidden_size) if wanted else None

    num_rotated = len(shard.heads) + len(shard.kv_heads(spec))
    has_qk_norm = spec.qk_norm and bool(num_rotated)
    return LayerParameters(
        attention_norm_E=allocator.norm(spec.hidden_size),
        qkv_CE=weight("qkv"),
        qkv_bias_C=bias("qkv", spec.qkv_bias),
        qk_norm_HD=allocator.norm(num_rotated, spec.head_dim) if has_qk_norm else None,
        o_EC=weight("o"),
        o_bias_E=bias("o", spec.output_bias and shard.is_first),
        post_attention_norm_E=norm(spec.post_norms),
        ffn_norm_E=allocator.norm(spec.hidden_size),
        gate_up_FE=weight("gate_up"),
        gate_up_bias_F=bias("gate_up", spec.mlp_bias),
        down_EF=weight("down"),
        down_bias_E=bias("down", spec.mlp_bias and shard.is_first),
        post_ffn_norm_E=norm(spec.post_norms),
    )


def _whole_panels(rows: int) -> int:
    return -(-rows // LANES) * LANES


def _quantized(
    weight_format: Format, rows: int, columns: int, granule: int, device: torch.device
) -> QuantizedWeight:
    """Groups as small as any we keep; coarser ones of a checkpoint are repeated."""
    codes = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}.get(weight_format or "", torch.uint8)
    width = columns if weight_format in ("fp8", "int8") else columns // 2
    groups = columns // granule if granule > 1 else 1
    scale_dtype = torch.float32 if weight_format == "fp8" else torch.float16
    scales = torch.empty(rows, groups, device=device, dtype=scale_dtype)
    minimums = torch.empty_like(scales) if weight_format == "int4_min" else None
    kind = "int4" if weight_format == "int4_min" else weight_format
    assert kind is not None
    return QuantizedWeight(
        kind, torch.empty(rows, width, device=device, dtype=codes), scales, minimums
    )
