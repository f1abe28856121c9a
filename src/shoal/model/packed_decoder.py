"""A decoder that runs through the compiled CPU path: all layers in one call.

    T tokens of all rows   N rows of hidden states   E hidden size   V vocabulary

It computes what `decoder.py` defines, in fp32 with weights and KV as they are kept; inputs of
int8 and int4 weights are rounded to int8 in groups of 32. No I/O, no names of models or files.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from shoal.core.model_spec import ModelSpec
from shoal.kernels import KVCache
from shoal.kernels.cpu.arena import PackedWeight
from shoal.kernels.cpu.layers import CompiledModel, PackedLayer, PackedModel
from shoal.kernels.cpu.step import HostBatch, Session, StepOutput
from shoal.model.parameters import DecoderParameters, LayerParameters, Weight
from shoal.model.rope import attention_factor, inverse_frequencies


class PackedDecoder:
    """A decoder with packed weights.

    Args:
        session: whose threads run it.
        dtype: of weights that are not quantised, and of KV unless said otherwise.
        precision: of the weights, for people; None: `dtype`.
    """

    def __init__(
        self,
        spec: ModelSpec,
        parameters: DecoderParameters,
        session: Session,
        dtype: torch.dtype,
        precision: str | None = None,
    ) -> None:
        self.spec = spec
        self.dtype = dtype
        self.precision = precision or str(dtype).removeprefix("torch.")
        self.device = torch.device("cpu")
        self.weight_bytes = parameters.size_bytes
        self._session = session
        self._head = _packed(parameters.head_VE)
        self._model = CompiledModel(_model(spec, parameters, dtype))

    def forward(self, token_ids: array[int], batch: HostBatch, kv: KVCache) -> Tensor:
        """Hidden states [T, E] after the final norm; writes the tokens' KV on the way."""
        out = self._session.forward(self._model, token_ids, batch, kv, array("q"))
        return out.hidden_TE.clone()  # the session's own are overwritten by its next step

    def step(
        self, token_ids: array[int], batch: HostBatch, kv: KVCache, samples: array[int]
    ) -> StepOutput:
        """As `forward`, with the logits of some tokens (indices into the batch)."""
        out = self._session.forward(self._model, token_ids, batch, kv, samples)
        if self.spec.final_softcap is None:
            return out
        return replace(out, logits_NV=self._capped(out.logits_NV))

    def logits(self, hidden_NE: Tensor) -> Tensor:
        """fp32 logits [N, V] of the tokens that follow."""
        return self._capped(self._session.linear(hidden_NE, self._head))

    def add_noise(self, logits_RV: Tensor, seeds: Sequence[int], positions: Sequence[int]) -> None:
        """As `draw.add_noise`, on the session's threads."""
        self._session.add_noise(logits_RV, seeds, positions)

    def _capped(self, logits_NV: Tensor) -> Tensor:
        cap = self.spec.final_softcap
        return logits_NV if cap is None else (logits_NV / cap).tanh_().mul_(cap)


def _model(spec: ModelSpec, parameters: DecoderParameters, dtype: torch.dtype) -> PackedModel:
    ropes = list(dict.fromkeys(layer.rope for layer in spec.layers))
    return PackedModel(
        hidden_size=spec.hidden_size,
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        ffn_size=spec.ffn_size,
        activation=spec.activation,
        norm_eps=spec.norm_eps,
        attention_scale=spec.attention_scale,
        attention_softcap=spec.attention_softcap,
        layers=[
            _layer(each, layer.window, ropes.index(layer.rope))
            for each, layer in zip(parameters.layers, spec.layers, strict=True)
        ],
        inv_freqs=torch.stack([inverse_frequencies(rope, spec.head_dim) for rope in ropes]),
        rope_factors=torch.tensor([attention_factor(rope) for rope in ropes]),
        final_norm=parameters.final_norm_E,
        embedding=_packed(parameters.embedding_VE),
        # Gemma was trained with the scale rounded to the weights' precision.
        embedding_scale=torch.tensor(spec.embedding_scale, dtype=dtype).item(),
        head=_packed(parameters.head_VE),
    )


def _layer(layer: LayerParameters, window: int | None, rope: int) -> PackedLayer:
    return PackedLayer(
        qkv=_packed(layer.qkv_CE),
        o=_packed(layer.o_EC),
        gate_up=_packed(layer.gate_up_FE),
        down=_packed(layer.down_EF),
        qkv_bias=layer.qkv_bias_C,
        o_bias=layer.o_bias_E,
        gate_up_bias=layer.gate_up_bias_F,
        down_bias=layer.down_bias_E,
        attention_norm=layer.attention_norm_E,
        qk_norm=layer.qk_norm_HD,
        post_attention_norm=layer.post_attention_norm_E,
        ffn_norm=layer.ffn_norm_E,
        post_ffn_norm=layer.post_ffn_norm_E,
        window=window,
        rope=rope,
    )


def _packed(weight: Weight) -> PackedWeight:
    assert isinstance(weight, PackedWeight)
    return weight
