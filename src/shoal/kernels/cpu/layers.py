"""A range of decoder layers and its ends, as the compiled library wants them.

    E hidden size   V vocabulary

Any shapes, any number of layers, any of a model's heads or columns: what is run is what is given.
Knows nothing of checkpoints.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from shoal.kernels.batch import KVCache
from shoal.kernels.cpu import library as c
from shoal.kernels.cpu.arena import PackedWeight

MAX_HEAD_DIM = 512

_ANY_WINDOW = 2**31 - 1

_ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}
_KV_FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
KV_DTYPES = frozenset(_KV_FORMATS)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedLayer:
    """Weights of a layer; vectors are fp32, biases padded to whole panels of their weight."""

    qkv: PackedWeight
    o: PackedWeight
    gate_up: PackedWeight
    down: PackedWeight
    qkv_bias: Tensor | None
    o_bias: Tensor | None
    gate_up_bias: Tensor | None
    down_bias: Tensor | None
    attention_norm: Tensor
    qk_norm: Tensor | None
    post_attention_norm: Tensor | None
    ffn_norm: Tensor
    post_ffn_norm: Tensor | None
    window: int | None
    rope: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedModel:
    """Layers, their shapes, and what stands before and after them.

    Attributes:
        inv_freqs: fp32 [ropes, head_dim / 2]; a layer's `rope` is a row of it.
        rope_factors: fp32 [ropes], multiplies cos and sin.
    """

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    activation: Literal["silu", "gelu_tanh"]
    norm_eps: float
    attention_scale: float
    attention_softcap: float | None
    layers: Sequence[PackedLayer]
    inv_freqs: Tensor
    rope_factors: Tensor
    final_norm: Tensor | None
    embedding: PackedWeight
    embedding_scale: float
    head: PackedWeight


class CompiledModel:
    """`PackedModel` in the library's structs; keeps it alive."""

    def __init__(self, packed: PackedModel) -> None:
        self._packed = packed
        self._layers = (c.Layer * len(packed.layers))(*map(_layer, packed.layers))
        self._model = c.Model(
            hidden=packed.hidden_size,
            num_heads=packed.num_heads,
            num_kv_heads=packed.num_kv_heads,
            head_dim=packed.head_dim,
            ffn=packed.ffn_size,
            activation=_ACTIVATIONS[packed.activation],
            num_layers=len(packed.layers),
            num_ropes=len(packed.inv_freqs),
            norm_eps=packed.norm_eps,
            attention_scale=packed.attention_scale,
            attention_softcap=packed.attention_softcap or 0.0,
            layers=self._layers,
            inv_freqs=packed.inv_freqs.data_ptr(),
            rope_factors=packed.rope_factors.data_ptr(),
            final_norm=_pointer(packed.final_norm),
        )
        self.head = packed.head
        self.embedding_scale = packed.embedding_scale
        self.hidden_size = packed.hidden_size
        self.c_embedding, self.c_head = packed.embedding.as_c(), packed.head.as_c()
        self._kv: tuple[KVCache, ctypes.Array[c.LayerKV]] | None = None

    def c_model(self, kv: KVCache) -> c.Model:
        self._model.kv_format = _KV_FORMATS[kv.layers[0].keys_NBHD.dtype]
        return self._model

    def c_kv(self, kv: KVCache) -> ctypes.Array[c.LayerKV]:
        if self._kv is None or self._kv[0] is not kv:
            layers = (
                c.LayerKV(
                    layer.keys_NBHD.data_ptr(),
                    layer.values_NBHD.data_ptr(),
                    _pointer(layer.key_scales_NBH),
                    _pointer(layer.value_scales_NBH),
                )
                for layer in kv.layers
            )
            self._kv = kv, (c.LayerKV * len(kv.layers))(*layers)
        return self._kv[1]


def _layer(layer: PackedLayer) -> c.Layer:
    return c.Layer(
        qkv=layer.qkv.as_c(),
        o=layer.o.as_c(),
        gate_up=layer.gate_up.as_c(),
        down=layer.down.as_c(),
        qkv_bias=_pointer(layer.qkv_bias),
        o_bias=_pointer(layer.o_bias),
        gate_up_bias=_pointer(layer.gate_up_bias),
        down_bias=_pointer(layer.down_bias),
        attention_norm=_pointer(layer.attention_norm),
        qk_norm=_pointer(layer.qk_norm),
        post_attention_norm=_pointer(layer.post_attention_norm),
        ffn_norm=_pointer(layer.ffn_norm),
        post_ffn_norm=_pointer(layer.post_ffn_norm),
        window=min(layer.window or 0, _ANY_WINDOW),
        rope=layer.rope,
    )


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
