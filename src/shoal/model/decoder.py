"""The decoder every supported architecture is: what ModelSpec says, and nothing else.

    T tokens of all rows   N rows of hidden states   E hidden size   V vocabulary of the shard
    H query heads   K KV heads   D head size   F FFN columns   L layers

    x += post_norm(o(attention(rope(qk_norm(qkv(norm(x)))))))     each norm but the first only
    x += post_norm(down(activation(gate(norm(x))) * up(norm(x)))) where the spec has it;
         in a layer with experts, that of some of them, weighted

It runs what its shard holds: some layers, and of each some heads and FFN columns. What o and down
give then is a part of a sum, which the group adds up; x and the norms are the same on every rank.
No I/O, no names of models or files, no device or rank arithmetic.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import embedding, pad

from shoal.comm import Group
from shoal.core.model_spec import LayerSpec, ModelSpec
from shoal.core.split import Dealing, ExpertShare, Range, Shard, whole
from shoal.kernels import KernelSet, KVCache, LayerKV, RaggedBatch
from shoal.kernels.cpu.arena import PackedWeight
from shoal.model.expert_loader import ExpertLoader
from shoal.model.heads import Heads
from shoal.model.mixture import Mixtures
from shoal.model.parameters import (
    DecoderParameters,
    ExpertParameters,
    LayerParameters,
    Weight,
    held_head_columns,
)
from shoal.model.rope import attention_factor, inverse_frequencies
from shoal.model.streaming import LayerSource
from shoal.model.token_ranges import TokenRanges


class Decoder:
    """A decoder with its weights, ready to run on their device.

    Args:
        spec: shapes and rules.
        parameters: filled weights.
        kernels: the operations to run it with.
        precision: of the weights, for people; None: `dtype`.
        shard: what of the model the weights are; None: all.
        group: the ranks that share its layers, where there are several.
        device, dtype: where and in what it computes; None: as the embedding.
        stream: brings the weights of layers that are not all on the device; None: they are.

    Attributes:
        hidden_dtype: of hidden states that go in or out.
        expert_loader: reads experts again, for `deal`; None: who made the decoder gave none.
    """

    def __init__(
        self,
        spec: ModelSpec,
        parameters: DecoderParameters,
        kernels: KernelSet,
        precision: str | None = None,
        *,
        shard: Shard | None = None,
        group: Group | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        stream: LayerSource | None = None,
    ) -> None:
        embedding_VE = parameters.embedding_VE
        if device is None or dtype is None:
            assert isinstance(embedding_VE, Tensor), "rows are looked up, not multiplied"
            device, dtype = embedding_VE.device, embedding_VE.dtype
        self.spec = spec
        self.shard = shard or whole(spec)
        self.device = device
        self.dtype = self.hidden_dtype = dtype
        self.precision = precision or str(dtype).removeprefix("torch.")
        assert group is not None or self.shard.num_ranks == 1, "several ranks need a group"
        self._group = group if self.shard.num_ranks > 1 else None
        self.stream = stream
        self._parameters = parameters
        self._kernels = kernels
        self._token_ranges: TokenRanges | None = None
        if self.shard.has_token_ranges and group is not None:
            self._token_ranges = TokenRanges(spec, self.shard, group, kernels)
        self._heads = Heads(spec, self.shard, kernels, self._group)
        self._mixtures: Mixtures | None = None
        if spec.experts is not None:
            self._mixtures = Mixtures(spec, self.shard, kernels, device, dtype, group)
        self.expert_loader: ExpertLoader | None = None
        self._inv_freqs = {
            rope: inverse_frequencies(rope, spec.rope_dim).to(device)
            for rope in {layer.rope for layer in spec.layers}
        }
        # Gemma was trained with the scale rounded to the weights' precision.
        self._embedding_scale = torch.tensor(spec.embedding_scale, dtype=dtype).item()

    @property
    def weight_bytes(self) -> int:
        """Memory of the device that its weights take."""
        if self.stream is None:
            return self._parameters.size_bytes
        return self._parameters.size_bytes + self.stream.slot_bytes - self.stream.size_bytes

    @property
    def fits_cuda_graphs(self) -> bool:
        """Whether a CUDA graph can hold its decode steps, from token ids to logits."""
        is_whole = self.shard == whole(self.spec) and self.stream is None
        on_device = self.device.type == "cuda" and self._kernels.reads_lengths_on_device
        return is_whole and on_device

    @property
    def expert_counts(self) -> Tensor | None:
        """int64 [layers of the shard, experts], tokens so far; None: there are no experts."""
        return None if self._mixtures is None else self._mixtures.counts

    def load_experts(self, layer: int, shares: tuple[ExpertShare, ...]) -> ExpertParameters:
        """Experts of a layer of the model, for `deal`; from any thread, while Steps run."""
        like = self._parameters.layers[layer - self.shard.layers.start].experts
        assert self.expert_loader is not None and like is not None, "it has experts, from a file"
        return self.expert_loader.load(layer, shares, like)

    def deal(self, layer: int, experts: ExpertParameters, dealing: Dealing) -> None:
        """From the next Step on a layer of the model has these; between Steps.

        Args:
            dealing: of the whole instance.
        """
        assert self._mixtures is not None, "there are experts to deal"
        layers, held = list(self._parameters.layers), layer - self.shard.layers.start
        layers[held] = replace(layers[held], experts=experts)
        self._parameters = replace(self._parameters, layers=tuple(layers))
        self._mixtures.deal(layer, dealing)

    def compare(self, arithmetic: str) -> None:
        """Find out whether the ranks with hidden states choose experts alike; all come at once.

        Args:
            arithmetic: ranks that say the same make the same bits of the same numbers.
        """
        if self._mixtures is not None:
            self._mixtures.compare(arithmetic)

    def serve(self, layers: Range | None = None) -> None:
        """A Step on a rank with experts only; the ranks with hidden states run `forward`."""
        layers = self.shard.layers if layers is None else layers
        for index in range(layers.start, layers.stop):
            experts = self._enter(index).experts
            if experts is not None and self._mixtures is not None:
                self._mixtures.serve(experts)
            self._leave(index)

    def multiply(self, layer: int) -> None:
        """One token by the large weights of a layer, here or not: what a decode step mostly is.

        For whoever wants to know how long it takes.
        """
        parameters = self._parameters.layers[layer - self.shard.layers.start]
        weights = [parameters.qkv_CE, parameters.o_EC, parameters.gate_up_FE, parameters.down_EF]
        if parameters.latent is not None:
            weights += [parameters.latent.q_CR, parameters.latent.kv_CR]
        if (experts := parameters.experts) is not None and self.spec.experts is not None:
            num_active = self.spec.experts.num_active
            weights += [*experts.gate_up_FE[:num_active], *experts.down_EF[:num_active]]
        for weight in weights:
            if weight is not None and not isinstance(weight, PackedWeight):
                x_1E = torch.zeros(1, weight.shape[1], dtype=self.dtype, device=self.device)
                self._linear(x_1E, weight, None)

    def forward(
        self, inputs: Tensor, batch: RaggedBatch, kv: KVCache, layers: Range | None = None
    ) -> Tensor:
        """Hidden states [T, E]; writes the tokens' KV on the way.

        Args:
            inputs: token ids [T] where the model begins (`layers` at 0, and the shard embeds),
                else the hidden states [T, E] that the layers before gave.
            kv: its first layer is the shard's first.
            layers: a part of the shard's; None: all of them.

        Returns:
            After the final norm where the model ends (`layers` at the last, and the shard makes
            logits), else what the next layer takes.
        """
        layers = self.shard.layers if layers is None else layers
        embeds = layers.start == 0 and self.shard.has_embedding
        x_TE = self._embed(inputs) if embeds else inputs
        angles = {
            rope: self._kernels.rope_angles(batch.positions_T, inv_freq, attention_factor(rope))
            for rope, inv_freq in self._inv_freqs.items()
        }
        norm_E = self._norm_before(layers.start, layers)
        normed_TE = x_TE if norm_E is None else self._norm(x_TE, norm_E)
        for index in range(layers.start, layers.stop):
            layer, parameters = self.spec.layers[index], self._enter(index)
            layer_kv = kv.layers[index - self.shard.layers.start]
            o_TE = self._attention(
                normed_TE, layer, parameters, batch, layer_kv, angles[layer.rope]
            )
            x_TE, normed_TE = self._add_norm(x_TE, o_TE, parameters.ffn_norm_E)
            down_TE = self._mlp(normed_TE, parameters, index, batch)
            norm_E = self._norm_before(index + 1, layers)
            x_TE, normed_TE = self._add_norm(x_TE, down_TE, norm_E)
            self._leave(index)
        return normed_TE

    def logits(self, hidden_NE: Tensor) -> Tensor:
        """fp32 logits [N, V] of the tokens that follow, of the shard's own vocabulary."""
        head_VE = self._parameters.head_VE
        if head_VE is None:
            return torch.empty(len(hidden_NE), 0, device=self.device)
        logits_NV = self._linear(hidden_NE, head_VE, None).float()
        cap = self.spec.final_softcap
        return logits_NV if cap is None else (logits_NV / cap).tanh_().mul_(cap)

    def _enter(self, index: int) -> LayerParameters:
        """A layer of the model, with its weights on the device until `_leave`."""
        if self.stream is not None and index in self.stream.layers:
            self.stream.acquire(index)
        return self._parameters.layers[index - self.shard.layers.start]

    def _leave(self, index: int) -> None:
        if self.stream is not None and index in self.stream.layers:
            self.stream.release(index)

    def _embed(self, token_ids_T: Tensor) -> Tensor:
        """Rows of the table; each rank has those of its token ids, and zeros for the others."""
        table_VE = self._parameters.embedding_VE
        if table_VE is None:
            x_TE = torch.zeros(
                len(token_ids_T), self.spec.hidden_size, dtype=self.dtype, device=self.device
            )
        else:
            assert isinstance(table_VE, Tensor), "rows are looked up, not multiplied"
            x_TE = self._rows(token_ids_T, table_VE)
        self._reduce(x_TE)
        return x_TE if self._embedding_scale == 1.0 else x_TE * self._embedding_scale

    def _rows(self, token_ids_T: Tensor, table_VE: Tensor) -> Tensor:
        if self._group is None:
            return embedding(token_ids_T, table_VE)
        rows_T = token_ids_T - self.shard.vocab.start
        outside_T = (rows_T < 0) | (rows_T >= len(table_VE))
        x_TE = embedding(rows_T.masked_fill(outside_T, 0), table_VE)
        return x_TE.masked_fill_(outside_T[:, None], 0.0)

    def _norm_before(self, index: int, layers: Range) -> Tensor | None:
        """The norm between what was run and what follows; None: the layers end, not the model."""
        if index < layers.stop:
            return self._parameters.layers[index - self.shard.layers.start].attention_norm_E
        return self._parameters.final_norm_E if index == self.spec.num_layers else None

    def _attention(
        self,
        normed_TE: Tensor,
        layer: LayerSpec,
        parameters: LayerParameters,
        batch: RaggedBatch,
        kv: LayerKV,
        angles: tuple[Tensor, Tensor],
    ) -> Tensor:
        if parameters.qkv_CE is None:
            qkv_TC = normed_TE.new_zeros(len(normed_TE), 0)
        else:
            qkv_TC = self._linear(normed_TE, parameters.qkv_CE, parameters.qkv_bias_C)
        o_THD = None
        if parameters.qkv_CE is not None or self._token_ranges is not None:
            o_THD = self._attend(qkv_TC, layer, parameters, batch, kv, angles)
        else:
            self._heads.sit_out(normed_TE)
        if o_THD is None or parameters.o_EC is None:
            o_TE = self._nothing(normed_TE, parameters.o_bias_E)
        else:
            o_TC = o_THD[..., : self.spec.value_dim].flatten(1)
            o_TC = self._with_margins(o_TC, parameters.o_EC)
            o_TE = self._linear(o_TC, parameters.o_EC, parameters.o_bias_E)
        self._reduce(o_TE)
        return self._norm_if(o_TE, parameters.post_attention_norm_E)

    def _attend(
        self,
        qkv_TC: Tensor,
        layer: LayerSpec,
        parameters: LayerParameters,
        batch: RaggedBatch,
        kv: LayerKV,
        angles: tuple[Tensor, Tensor],
    ) -> Tensor:
        """What each of the shard's heads gives, [T, H, D].

        Kernels know KV heads with equally many query heads: of a KV head that is shared with
        other ranks, their query heads are computed too (as zeros), and dropped.
        """
        spec, kernels = self.spec, self._kernels
        if self._token_ranges is not None:
            heads = self._heads.turned(qkv_TC, parameters, angles)
            return self._token_ranges.attend(heads, layer, batch, kv)
        if kernels.rope_and_store is not None and self._heads.are_plain:
            norms_HD, eps = parameters.qk_norm_HD, spec.norm_eps
            q_THD = kernels.rope_and_store(qkv_TC, norms_HD, eps, *angles, kv, batch)
        else:
            q_THD, k_TKD, v_TKD = self._heads.turned(qkv_TC, parameters, angles)
            kernels.store_kv(k_TKD, v_TKD, kv, batch)
        num_heads, first = q_THD.shape[1], self.shard.head_offset(spec)
        in_groups = kv.keys_NBHD.shape[2] * (spec.num_heads // spec.num_kv_heads)
        if in_groups > num_heads:
            q_THD = pad(q_THD, (0, 0, first, in_groups - num_heads - first))
        o_THD = kernels.attention(
            q_THD,
            kv,
            batch,
            scale=spec.attention_scale,
            window=layer.window,
            softcap=spec.attention_softcap,
        )
        return o_THD[:, first : first + num_heads]

    def _with_margins(self, o_TC: Tensor, weight: Weight) -> Tensor:
        """Zeros for columns of o that are other heads', kept for the groups that they share."""
        held = held_head_columns(self.spec, self.shard, weight)
        before = self.shard.heads.start * self.spec.value_dim - held.start
        after = len(held) - before - o_TC.shape[1]
        return pad(o_TC, (before, after)) if before or after else o_TC

    def _mlp(
        self, normed_TE: Tensor, parameters: LayerParameters, layer: int, batch: RaggedBatch
    ) -> Tensor:
        if parameters.gate_up_FE is None or parameters.down_EF is None:
            down_TE = self._nothing(normed_TE, parameters.down_bias_E)
        else:
            gate_up_TF = self._linear(normed_TE, parameters.gate_up_FE, parameters.gate_up_bias_F)
            gated_TF = self._kernels.gated_activation(gate_up_TF, self.spec.activation)
            down_TE = self._linear(gated_TF, parameters.down_EF, parameters.down_bias_E)
        if (experts := parameters.experts) is not None and self._mixtures is not None:
            if experts.shared_gate_E is not None:
                score_T = torch.mv(normed_TE.float(), experts.shared_gate_E).sigmoid_()
                down_TE = down_TE * score_T.unsqueeze(-1).to(down_TE.dtype)
            down_TE = down_TE + self._mixtures.run(layer, normed_TE, experts, batch)
        self._reduce(down_TE)
        return self._norm_if(down_TE, parameters.post_ffn_norm_E)

    def _nothing(self, like_TE: Tensor, bias_E: Tensor | None) -> Tensor:
        """What a rank without heads or FFN columns adds."""
        zeros_TE = torch.zeros_like(like_TE)
        return zeros_TE if bias_E is None else zeros_TE.add_(bias_E)

    def _reduce(self, part: Tensor) -> None:
        if self._group is not None:
            self._group.all_reduce(part)

    def _add_norm(
        self, x_TE: Tensor, y_TE: Tensor, weight_E: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """x + y, and its norm; the sum itself where no norm follows."""
        if weight_E is None:
            x_TE = x_TE + y_TE
            return x_TE, x_TE
        add_rms_norm = self._kernels.add_rms_norm
        if add_rms_norm is not None:
            return add_rms_norm(x_TE, y_TE, weight_E, self.spec.norm_eps)
        x_TE = x_TE + y_TE
        return x_TE, self._norm(x_TE, weight_E)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return self._kernels.rms_norm(x, weight, self.spec.norm_eps)

    def _norm_if(self, x: Tensor, weight: Tensor | None) -> Tensor:
        return x if weight is None else self._norm(x, weight)

    def _linear(self, x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
        assert not isinstance(weight, PackedWeight), "those run in `packed_decoder.py`"
        return self._kernels.linear(x, weight, bias)
