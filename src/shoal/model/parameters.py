"""The weights of a decoder as it uses them, and which tensor of a checkpoint fills which part.

    E hidden size   V vocabulary   H all heads with a q or k norm   D head size
    C rows of q, k and v, one after another   F rows of gate and up, one after the other

Norm weights are fp32 whatever the rest is; they are small and their sums are not. Knows nothing
of file formats: names come from `names.py`, values from a source.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from shoal.core.model_spec import ModelSpec
from shoal.model.names import TensorNames


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerParameters:
    """Weights of one layer; None where the spec has no such part."""

    attention_norm_E: Tensor
    qkv_CE: Tensor
    qkv_bias_C: Tensor | None
    qk_norm_HD: Tensor | None
    o_EC: Tensor
    o_bias_E: Tensor | None
    post_attention_norm_E: Tensor | None
    ffn_norm_E: Tensor
    gate_up_FE: Tensor
    gate_up_bias_F: Tensor | None
    down_EF: Tensor
    down_bias_E: Tensor | None
    post_ffn_norm_E: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DecoderParameters:
    """Weights of a decoder; `head_VE` is `embedding_VE` itself where they are tied."""

    embedding_VE: Tensor
    layers: tuple[LayerParameters, ...]
    final_norm_E: Tensor
    head_VE: Tensor

    @property
    def size_bytes(self) -> int:
        tensors = [self.embedding_VE, self.final_norm_E]
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
        target: as many values in the same order, often a view of a fused weight; or several
            rows of them, which get the same values (a norm that heads share).
    """

    name: str
    shape: tuple[int, ...]
    target: Tensor


def allocate(spec: ModelSpec, device: torch.device, dtype: torch.dtype) -> DecoderParameters:
    """Uninitialised weights in the shapes of the spec."""

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, device=device, dtype=dtype)

    def norm(*shape: int) -> Tensor:
        return torch.empty(shape, device=device, dtype=torch.float32)

    hidden_size, head_dim = spec.hidden_size, spec.head_dim
    num_rotated = spec.num_heads + spec.num_kv_heads
    qkv_rows = (num_rotated + spec.num_kv_heads) * head_dim

    def layer() -> LayerParameters:
        return LayerParameters(
            attention_norm_E=norm(hidden_size),
            qkv_CE=empty(qkv_rows, hidden_size),
            qkv_bias_C=empty(qkv_rows) if spec.qkv_bias else None,
            qk_norm_HD=norm(num_rotated, head_dim) if spec.qk_norm else None,
            o_EC=empty(hidden_size, spec.num_heads * head_dim),
            o_bias_E=empty(hidden_size) if spec.output_bias else None,
            post_attention_norm_E=norm(hidden_size) if spec.post_norms else None,
            ffn_norm_E=norm(hidden_size),
            gate_up_FE=empty(2 * spec.ffn_size, hidden_size),
            gate_up_bias_F=empty(2 * spec.ffn_size) if spec.mlp_bias else None,
            down_EF=empty(hidden_size, spec.ffn_size),
            down_bias_E=empty(hidden_size) if spec.mlp_bias else None,
            post_ffn_norm_E=norm(hidden_size) if spec.post_norms else None,
        )

    embedding_VE = empty(spec.vocab_size, hidden_size)
    return DecoderParameters(
        embedding_VE=embedding_VE,
        layers=tuple(layer() for _ in range(spec.num_layers)),
        final_norm_E=norm(hidden_size),
        head_VE=embedding_VE if spec.tied_embeddings else empty(spec.vocab_size, hidden_size),
    )


def placements(
    spec: ModelSpec, parameters: DecoderParameters, names: TensorNames
) -> Iterator[Placement]:
    """Every tensor the decoder needs, with the place it fills; together they fill everything."""
    yield _whole(names.top("embedding"), parameters.embedding_VE)
    for index, layer in enumerate(parameters.layers):
        yield from _attention_placements(spec, index, layer, names)
        yield from _mlp_placements(spec, index, layer, names)
    yield _whole(names.top("final_norm"), parameters.final_norm_E)
    if not spec.tied_embeddings:
        yield _whole(names.top("head"), parameters.head_VE)


def _attention_placements(
    spec: ModelSpec, index: int, layer: LayerParameters, names: TensorNames
) -> Iterator[Placement]:
    heads = {"q": spec.num_heads, "k": spec.num_kv_heads, "v": spec.num_kv_heads}
    rows = [num * spec.head_dim for num in heads.values()]
    for part, weight, bias in zip(
        heads, torch.split(layer.qkv_CE, rows), _split(layer.qkv_bias_C, rows), strict=True
    ):
        interleaved = names.interleaved and part != "v"
        yield _rotary(names.weight(index, part), weight, heads[part], interleaved)
        if bias is not None:
            yield _rotary(names.bias(index, part), bias, heads[part], interleaved)
    yield _whole(names.weight(index, "attention_norm"), layer.attention_norm_E)
    if layer.qk_norm_HD is not None:
        for part, norm_HD in zip(
            ("q_norm", "k_norm"),
            torch.split(layer.qk_norm_HD, [spec.num_heads, spec.num_kv_heads]),
            strict=True,
        ):
            yield Placement(names.weight(index, part), (spec.head_dim,), norm_HD)
    yield _whole(names.weight(index, "o"), layer.o_EC)
    if layer.o_bias_E is not None:
        yield _whole(names.bias(index, "o"), layer.o_bias_E)
    if layer.post_attention_norm_E is not None:
        yield _whole(names.weight(index, "post_attention_norm"), layer.post_attention_norm_E)


def _mlp_placements(
    spec: ModelSpec, index: int, layer: LayerParameters, names: TensorNames
) -> Iterator[Placement]:
    rows = [spec.ffn_size, spec.ffn_size]
    for part, weight, bias in zip(
        ("gate", "up"),
        torch.split(layer.gate_up_FE, rows),
        _split(layer.gate_up_bias_F, rows),
        strict=True,
    ):
        yield _whole(names.weight(index, part), weight)
        if bias is not None:
            yield _whole(names.bias(index, part), bias)
    yield _whole(names.weight(index, "ffn_norm"), layer.ffn_norm_E)
    yield _whole(names.weight(index, "down"), layer.down_EF)
    if layer.down_bias_E is not None:
        yield _whole(names.bias(index, "down"), layer.down_bias_E)
    if layer.post_ffn_norm_E is not None:
        yield _whole(names.weight(index, "post_ffn_norm"), layer.post_ffn_norm_E)


def _whole(name: str, target: Tensor) -> Placement:
    return Placement(name, tuple(target.shape), target)


def _rotary(name: str, target: Tensor, num_heads: int, interleaved: bool) -> Placement:
    """Rows (2i, 2i+1) of a head in the file are rows (i, i + D/2) here."""
    if not interleaved:
        return _whole(name, target)
    half = target.shape[0] // num_heads // 2
    by_pair = target.view(num_heads, 2, half, *target.shape[1:]).transpose(1, 2)
    return Placement(name, tuple(target.shape), by_pair)


def _split(tensor: Tensor | None, rows: list[int]) -> tuple[Tensor | None, ...]:
    return (None,) * len(rows) if tensor is None else torch.split(tensor, rows)
