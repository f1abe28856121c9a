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
from shoal.kernels import KernelSet, KVCache, RaggedBatch
from shoal.model.parameters import DecoderParameters, LayerParameters
from shoal.model.rope import attention_factor, inverse_frequencies


class Decoder:
    """A decoder with its weights, ready to run on their device.

    Args:
        spec: shapes and rules.
        parameters: filled weights.
        kernels: the operations to run it with.
    """

    def __init__(self, spec: ModelSpec, parameters: DecoderParameters, kernels: KernelSet) -> None:
        self.spec = spec
        self._parameters = parameters
        self._kernels = kernels
        embedding_VE = parameters.embedding_VE
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
    def device(self) -> torch.device:
        """Where it runs."""
        return self._parameters.embedding_VE.device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of weights, activations and KV."""
        return self._parameters.embedding_VE.dtype

    def forward(self, token_ids_T: Tensor, batch: RaggedBatch, kv: KVCache) -> Tensor:
        """Hidden states [T, E] after the final norm; writes the tokens' KV on the way."""
        x_TE = embedding(token_ids_T, self._parameters.embedding_VE)
        if self._embedding_scale != 1.0:
            x_TE = x_TE * self._embedding_scale
        angles = {
            rope: self._kernels.rope_angles(batch.positions_T, inv_freq, attention_factor(rope))
            for rope, inv_freq in self._inv_freqs.items()
        }
        layers = zip(self.spec.layers, self._parameters.layers, kv.keys, kv.values, strict=True)
        for layer, parameters, k_NBKD, v_NBKD in layers:
            x_TE = x_TE + self._attention(
                x_TE, layer, parameters, batch, k_NBKD, v_NBKD, angles[layer.rope]
            )
            x_TE = x_TE + self._mlp(x_TE, parameters)
        return self._norm(x_TE, self._parameters.final_norm_E)

    def logits(self, hidden_NE: Tensor) -> Tensor:
        """fp32 logits [N, V] of the tokens that follow."""
        logits_NV = self._kernels.linear(hidden_NE, self._parameters.head_VE, None).float()
        cap = self.spec.final_softcap
        return logits_NV if cap is None else (logits_NV / cap).tanh_().mul_(cap)

    def _attention(
        self,
        x_TE: Tensor,
        layer: LayerSpec,
        parameters: LayerParameters,
        batch: RaggedBatch,
        k_NBKD: Tensor,
        v_NBKD: Tensor,
        angles: tuple[Tensor, Tensor],
    ) -> Tensor:
        spec, kernels = self.spec, self._kernels
        qkv_TC = self._kernels.linear(
            self._norm(x_TE, parameters.attention_norm_E),
            parameters.qkv_CE,
            parameters.qkv_bias_C,
        )
        qkv_THD = qkv_TC.view(len(x_TE), -1, spec.head_dim)
        num_rotated = spec.num_heads + spec.num_kv_heads
        qk_THD, v_TKD = qkv_THD[:, :num_rotated], qkv_THD[:, num_rotated:]
        if parameters.qk_norm_HD is not None:
            qk_THD = self._norm(qk_THD, parameters.qk_norm_HD)
        qk_THD = kernels.rope(qk_THD, *angles)
        q_THD, k_TKD = qk_THD[:, : spec.num_heads], qk_THD[:, spec.num_heads :]
        kernels.store_kv(k_TKD, v_TKD, k_NBKD, v_NBKD, batch)
        o_THD = kernels.attention(
            q_THD,
            k_NBKD,
            v_NBKD,
            batch,
            scale=spec.attention_scale,
            window=layer.window,
            softcap=spec.attention_softcap,
        )
        o_TE = self._kernels.linear(o_THD.flatten(1), parameters.o_EC, parameters.o_bias_E)
        return self._norm_if(o_TE, parameters.post_attention_norm_E)

    def _mlp(self, x_TE: Tensor, parameters: LayerParameters) -> Tensor:
        gate_up_TF = self._kernels.linear(
            self._norm(x_TE, parameters.ffn_norm_E),
            parameters.gate_up_FE,
            parameters.gate_up_bias_F,
        )
        gated_TF = self._kernels.gated_activation(gate_up_TF, self.spec.activation)
        down_TE = self._kernels.linear(gated_TF, parameters.down_EF, parameters.down_bias_E)
        return self._norm_if(down_TE, parameters.post_ffn_norm_E)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return self._kernels.rms_norm(x, weight, self.spec.norm_eps)

    def _norm_if(self, x: Tensor, weight: Tensor | None) -> Tensor:
        return x if weight is None else self._norm(x, weight)
