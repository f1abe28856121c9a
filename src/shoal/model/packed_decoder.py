"""A decoder that runs through the compiled CPU path: a range of layers in one call.

    T tokens of all rows   N rows of hidden states   E hidden size   V this rank's token ids

It computes what `decoder.py` defines, in fp32 with weights and KV as they are kept; inputs of
int8 and int4 weights are rounded to int8 in groups of 32. Ranks meet inside the call, once after
the embedding, twice a layer, and around its experts where some ranks have nothing else. No I/O, no
names of models or files.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from shoal.comm import Group
from shoal.core.errors import CommError
from shoal.core.model_spec import ModelSpec
from shoal.core.split import Dealing, ExpertShare, Range, Shard
from shoal.kernels import KVCache
from shoal.kernels.cpu.bring import PythonBring
from shoal.kernels.cpu.layers import CompiledModel
from shoal.kernels.cpu.reduce import PythonReduce
from shoal.kernels.cpu.step import HostBatch, ReduceError, Session, StepOutput
from shoal.model.expert_loader import ExpertLoader
from shoal.model.expert_store import ExpertStore
from shoal.model.packed_mixture import PackedMixture
from shoal.model.packed_model import packed, packed_experts, packed_model
from shoal.model.parameters import DecoderParameters, ExpertParameters
from shoal.model.streaming import LayerStream

_NO_SAMPLES = array("q")


class PackedDecoder:
    """A shard of a decoder, with packed weights.

    Args:
        spec: of the whole model.
        parameters: of the shard.
        session: whose threads run it.
        dtype: of weights that are not quantised, and of KV unless said otherwise.
        precision: of the weights, for people; None: `dtype`.
        group: the ranks that hold the other shards; None if there are none.
        stream: brings the weights of layers that are not all in memory; None: they are.
        store: likewise of experts.

    Attributes:
        expert_counts: int64 [layers of the shard, experts], tokens so far; None: there are none.
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
        stream: LayerStream | None = None,
        store: ExpertStore | None = None,
    ) -> None:
        num_streams = len(shard.streams) if shard.has_stream else 1
        assert (1 if group is None else group.size) == num_streams, "a group is the shard's ranks"
        self.spec = spec
        self.shard = shard
        self.dtype = dtype
        self.precision = precision or str(dtype).removeprefix("torch.")
        self.device = torch.device("cpu")
        self.weight_bytes = parameters.size_bytes
        if stream is not None:
            self.weight_bytes += stream.slot_bytes - stream.size_bytes
        if store is not None:
            self.weight_bytes += store.slot_bytes
        self.stream = stream
        self.store = store
        self.expert_loader: ExpertLoader | None = None
        self._session = session
        self._head = packed(parameters.head_VE)
        self._group = group
        self._reduce: PythonReduce | None = None
        reduce, rank = self._native_reduce(), 0 if group is None else group.rank
        self.expert_counts: Tensor | None = None
        if spec.experts is not None:
            sizes = len(shard.layers), spec.experts.num_experts
            self.expert_counts = torch.zeros(sizes, dtype=torch.int64)
        self._experts = [layer.experts for layer in parameters.layers]
        self._model = CompiledModel(
            packed_model(spec, shard, parameters, dtype, reduce, rank, self.expert_counts)
        )
        self._bring: PythonBring | None = None
        if store is not None:
            self._bring = PythonBring(store.bring)
            self._model.bring(self._bring.address)
        self._mixture: PackedMixture | None = None
        if spec.experts is not None:
            self._mixture = PackedMixture(spec, shard, group)
            self._model.call(*self._mixture.addresses)

    def load_experts(self, layer: int, shares: tuple[ExpertShare, ...]) -> ExpertParameters:
        """As `Decoder.load_experts`."""
        like = self._experts[layer - self.shard.layers.start]
        assert self.expert_loader is not None and like is not None, "it has experts, from a file"
        return self.expert_loader.load(layer, shares, like)

    def deal(self, layer: int, experts: ExpertParameters, dealing: Dealing) -> None:
        """As `Decoder.deal`."""
        held = layer - self.shard.layers.start
        assert self.expert_counts is not None, "there are experts to deal"
        assert self.store is None, "experts on disk stay with their rank"
        assert self._mixture is not None
        self._experts[held] = experts
        self._model.deal(held, packed_experts(self.shard, layer, experts, self.expert_counts[held]))
        self._mixture.deal(layer, dealing)

    def compare(self, arithmetic: str) -> None:
        """As `Decoder.compare`."""
        if self._mixture is not None:
            self._mixture.compare(arithmetic)
            self._model.call(*self._mixture.addresses)

    def serve(self, layers: Range | None = None) -> None:
        """As `Decoder.serve`."""
        layers, stream = self.shard.layers if layers is None else layers, self.stream
        for layer in range(layers.start, layers.stop):
            if stream is not None and layer in stream.layers:
                stream.acquire(layer)
            if self._mixture is not None and self.spec.layers[layer].has_experts:
                held = layer - self.shard.layers.start
                try:
                    self._mixture.serve(partial(self._session.experts, self._model, held))
                except ReduceError as error:
                    raise self._cause_of(error) from None
            if stream is not None and layer in stream.layers:
                stream.release(layer)

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
        try:
            if self.stream is None:
                return self._run_layers(inputs, batch, kv, samples, layers, ends)
            return self._run_streamed(self.stream, inputs, batch, kv, samples, layers, ends)
        except ReduceError as error:
            raise self._cause_of(error) from None

    def _cause_of(self, error: ReduceError) -> BaseException:
        for calls in (self._reduce, self._mixture, self._bring):
            if calls is not None and (cause := calls.take_error()) is not None:
                return cause
        return CommError(
            f"{error}: another rank did not come in time, or the step was aborted; the instance "
            "must begin anew"
        )

    def _run_layers(
        self,
        inputs: array[int] | Tensor,
        batch: HostBatch,
        kv: KVCache,
        samples: array[int],
        layers: Range,
        ends: bool,
    ) -> StepOutput:
        first = self.shard.layers.start
        own = layers.start - first, layers.stop - first
        return self._session.forward(self._model, inputs, batch, kv, samples, own, ends)

    def _run_streamed(
        self,
        stream: LayerStream,
        inputs: array[int] | Tensor,
        batch: HostBatch,
        kv: KVCache,
        samples: array[int],
        layers: Range,
        ends: bool,
    ) -> StepOutput:
        """In pieces, each of which ends with a layer that is not always in memory."""
        first = layers.start
        for layer in stream.layers:
            if layer not in layers:
                continue
            stream.acquire(layer)
            is_last = layer + 1 == layers.stop
            out = self._run_layers(
                inputs,
                batch,
                kv,
                samples if is_last else _NO_SAMPLES,
                Range(first, layer + 1),
                ends and is_last,
            )
            stream.release(layer)
            if is_last:
                return out
            inputs, first = out.hidden_TE, layer + 1
        return self._run_layers(inputs, batch, kv, samples, Range(first, layers.stop), ends)

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
