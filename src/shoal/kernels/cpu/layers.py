"""A range of decoder layers and its ends, as the compiled library wants them.

    E hidden size   V vocabulary

Any shapes, any number of layers, any of a model's heads, columns or token ids, or none of them:
what is run is what is given. Knows nothing of checkpoints, nor of who the other ranks are.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from shoal.kernels.batch import KVCache
from shoal.kernels.cpu import library as c
from shoal.kernels.cpu.arena import PackedWeight
from shoal.kernels.cpu.experts import CompiledExperts, ExpertRules, PackedExperts

MAX_HEAD_DIM = 512

_ANY_WINDOW = 2**31 - 1

_ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}
_KV_FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
KV_DTYPES = frozenset(_KV_FORMATS)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedLayer:
    """Weights of a layer; vectors are fp32, biases padded to whole panels of their weight.

    Attributes:
        qkv, o: None without heads.
        gate_up, down: None without FFN columns.
        o_lead: columns of o before those of this rank's heads.
        experts: beside `gate_up` and `down`, if there are any of both.
    """

    qkv: PackedWeight | None
    o: PackedWeight | None
    gate_up: PackedWeight | None
    down: PackedWeight | None
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
    o_lead: int = 0
    experts: PackedExperts | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRanges:
    """What a rank must know of the others, where they split KV by token ranges.

    Attributes:
        num_ranks, rank: how many there are, and which this one is.
        num_heads, num_kv_heads: of all of them.
        first_head, first_kv_head: here.
    """

    num_ranks: int
    rank: int
    num_heads: int
    num_kv_heads: int
    first_head: int
    first_kv_head: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedModel:
    """Layers, their shapes, and what stands before and after them.

    Attributes:
        num_heads, num_kv_heads: of this rank; query heads of its first and of its last KV head may
            be missing.
        group_size: query heads of a KV head, on all ranks.
        head_offset: missing query heads of its first KV head.
        inv_freqs: fp32 [ropes, head_dim / 2]; a layer's `rope` is a row of it.
        rope_factors: fp32 [ropes], multiplies cos and sin.
        final_norm: None: layers end in the residual stream.
        embedding, head: of the token ids from first_id on; None: of none.
        reduce: address of a `shoal_reduce` and of its context; None: there is one rank.
        token_ranges: None: each rank keeps KV of its own heads.
        joint_norm_heads: q and k are normed over so many heads and KV heads together, on all ranks;
            None: each head by itself.
        expert_rules: None: no layer has experts.
    """

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    group_size: int
    head_offset: int
    activation: Literal["silu", "gelu_tanh"]
    norm_eps: float
    attention_scale: float
    attention_softcap: float | None
    layers: Sequence[PackedLayer]
    inv_freqs: Tensor
    rope_factors: Tensor
    final_norm: Tensor | None
    embedding: PackedWeight | None
    embedding_scale: float
    head: PackedWeight | None
    first_id: int = 0
    reduce: tuple[int, int] | None = None
    token_ranges: TokenRanges | None = None
    joint_norm_heads: tuple[int, int] | None = None
    expert_rules: ExpertRules | None = None


class CompiledModel:
    """`PackedModel` in the library's structs; keeps it alive.

    Attributes:
        c_embedding, c_head: None where it has none.
        num_ids: token ids that it gives logits of.
    """

    def __init__(self, packed: PackedModel) -> None:
        # Dealt experts come and go; all else is kept as long as this.
        self._packed = replace(
            packed, layers=[replace(each, experts=None) for each in packed.layers]
        )
        self._layers = (c.Layer * len(packed.layers))(*map(_layer, packed.layers))
        reduce, context = packed.reduce or (None, None)
        self._model = c.Model(
            hidden=packed.hidden_size,
            num_heads=packed.num_heads,
            num_kv_heads=packed.num_kv_heads,
            head_dim=packed.head_dim,
            ffn=max((each.down.cols for each in packed.layers if each.down), default=0),
            activation=_ACTIVATIONS[packed.activation],
            num_layers=len(packed.layers),
            num_ropes=len(packed.inv_freqs),
            group_size=packed.group_size,
            head_offset=packed.head_offset,
            attention_width=max((each.o.cols for each in packed.layers if each.o), default=0),
            norm_eps=packed.norm_eps,
            attention_scale=packed.attention_scale,
            attention_softcap=packed.attention_softcap or 0.0,
            inv_freqs=packed.inv_freqs.data_ptr(),
            rope_factors=packed.rope_factors.data_ptr(),
            reduce=reduce,
            reduce_context=context,
        )
        if (ranges := packed.token_ranges) is not None:
            self._model.num_ranks, self._model.rank = ranges.num_ranks, ranges.rank
            self._model.all_heads = ranges.num_heads
            self._model.all_kv_heads = ranges.num_kv_heads
            self._model.first_head = ranges.first_head
            self._model.first_kv_head = ranges.first_kv_head
        self._model.norm_heads, self._model.norm_kv_heads = packed.joint_norm_heads or (0, 0)
        if packed.expert_rules is not None:
            self._set_rules(packed.expert_rules)
        self._experts: dict[int, CompiledExperts] = {}
        for index, layer in enumerate(packed.layers):
            if layer.experts is not None:
                self.deal(index, layer.experts)
        self._final_norm = _pointer(packed.final_norm)
        self.num_ids = 0 if packed.head is None else packed.head.rows
        self.embedding_scale = packed.embedding_scale
        self.first_id = packed.first_id
        self.hidden_size = packed.hidden_size
        self.c_embedding, self.c_head = _reference(packed.embedding), _reference(packed.head)
        self._kv: tuple[KVCache, ctypes.Array[c.LayerKV]] | None = None

    def deal(self, index: int, experts: PackedExperts) -> None:
        """From the next call on a layer has these; between calls."""
        compiled = CompiledExperts(experts)
        self._layers[index].experts = ctypes.pointer(compiled.struct)
        self._experts[index] = compiled

    def call(self, routed: int | None, returned: int | None) -> None:
        """From the next call on, call back to these addresses (`PythonExchange`); between calls."""
        self._model.routed, self._model.returned = routed, returned

    def bring(self, address: int) -> None:
        """Experts are brought into memory by what is there (`PythonBring`), before they run."""
        for experts in self._experts.values():
            experts.struct.bring = address

    def c_experts(self, index: int) -> tuple[c.Model, c.Experts]:
        """Those of a layer, to be run by themselves."""
        return self._model, self._experts[index].struct

    def _set_rules(self, rules: ExpertRules) -> None:
        model = self._model
        model.num_experts, model.num_active = rules.num_experts, rules.num_active
        model.num_expert_groups = rules.num_groups
        model.num_active_groups = rules.num_active_groups
        model.renormalises, model.expert_scale = rules.renormalises, rules.scale
        model.expert_ffn = rules.ffn_size

    def c_model(self, kv: KVCache, first: int, last: int, ends: bool) -> c.Model:
        """Layers [first, last), with the final norm if `ends`."""
        model = self._model
        if kv.layers:
            model.kv_format = _KV_FORMATS[kv.layers[0].keys_NBHD.dtype]
        model.num_layers = last - first
        if first < last:
            model.layers = ctypes.pointer(self._layers[first])
        model.final_norm = self._final_norm if ends else None
        return model

    def c_kv(self, kv: KVCache, first: int) -> c.LayerKV | None:
        """The layers' KV from the first on; None past the last."""
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
        return self._kv[1][first] if first < len(kv.layers) else None


def _layer(layer: PackedLayer) -> c.Layer:
    return c.Layer(
        qkv=_weight(layer.qkv),
        o=_weight(layer.o),
        gate_up=_weight(layer.gate_up),
        down=_weight(layer.down),
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
        o_lead=layer.o_lead,
    )


def _weight(weight: PackedWeight | None) -> c.Weight:
    return c.Weight() if weight is None else weight.as_c()


def _reference(weight: PackedWeight | None) -> ctypes._Pointer[c.Weight] | None:
    return None if weight is None else ctypes.pointer(weight.as_c())


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
