"""Room for the weights of a shard: their shapes, and where they lie.

Packed weights (kernels/cpu) lie in an arena in the order they are read, and gate and up in turn,
16 rows each. Experts lie one below the other. Knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from shoal.core.model_spec import ModelSpec
from shoal.core.split import ExpertShare, Shard
from shoal.kernels.cpu.arena import LANES, Arena, ArenaSize, PackedFormat
from shoal.kernels.experts import ExpertWeights, rows_of, slots
from shoal.kernels.quantized import GROUP_SIZE, QuantizedWeight
from shoal.model.flat import Flat, FlatSize
from shoal.model.parameters import (
    DecoderParameters,
    ExpertParameters,
    LatentParameters,
    LayerParameters,
    Weight,
    granule_of,
    head_columns,
)
from shoal.model.precision import Format, LayerFormats, WeightFormats


class Allocator:
    """Makes room for weights: plain tensors, or packed in an arena (of floats in `dtype`).

    Args:
        flat: where plain tensors lie together; None: each has memory of its own on the device.
    """

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        arena: Arena | ArenaSize | None = None,
        flat: Flat | FlatSize | None = None,
    ) -> None:
        self._device = device
        self._dtype = dtype
        self._arena = arena
        self._flat = flat

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
        return _quantized(weight_format, rows, columns, granule, self._empty)

    def bias(self, rows: int) -> Tensor:
        """Packed weights add fp32, a whole panel at a time."""
        if self._arena is None:
            return self._empty(self._dtype, rows)
        return torch.zeros(_whole_panels(rows))

    def norm(self, *shape: int) -> Tensor:
        return self._empty(torch.float32, *shape)

    def _empty(self, dtype: torch.dtype, *shape: int) -> Tensor:
        if self._flat is not None:
            return self._flat.take(dtype, shape)
        return torch.empty(shape, device=self._device, dtype=dtype)


def packed_format(weight_format: Format, dtype: torch.dtype) -> PackedFormat:
    """How packed weights keep a format; fp8 is kept in bf16, which holds its values."""
    if weight_format == "fp8" or (weight_format is None and dtype == torch.bfloat16):
        return "bfloat16"
    return "float32" if weight_format is None else weight_format


def weight_shapes(
    spec: ModelSpec, shard: Shard, formats: LayerFormats, layer: int, packed: bool
) -> dict[str, tuple[int, int]]:
    """Rows and columns of a layer's weights; 0 of either where the shard has none."""
    ffn = len(shard.mlp_columns(spec, layer))
    granule = granule_of(formats.o, spec.num_heads * spec.value_dim, packed)
    shapes = {
        "qkv": (_qkv_rows(spec, shard), spec.hidden_size),
        "o": (spec.hidden_size, len(head_columns(spec, shard, granule))),
        "gate_up": (2 * (_whole_panels(ffn) if packed else ffn), spec.hidden_size),
        "down": (spec.hidden_size, ffn),
    }
    if (latent := spec.latent) is not None:
        heads = len(shard.heads)
        shapes["latent_q"] = (heads * spec.head_dim, latent.query_rank or 0)
        shapes["latent_kv"] = (heads * (latent.plain_dim + latent.value_dim), latent.kv_rank)
    if (experts := spec.experts) is not None:
        rows = _whole_panels(experts.ffn_size) if packed else experts.ffn_size
        shapes["expert_gate_up"] = (2 * rows, spec.hidden_size)
        shapes["expert_down"] = (spec.hidden_size, experts.ffn_size)
    return shapes


def _qkv_rows(spec: ModelSpec, shard: Shard) -> int:
    heads = len(shard.heads)
    if spec.latent is None:
        return (heads + 2 * len(shard.kv_heads(spec))) * spec.head_dim
    queries = spec.latent.query_rank or heads * spec.head_dim
    return queries + spec.latent.kv_rank + spec.latent.rope_dim if heads else 0


def table_formats(spec: ModelSpec, shard: Shard, formats: WeightFormats) -> dict[str, Format]:
    """The tables that a shard holds, and their formats; a tied one serves as both."""
    wanted: dict[str, Format] = {}
    if shard.has_head:
        wanted["head"] = formats.head
    if shard.has_embedding and not (shard.has_head and spec.tied_embeddings):
        wanted["embedding"] = formats.embedding
    return wanted


def allocate(
    spec: ModelSpec,
    shard: Shard,
    formats: WeightFormats,
    allocator: Allocator,
    of_layer: Callable[[int], Allocator] | None = None,
    of_experts: Callable[[int], Allocator] | None = None,
) -> DecoderParameters:
    """Uninitialised weights in the shapes of the shard, in the order they are read.

    Args:
        of_layer: makes room for a layer, counted from the shard's first; None: `allocator` does.
        of_experts: for its experts; None: who makes room for the layer does.
    """
    layers = tuple(
        allocate_layer(
            spec,
            shard,
            formats.layers[index],
            index,
            of_layer(local) if of_layer else allocator,
            of_experts(local) if of_experts else None,
        )
        for local, index in enumerate(range(shard.layers.start, shard.layers.stop))
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


def allocate_layer(
    spec: ModelSpec,
    shard: Shard,
    formats: LayerFormats,
    layer: int,
    allocator: Allocator,
    of_experts: Allocator | None = None,
) -> LayerParameters:
    """As `allocate`, one layer of the model."""
    shapes = weight_shapes(spec, shard, formats, layer, allocator.is_packed)
    whole_columns = {
        "qkv": spec.hidden_size,
        "o": spec.num_heads * spec.value_dim,
        "gate_up": spec.hidden_size,
        "down": spec.mlp_size(layer),
    }

    def weight(part: str) -> Weight | None:
        weight_format: Format = getattr(formats, part)
        granule = granule_of(weight_format, whole_columns[part], allocator.is_packed)
        if part == "down" and spec.layers[layer].has_experts:
            granule = min(granule, GROUP_SIZE)  # where `mlp_columns` cuts it
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
        latent=_latent(spec, formats, shapes, allocator),
        o_EC=weight("o"),
        o_bias_E=bias("o", spec.output_bias and shard.is_first),
        post_attention_norm_E=norm(spec.post_norms),
        ffn_norm_E=allocator.norm(spec.hidden_size),
        gate_up_FE=weight("gate_up"),
        gate_up_bias_F=bias("gate_up", spec.mlp_bias),
        down_EF=weight("down"),
        down_bias_E=bias("down", spec.mlp_bias and shard.is_first),
        post_ffn_norm_E=norm(spec.post_norms),
        experts=_experts(spec, shard, formats, layer, allocator, of_experts or allocator),
    )


