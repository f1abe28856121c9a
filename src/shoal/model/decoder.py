"""The dense decoder every supported architecture is: what ModelSpec says, and nothing else.

    T tokens of all rows   N rows of hidden states   E hidden size   V vocabulary
    H query heads   K KV heads   D head size   F FFN columns   L layers

    x += post_norm(o(attention(rope(qk_norm(qkv(norm(x)))))))     each norm but the first only
    x += post_norm(down(activation(gate(norm(x))) * up(norm(x)))) where the spec has it

No I/O, no names of models or files, no device or rank arithmetic.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding

from shoal.core.model_spec import LayerSpec, ModelSpec
from shoal.kernels import KernelSet, KVCache, LayerKV, RaggedBatch
from shoal.kernels.cpu.arena import PackedWeight
from shoal.model.parameters import DecoderParameters, LayerParameters, Weight
from shoal.model.rope import attention_factor, inverse_frequencies


class Decoder:
    """A decoder with its weights, ready to run on their device.

    Args:
        spec: shapes and rules.
        parameters: filled weights.
        kernels: the operations to run it with.
        precision: of the weights, for people; None: that of the embedding.
    """

    def __init__(
        self,
        spec: ModelSpec,
        parameters: DecoderParameters,
        kernels: KernelSet,
        precision: str | None = None,
    ) -> None:
        embedding_VE = parameters.embedding_VE
        assert isinstance(embedding_VE, Tensor), "rows are looked up, not multiplied"
        self.spec = spec
        self.device = embedding_VE.device
        self.dtype = embedding_VE.dtype
        self.precision = precision or str(self.dtype).removeprefix("torch.")
        self._parameters = parameters
        self._embedding_VE = embedding_VE
        self._kernels = kernels
        self._inv_freqs = {
            rope: inverse_frequencies(rope, spec.head_dim).to(embedding_VE.device)
            for rope in {layer.rope for layer in spec.layers}
        }
        # Gemma was trained with the scale rounded to the weights' precision.
        self._embedding_scale = torch.tensor(spec.embedding_scale, dtype=embedding_VE.dtype).item()

    @property
    def weight_bytes(self) -> int:
        """Memory its weights take."""
        return self._parameters.size_bytes

    @property
    def fits_cuda_graphs(self) -> bool:
        """Whether a CUDA graph can hold its decode steps."""
        return self.device.type == "cuda" and self._kernels.reads_lengths_on_device

    def forward(self, token_ids_T: Tensor, batch: RaggedBatch, kv: KVCache) -> Tensor:
        """Hidden states [T, E] after the final norm; writes the tokens' KV on the way."""
        x_TE = embedding(token_ids_T, self._embedding_VE)
        if self._embedding_scale != 1.0:
            x_TE = x_TE * self._embedding_scale
        angles = {
            rope: self._kernels.rope_angles(batch.positions_T, inv_freq, attention_factor(rope))
            for rope, inv_freq in self._inv_freqs.items()
        }
        all_parameters = self._parameters.layers
        normed_TE = self._norm(x_TE, all_parameters[0].attention_norm_E)
        next_norms = [parameters.attention_norm_E for parameters in all_parameters[1:]]
        next_norms.append(self._parameters.final_norm_E)
        layers = zip(self.spec.layers, all_parameters, kv.layers, next_norms, strict=True)
        for layer, parameters, layer_kv, next_norm_E in layers:
            o_TE = self._attention(
                normed_TE, layer, parameters, batch, layer_kv, angles[layer.rope]
            )
            x_TE, normed_TE = self._add_norm(x_TE, o_TE, parameters.ffn_norm_E)
            down_TE = self._mlp(normed_TE, parameters)
            x_TE, normed_TE = self._add_norm(x_TE, down_TE, next_norm_E)
        return normed_TE

    def logits(self, hidden_NE: Tensor) -> Tensor:
        """fp32 logits [N, V] of the tokens that follow."""
        logits_NV = self._linear(hidden_NE, self._parameters.head_VE, None).float()
        cap = self.spec.final_softcap
        return logits_NV if cap is None else (logits_NV / cap).tanh_().mul_(cap)

    def _attention(
        self,
        normed_TE: Tensor,
        layer: LayerSpec,
        parameters: LayerParameters,
        batch: RaggedBatch,
        kv: LayerKV,
        angles: tuple[Tensor, Tensor],
    ) -> Tensor:
        spec, kernels = self.spec, self._kernels
        qkv_TC = self._linear(normed_TE, parameters.qkv_CE, parameters.qkv_bias_C)
        rope_and_store = kernels.rope_and_store or self._rope_and_store
        q_THD = rope_and_store(qkv_TC, parameters.qk_norm_HD, spec.norm_eps, *angles, kv, batch)
        o_THD = kernels.attention(
            q_THD,
            kv,
            batch,
            scale=spec.attention_scale,
            window=layer.window,
            softcap=spec.attention_softcap,
        )
        o_TE = self._linear(o_THD.flatten(1), parameters.o_EC, parameters.o_bias_E)
        return self._norm_if(o_TE, parameters.post_attention_norm_E)

    def _rope_and_store(
        self,
        qkv_TC: Tensor,
        qk_norm_HD: Tensor | None,
        eps: float,
        cos_T1D: Tensor,
        sin_T1D: Tensor,
        kv: LayerKV,
        batch: RaggedBatch,
    ) -> Tensor:
        """`KernelSet.rope_and_store`, one operation after the other."""
        spec, kernels = self.spec, self._kernels
        qkv_THD = qkv_TC.view(len(qkv_TC), -1, spec.head_dim)
        num_rotated = spec.num_heads + spec.num_kv_heads
        qk_THD, v_TKD = qkv_THD[:, :num_rotated], qkv_THD[:, num_rotated:]
        if qk_norm_HD is not None:
            qk_THD = kernels.rms_norm(qk_THD, qk_norm_HD, eps)
        qk_THD = kernels.rope(qk_THD, cos_T1D, sin_T1D)
        kernels.store_kv(qk_THD[:, spec.num_heads :], v_TKD, kv, batch)
        return qk_THD[:, : spec.num_heads]

    def _mlp(self, normed_TE: Tensor, parameters: LayerParameters) -> Tensor:
        gate_up_TF = self._linear(normed_TE, parameters.gate_up_FE, parameters.gate_up_bias_F)
        gated_TF = self._kernels.gated_activation(gate_up_TF, self.spec.activation)
        down_TE = self._linear(gated_TF, parameters.down_EF, parameters.down_bias_E)
        return self._norm_if(down_TE, parameters.post_ffn_norm_E)

    def _add_norm(self, x_TE: Tensor, y_TE: Tensor, weight_E: Tensor) -> tuple[Tensor, Tensor]:
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
