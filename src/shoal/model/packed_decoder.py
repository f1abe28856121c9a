"""A decoder that runs through the compiled CPU path: a range of layers in one call.

    T tokens of all rows   N rows of hidden states   E hidden size   V this rank's token ids

It computes what `decoder.py` defines, in fp32 with weights and KV as they are kept; inputs of
int8 and int4 weights are rounded to int8 in groups of 32. Ranks meet inside the call, once after
the embedding and twice a layer. No I/O, no names of models or files.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from shoal.comm import Group
from shoal.core.errors import CommError
from shoal.core.model_spec import LayerSpec, ModelSpec
from shoal.core.split import Range, Shard
from shoal.kernels import KVCache
from shoal.kernels.cpu.arena import GROUP, PackedWeight
from shoal.kernels.cpu.layers import CompiledModel, PackedLayer, PackedModel
from shoal.kernels.cpu.reduce import PythonReduce
from shoal.kernels.cpu.step import HostBatch, ReduceError, Session, StepOutput
from shoal.model.parameters import DecoderParameters, LayerParameters, Weight
from shoal.model.rope import attention_factor, inverse_frequencies


class PackedDecoder:
    """A shard of a decoder, with packed weights.

    Args:
        spec: of the whole model.
        parameters: of the shard.
        session: whose threads run it.
        dtype: of weights that are not quantised, and of KV unless said otherwise.
        precision: of the weights, for people; None: `dtype`.
        group: the ranks that hold the other shards; None if there are none.
    """

    hidden_dtype = torch.float32

    def __init__(
        self,
        spec: ModelSpec,
        parameters: DecoderParameters,
        session: Session,
        dtype: torch.dtype,
        precision: str | None = None,
        *,
        shard: Shard,
        group: Group | None = None,
    ) -> None:
        assert (1 if group is None else group.size) == shard.num_ranks, (
            "a group is the shard's ranks"
        )
        self.spec = spec
        self.shard = shard
        self.dtype = dtype
        self.precision = precision or str(dtype).removeprefix("torch.")
        self.device = torch.device("cpu")
        self.weight_bytes = parameters.size_bytes
        self._session = session
        self._head = _packed(parameters.head_VE)
        self._group = group
        self._reduce: PythonReduce | None = None
        self._model = CompiledModel(_model(spec, shard, parameters, dtype, self._native_reduce()))

    def forward(
        self,
        inputs: array[int] | Tensor,
        batch: HostBatch,
        kv: KVCache,
        layers: Range | None = None,
    ) -> Tensor:
        """Hidden states [T, E] after some layers; writes the tokens' KV on the way.

        Args:
            inputs: token ids where the model's first layer is the first to run and this shard
                embeds, else hidden states [T, E] in fp32.
            kv: of all layers of the shard.
            layers: of the model, a part of the shard's; None: all of those.

        Returns:
            After the final norm if the model's last layer is the last to run and this shard makes
            logits, else what the next layer takes.

        Raises:
            CommError: another rank did not come, or the pass was aborted.
        """
        out = self._run(inputs, batch, kv, array("q"), layers)
        return out.hidden_TE.clone()  # the session's own are overwritten by its next step

    def step(
        self,
        inputs: array[int] | Tensor,
        batch: HostBatch,
        kv: KVCache,
        samples: array[int],
        layers: Range | None = None,
    ) -> StepOutput:
        """As `forward`, with the logits of some tokens (indices into the batch)."""
        out = self._run(inputs, batch, kv, samples, layers)
        if self.spec.final_softcap is None:
            return out
        return replace(out, logits_NV=self._capped(out.logits_NV))

    def logits(self, hidden_NE: Tensor) -> Tensor:
        """fp32 logits [N, V] of the tokens that follow."""
        if self._head is None:
            return hidden_NE.new_empty(len(hidden_NE), 0)
        return self._capped(self._session.linear(hidden_NE, self._head))

    def add_noise(
        self,
        logits_RV: Tensor,
        seeds: Sequence[int],
        positions: Sequence[int],
        first_id: int = 0,
    ) -> None:
        """As `draw.add_noise`, on the session's threads."""
        self._session.add_noise(logits_RV, seeds, positions, first_id)

    def _run(
        self,
        inputs: array[int] | Tensor,
        batch: HostBatch,
        kv: KVCache,
        samples: array[int],
        layers: Range | None,
    ) -> StepOutput:
        spec, shard = self.spec, self.shard
        layers = shard.layers if layers is None else layers
        embeds = layers.start == 0 and shard.has_embedding
        ends = layers.stop == spec.num_layers and shard.has_head
        assert shard.layers.holds(layers), f"{layers} are not all here: {shard.layers}"
        assert isinstance(inputs, Tensor) != embeds, "token ids go into an embedding alone"
        assert ends or not samples, "logits follow the last layer, where the head is"
        own = layers.start - shard.layers.start, layers.stop - shard.layers.start
        try:
            return self._session.forward(self._model, inputs, batch, kv, samples, own, ends)
        except ReduceError as error:
            cause = self._reduce.take_error() if self._reduce else None
            if cause is not None:
                raise cause from None
            raise CommError(
                f"{error}: another rank did not come in time, or the step was aborted; the "
                "instance must begin anew"
            ) from None

    def _native_reduce(self) -> tuple[int, int] | None:
        if self._group is None:
            return None
        native = self._group.native
        if native is not None:
            return native.function, native.context
        self._reduce = PythonReduce(self._group.all_reduce)
        return self._reduce.address, 0

    def _capped(self, logits_NV: Tensor) -> Tensor:
        cap = self.spec.final_softcap
        return logits_NV if cap is None else (logits_NV / cap).tanh_().mul_(cap)


