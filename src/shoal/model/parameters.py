"""The weights of a decoder as it uses them.

    E hidden size   V vocabulary   H all heads with a q or k norm   D head size
    C rows of q, k and v, one after another   F rows of gate and up, one after the other

Every size is the shard's own: its heads and the KV heads that they read, its FFN columns, its
experts, its token ids. Norm weights are fp32 whatever the rest is; they are small and their sums
are not. Knows nothing of files: what fills the weights is for `placements.py` to say, what room
they take for `allocation.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from torch import Tensor

from shoal.core.model_spec import ModelSpec
from shoal.core.split import ExpertShare, Range, Shard
from shoal.kernels.cpu.arena import PackedFormat, PackedWeight
from shoal.kernels.experts import ExpertWeights
from shoal.kernels.quantized import GROUP_SIZE, QuantizedWeight
from shoal.model.precision import Format

Weight = Tensor | QuantizedWeight | PackedWeight

_FP8_GROUP_SIZE = 128  # as in checkpoints with a scale for every 128 x 128 block


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExpertParameters:
    """Experts of one layer that a shard has, in the order of `shares`, and how they are chosen.

    Attributes:
        shares: of the shard.
        router_XE: fp32, of all experts of the layer.
        gate_up_FE, down_EF: of each expert of the shard; parts of `stack` where there is one.
        shared_gate_E: fp32, of the MLP beside them; None: it has none, or the shard none of it.
        stack: the same weights as kernel sets want them; None: they are packed, or there are none.
    """

    shares: tuple[ExpertShare, ...]
    router_XE: Tensor
    gate_up_FE: tuple[Weight, ...]
    down_EF: tuple[Weight, ...]
    shared_gate_E: Tensor | None = None
    stack: ExpertWeights | None = None

    @property
    def nbytes(self) -> int:
        score = self.shared_gate_E
        small = self.router_XE.nbytes + (0 if score is None else score.nbytes)
        return small + sum(each.nbytes for each in (*self.gate_up_FE, *self.down_EF))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LatentParameters:
    """What makes a shard's heads of latents; rows of the parts that turn are half-split.

    Attributes:
        q_CR: [heads * head_dim, query_rank]; None: queries come from the hidden state.
        kv_CR: [heads * (plain_dim + value_dim), kv_rank].
        q_norm_R, kv_norm_R: fp32.
    """

    q_CR: Weight | None
    q_norm_R: Tensor | None
    kv_CR: Weight
    kv_norm_R: Tensor

    @property
    def nbytes(self) -> int:
        parts = (self.q_CR, self.q_norm_R, self.kv_CR, self.kv_norm_R)
        return sum(part.nbytes for part in parts if part is not None)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerParameters:
    """Weights of one layer; None where the spec has no such part, or the shard nothing of it.

    A shard without heads has no qkv and o, one without FFN columns no gate, up and down; biases
    of o and down are the first shard's. o may have columns more than the shard's heads, at both
    ends, where their edges lie inside a group of quantised columns: the heads' range, snapped.
    Beside experts, gate_up and down are those of the MLP that every token goes through. Of latents,
    qkv's rows are the shard's queries (or the latent of them), then the latent of keys and values
    and the part of a key that turns.
    """

    attention_norm_E: Tensor
    qkv_CE: Weight | None
    qkv_bias_C: Tensor | None
    qk_norm_HD: Tensor | None
    o_EC: Weight | None
    o_bias_E: Tensor | None
    post_attention_norm_E: Tensor | None
    ffn_norm_E: Tensor
    gate_up_FE: Weight | None
    gate_up_bias_F: Tensor | None
    down_EF: Weight | None
    down_bias_E: Tensor | None
    post_ffn_norm_E: Tensor | None
    experts: ExpertParameters | None = None
    latent: LatentParameters | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DecoderParameters:
    """Weights of a decoder's shard; `head_VE` is `embedding_VE` itself where they are tied.

    Without an embedding, a head, or token ids of its own, a shard has None of them.
    """

    embedding_VE: Weight | None
    layers: tuple[LayerParameters, ...]
    final_norm_E: Tensor | None
    head_VE: Weight | None

    @property
    def size_bytes(self) -> int:
        tensors: list[Weight | ExpertParameters | LatentParameters | None] = [
            self.embedding_VE,
            self.final_norm_E,
        ]
        if self.head_VE is not self.embedding_VE:
            tensors.append(self.head_VE)
        for layer in self.layers:
            tensors += [getattr(layer, each.name) for each in fields(layer)]
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


@dataclass(frozen=True, slots=True, eq=False)
class Placement:
    """A tensor of the checkpoint and the place that a range of it goes to.

    Attributes:
        name: in the checkpoint.
        shape: of all of it, there.
        target: what holds the range, perhaps among others.
        places: int64, the target's row for each row of the range; None: it goes to every row (a
            norm that heads share).
        start: first row of the range.
        columns: of the range; None: all.
    """

    name: str
    shape: tuple[int, ...]
    target: Weight
    places: Tensor | None
    start: int = 0
    columns: Range | None = None

    @property
    def num_rows(self) -> int:
        return self.shape[0] if self.places is None else len(self.places)


def granule_of(weight_format: Format | PackedFormat, columns: int, packed: bool) -> int:
    """Where a weight may be cut along its columns: between groups that share a scale.

    Args:
        columns: of the whole weight.
        packed: fp8 has no scales then.
    """
    if weight_format in ("int8", "int4", "int4_min"):
        return GROUP_SIZE
    if weight_format == "fp8" and not packed and columns % _FP8_GROUP_SIZE == 0:
        return _FP8_GROUP_SIZE
    return 1  # floats, and fp8 with one scale a row


def head_columns(spec: ModelSpec, shard: Shard, granule: int) -> Range:
    """Columns of o that a shard holds: those of its heads, and what shares a group with them."""
    heads = Range(shard.heads.start * spec.value_dim, shard.heads.stop * spec.value_dim)
    return heads.snapped(granule)


def held_head_columns(spec: ModelSpec, shard: Shard, o_EC: Weight) -> Range:
    """Columns of o that a shard's weight holds."""
    weight_format = None if isinstance(o_EC, Tensor) else o_EC.format
    packed, columns = isinstance(o_EC, PackedWeight), spec.num_heads * spec.value_dim
    return head_columns(spec, shard, granule_of(weight_format, columns, packed))
