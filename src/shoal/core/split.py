"""How a model is shared out: half-open ranges per rank, of any sizes, nothing need divide.

    9 query heads over weights 1 : 0.3       [0, 7) [7, 9)
    3 KV heads, 3 query heads each           KV 0-2 on rank 0, KV 2 on rank 1 too: heads 6 | 7, 8

Query heads decide; the KV heads they touch follow, and one that straddles two ranks is computed
on both. Experts are dealt: each rank has a list of them, and one that several ranks have has its
tokens shared out among these. The only place that divides a model by ranks. Knows nothing of
devices.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from shoal.core.errors import ConfigError
from shoal.core.model_spec import ModelSpec


@dataclass(frozen=True, slots=True, order=True)
class Range:
    """start, ..., stop - 1."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop:
            raise ConfigError(
                f"[{self.start}, {self.stop}) is no range: it must start at 0 or later, and not "
                "end before it starts"
            )

    def __len__(self) -> int:
        return self.stop - self.start

    def __contains__(self, index: int) -> bool:
        return self.start <= index < self.stop

    def holds(self, other: Range) -> bool:
        return self.start <= other.start and other.stop <= self.stop

    def snapped(self, granule: int) -> Range:
        """The smallest range of whole granules around it."""
        if not len(self):
            return self
        return Range(self.start // granule * granule, -(-self.stop // granule) * granule)


WHOLE_SHARE = 1 << 16
"""All tokens of an expert, in the units of `ExpertShare`."""


PHASE_STEP = 40503
"""The golden ratio of 2**16 (Knuth, 6.4)."""


@dataclass(frozen=True, slots=True, order=True)
class ExpertShare:
    """An expert on a rank, and which of its tokens the rank takes.

    Of the tokens that a Step sends to the expert, in order, those from `start` to `stop`, in
    parts of WHOLE_SHARE. Whole numbers, so that all ranks draw the same line.
    """

    expert: int
    start: int = 0
    stop: int = WHOLE_SHARE

    def of(self, num_tokens: int, phase: int) -> Range:
        """Which of the expert's tokens are this rank's.

        Args:
            phase: of the Step and layer (`share_phase`): moves what is rounded from rank to rank.
        """
        first = (num_tokens * self.start + phase) // WHOLE_SHARE
        return Range(first, (num_tokens * self.stop + phase) // WHOLE_SHARE)


def share_phase(position: int, layer: int) -> int:
    """In [0, WHOLE_SHARE), spread evenly; `position` is that of a Step's first token."""
    return (position + layer) * PHASE_STEP % WHOLE_SHARE


Dealing = tuple[tuple[ExpertShare, ...], ...]
"""The experts of a layer: of each rank, in the order of their numbers."""


KVSplit = Literal["heads", "tokens"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """What each rank of an instance owns of every layer, and of the vocabulary.

    Attributes:
        heads, ffn, vocab: a range per rank, in order, together [0, total); a range may be empty.
            An MLP beside experts has columns in the proportions of `ffn`.
        experts: a dealing for each layer of the instance (empty for a layer without experts), or
            a single one that all of them share; empty: the model has none.
        kv: by "heads", each rank keeps the KV heads that its query heads read; by "tokens", each
            keeps all KV heads of some blocks (token ranges), as many as it has memory for.
    """

    heads: tuple[Range, ...]
    ffn: tuple[Range, ...]
    vocab: tuple[Range, ...]
    experts: tuple[Dealing, ...] = ()
    kv: KVSplit = "heads"

    @property
    def num_ranks(self) -> int:
        return len(self.heads)

    @property
    def streams(self) -> tuple[int, ...]:
        """Ranks that keep hidden states: those with heads, FFN columns or vocabulary.

        The others have experts only, and are sent the tokens that go through these. Where the model
        has no experts, or KV is split by tokens, all ranks keep them.
        """
        ranks = range(self.num_ranks)
        if not self.experts or self.kv == "tokens":
            return tuple(ranks)
        return tuple(
            rank for rank in ranks if self.heads[rank] or self.ffn[rank] or self.vocab[rank]
        )

    def dealings(self, layers: Range) -> tuple[Dealing, ...]:
        """Of each layer of the instance; empty: the model has no experts."""
        return self.experts * len(layers) if len(self.experts) == 1 else self.experts


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """What one rank holds.

    Attributes:
        layers: of the model.
        heads, ffn, vocab: its ranges of query heads, FFN columns and token ids.
        experts: of each of its layers, its share of them; empty: the model has none.
        kv, streams: see `Split`.
        dealings: of each layer, the experts of all ranks; empty where all keep hidden states.
        has_embedding, has_head: whether its instance embeds tokens, and makes logits.
        is_first: adds what must be added once only (biases).
        rank: among those of its instance.
        num_ranks: of its instance.
    """

    layers: Range
    heads: Range
    ffn: Range
    vocab: Range
    experts: tuple[tuple[ExpertShare, ...], ...] = ()
    kv: KVSplit = "heads"
    has_embedding: bool = True
    has_head: bool = True
    is_first: bool = True
    rank: int = 0
    num_ranks: int = 1
    streams: tuple[int, ...] = (0,)
    dealings: tuple[Dealing, ...] = ()

    @property
    def has_stream(self) -> bool:
        """Whether it keeps hidden states; else it has experts only."""
        return self.rank in self.streams

    @property
    def exchanges(self) -> bool:
        """Whether there are ranks in its instance that have experts only."""
        return bool(self.dealings)

    def kv_heads(self, spec: ModelSpec) -> Range:
        """KV heads that its query heads read."""
        group = spec.num_heads // spec.num_kv_heads
        if not len(self.heads):
            return Range(0, 0)
        return Range(self.heads.start // group, -(-self.heads.stop // group))

    @property
    def has_token_ranges(self) -> bool:
        """Whether it keeps all KV heads of some blocks, and other ranks the other blocks."""
        return self.kv == "tokens" and self.num_ranks > 1

    def kept_kv_heads(self, spec: ModelSpec) -> Range:
        """KV heads that it keeps KV of."""
        return Range(0, spec.num_kv_heads) if self.has_token_ranges else self.kv_heads(spec)

    def head_offset(self, spec: ModelSpec) -> int:
        """Query heads of its first KV head that other ranks own.

        Its query head h (from 0) reads its KV head (h + offset) // (heads of a KV head).
        """
        return self.heads.start % (spec.num_heads // spec.num_kv_heads)

    def mlp_columns(self, spec: ModelSpec, layer: int) -> Range:
        """Of a layer's MLP: its FFN columns, or as large a part of the MLP beside experts."""
        total = spec.mlp_size(layer)
        if not spec.layers[layer].has_experts or total == 0:
            return self.ffn if total else Range(0, 0)
        start, stop = (
            total if end == spec.ffn_size else end * total // spec.ffn_size // 32 * 32
            for end in (self.ffn.start, self.ffn.stop)
        )
        return Range(start, stop)

    def experts_of(self, layer: int) -> tuple[ExpertShare, ...]:
        """What it has of a layer of the model."""
        return self.experts[layer - self.layers.start] if self.experts else ()


def whole(spec: ModelSpec) -> Shard:
    """All of a model on one rank."""
    experts = deal_evenly(spec, [1.0]) * spec.num_layers if spec.experts else ()
    return Shard(
        layers=Range(0, spec.num_layers),
        experts=experts,
        heads=Range(0, spec.num_heads),
        ffn=Range(0, spec.ffn_size),
        vocab=Range(0, spec.vocab_size),
    )


def cut(total: int, weights: Sequence[float], granule: int = 1) -> tuple[Range, ...]:
    """[0, total) in consecutive ranges as near to the weights as whole granules allow.

    Each boundary is rounded by itself, so that no error adds up; a weight of 0 gets nothing.

    Raises:
        ConfigError: weights that are negative, not numbers, or all 0.
    """
    if not weights or not sum(weights) > 0 or min(weights) < 0 or sum(weights) == float("inf"):
        raise ConfigError(
            f"the weights of a split are {list(weights)}; give each rank a number of at least 0, "
            "and one of them more than 0"
        )
    num_granules, all_weights = -(-total // granule), sum(weights)
    shares = itertools.accumulate(weights, initial=0.0)
    ends = [min(round(num_granules * share / all_weights) * granule, total) for share in shares]
    return tuple(Range(start, end) for start, end in itertools.pairwise(ends))


def stacked(sizes: Iterable[int]) -> tuple[Range, ...]:
    """Consecutive ranges of these sizes."""
    edges = itertools.accumulate(sizes, initial=0)
    return tuple(Range(start, stop) for start, stop in itertools.pairwise(edges))


def deal_evenly(spec: ModelSpec, weights: Sequence[float]) -> Dealing:
    """Consecutive experts, as many for each rank as its weight says; none are on two ranks."""
    num_experts = spec.experts.num_experts if spec.experts else 0
    return tuple(
        tuple(ExpertShare(expert) for expert in range(each.start, each.stop))
        for each in cut(num_experts, weights)
    )


def split_by_weights(spec: ModelSpec, weights: Sequence[float], granule: int = 1) -> Split:
    """A split of every layer in proportion to the weights.

    Heads are few, so what rounding them gives a rank too much or too little of attention is made
    up for in its FFN columns.

    Args:
        granule: of FFN columns (groups of quantised weights).
    """
    heads = cut(spec.num_heads, weights)
    attention, ffn = _layer_costs(spec)
    wanted = [(attention + ffn) * weight / sum(weights) for weight in weights]
    left = [
        max(0.0, each - attention * len(own) / spec.num_heads) if weight else 0.0
        for each, own, weight in zip(wanted, heads, weights, strict=True)
    ]
    columns = cut(spec.ffn_size, left if sum(left) > 0 else weights, granule)
    return Split(
        heads=heads,
        ffn=columns,
        vocab=cut(spec.vocab_size, weights, granule=16),
        experts=(deal_evenly(spec, weights),) if spec.experts else (),
    )


def shards(
    split: Split, layers: Range, *, has_embedding: bool, has_head: bool
) -> tuple[Shard, ...]:
    """What each rank of an instance holds."""
    dealings, streams = split.dealings(layers), split.streams
    return tuple(
        Shard(
            layers=layers,
            experts=tuple(dealing[rank] if dealing else () for dealing in dealings),
            kv=split.kv,
            heads=split.heads[rank],
            ffn=split.ffn[rank],
            vocab=split.vocab[rank],
            has_embedding=has_embedding,
            has_head=has_head,
            is_first=rank == 0,
            rank=rank,
            streams=streams,
            dealings=dealings if len(streams) < split.num_ranks else (),
            num_ranks=split.num_ranks,
        )
        for rank in range(split.num_ranks)
    )


def _layer_costs(spec: ModelSpec) -> tuple[float, float]:
    """Weights of a layer's attention and of its MLP, where it has no experts."""
    heads = 2 * spec.num_heads + 2 * spec.num_kv_heads
    return heads * spec.head_dim * spec.hidden_size, 3 * spec.ffn_size * spec.hidden_size