def _model(
    spec: ModelSpec,
    shard: Shard,
    parameters: DecoderParameters,
    dtype: torch.dtype,
    reduce: tuple[int, int] | None,
) -> PackedModel:
    ropes = list(dict.fromkeys(layer.rope for layer in spec.layers))
    layers = spec.layers[shard.layers.start : shard.layers.stop]
    return PackedModel(
        hidden_size=spec.hidden_size,
        num_heads=len(shard.heads),
        num_kv_heads=len(shard.kv_heads(spec)),
        head_dim=spec.head_dim,
        group_size=spec.num_heads // spec.num_kv_heads,
        head_offset=shard.head_offset(spec),
        ffn_size=len(shard.ffn),
        activation=spec.activation,
        norm_eps=spec.norm_eps,
        attention_scale=spec.attention_scale,
        attention_softcap=spec.attention_softcap,
        layers=[
            _layer(each, layer, ropes.index(layer.rope), spec, shard)
            for each, layer in zip(parameters.layers, layers, strict=True)
        ],
        inv_freqs=torch.stack([inverse_frequencies(rope, spec.head_dim) for rope in ropes]),
        rope_factors=torch.tensor([attention_factor(rope) for rope in ropes]),
        final_norm=parameters.final_norm_E,
        embedding=_packed(parameters.embedding_VE),
        # Gemma was trained with the scale rounded to the weights' precision.
        embedding_scale=torch.tensor(spec.embedding_scale, dtype=dtype).item(),
        head=_packed(parameters.head_VE),
        first_id=shard.vocab.start,
        reduce=reduce,
    )


def _layer(
    layer: LayerParameters, rules: LayerSpec, rope: int, spec: ModelSpec, shard: Shard
) -> PackedLayer:
    o = _packed(layer.o_EC)
    first_column = shard.heads.start * spec.head_dim
    return PackedLayer(
        qkv=_packed(layer.qkv_CE),
        o=o,
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
        window=rules.window,
        rope=rope,
        # Quantised columns come in whole groups; where they end with the heads, they begin so too.
        o_lead=first_column % GROUP if o and o.cols > len(shard.heads) * spec.head_dim else 0,
    )


def _packed(weight: Weight | None) -> PackedWeight | None:
    assert weight is None or isinstance(weight, PackedWeight)
    return weight