def _latent(
    spec: ModelSpec,
    formats: LayerFormats,
    shapes: dict[str, tuple[int, int]],
    allocator: Allocator,
) -> LatentParameters | None:
    latent = spec.latent
    if latent is None or not shapes["qkv"][0]:
        return None

    def weight(part: str) -> Weight | None:
        weight_format: Format = getattr(formats, part)
        granule = granule_of(weight_format, shapes[part][1], allocator.is_packed)
        return allocator.weight(weight_format, *shapes[part], granule)

    kv_CR = weight("latent_kv")
    assert kv_CR is not None, "a shard with heads has keys and values"
    return LatentParameters(
        q_CR=weight("latent_q"),
        q_norm_R=allocator.norm(latent.query_rank) if latent.query_rank else None,
        kv_CR=kv_CR,
        kv_norm_R=allocator.norm(latent.kv_rank),
    )


def _experts(
    spec: ModelSpec,
    shard: Shard,
    formats: LayerFormats,
    layer: int,
    allocator: Allocator,
    of_experts: Allocator,
) -> ExpertParameters | None:
    if spec.experts is None or not spec.layers[layer].has_experts:
        return None
    has_shared_gate = spec.experts.shared_gate and len(shard.mlp_columns(spec, layer)) > 0
    return allocate_experts(
        spec,
        formats,
        shard.experts_of(layer),
        of_experts,
        router_XE=allocator.norm(spec.experts.num_experts, spec.hidden_size),
        shared_gate_E=allocator.norm(spec.hidden_size) if has_shared_gate else None,
    )


def allocate_experts(
    spec: ModelSpec,
    formats: LayerFormats,
    shares: tuple[ExpertShare, ...],
    allocator: Allocator,
    *,
    router_XE: Tensor,
    shared_gate_E: Tensor | None,
) -> ExpertParameters:
    """Room for some experts of a layer: packed each by itself, else one below the other."""
    assert spec.experts is not None
    ffn, hidden = spec.experts.ffn_size, spec.hidden_size
    packed, count = allocator.is_packed, len(shares)
    rows = 2 * (_whole_panels(ffn) if packed else ffn)
    granule = granule_of(formats.expert_gate_up, hidden, packed)
    down_granule = granule_of(formats.expert_down, ffn, packed)
    gate_ups: list[Weight | None]
    downs: list[Weight | None]
    gate_ups, downs, stack = [], [], None
    if packed:
        for _ in shares:
            gate_ups.append(allocator.weight(formats.expert_gate_up, rows, hidden, granule))
            downs.append(allocator.weight(formats.expert_down, hidden, ffn, down_granule))
    elif count:
        gate_up = allocator.weight(formats.expert_gate_up, count * rows, hidden, granule)
        down = allocator.weight(formats.expert_down, count * hidden, ffn, down_granule)
        assert isinstance(gate_up, Tensor | QuantizedWeight)
        assert isinstance(down, Tensor | QuantizedWeight)
        places = [(each.expert, each.start, each.stop) for each in shares]
        slots_X3 = slots(spec.experts.num_experts, places).to(router_XE.device)
        stack = ExpertWeights(slots_X3, gate_up, down)
        gate_ups += [rows_of(gate_up, n * rows, (n + 1) * rows) for n in range(count)]
        downs += [rows_of(down, n * hidden, (n + 1) * hidden) for n in range(count)]
    return ExpertParameters(
        shares=shares,
        router_XE=router_XE,
        gate_up_FE=tuple(each for each in gate_ups if each is not None),
        down_EF=tuple(each for each in downs if each is not None),
        shared_gate_E=shared_gate_E,
        stack=stack,
    )


def _whole_panels(rows: int) -> int:
    return -(-rows // LANES) * LANES


def _quantized(
    weight_format: Format, rows: int, columns: int, granule: int, empty: Callable[..., Tensor]
) -> QuantizedWeight:
    """Groups as small as any we keep; coarser ones of a checkpoint are repeated."""
    codes = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}.get(weight_format or "", torch.uint8)
    width = columns if weight_format in ("fp8", "int8") else columns // 2
    groups = columns // granule if granule > 1 else 1
    scale_dtype = torch.float32 if weight_format == "fp8" else torch.float16
    scales = empty(scale_dtype, rows, groups)
    minimums = empty(scale_dtype, rows, groups) if weight_format == "int4_min" else None
    kind = "int4" if weight_format == "int4_min" else weight_format
    assert kind is not None
    return QuantizedWeight(kind, empty(codes, rows, width), scales, minimums)
