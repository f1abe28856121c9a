"""How a model is shared out: half-open ranges per rank, of any sizes, nothing need divide.

    9 query heads over weights 1 : 0.3       [0, 7) [7, 9)
    3 KV heads, 3 query heads each           KV 0-2 on rank 0, KV 2 on rank 1 too: heads 6 | 7, 8

Query heads decide; the KV heads they touch follow, and one that straddles two ranks is computed
on both. The only place that divides a model by ranks. Knows nothing of devices.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """What each rank of an instance owns of every layer, and of the vocabulary.

    Each tuple has a range per rank, in order, together [0, total); a range may be empty.
    """

    heads: tuple[Range, ...]
    ffn: tuple[Range, ...]
    vocab: tuple[Range, ...]

    @property
    def num_ranks(self) -> int:
        return len(self.heads)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """What one rank holds.

    Attributes:
        layers: of the model.
        heads, ffn, vocab: its ranges of query heads, FFN columns and token ids.
        has_embedding, has_head: whether its instance embeds tokens, and makes logits.
        is_first: adds what must be added once only (biases).
        num_ranks: of its instance.
    """

    layers: Range
    heads: Range
    ffn: Range
    vocab: Range
    has_embedding: bool = True
    has_head: bool = True
    is_first: bool = True
    num_ranks: int = 1

    def kv_heads(self, spec: ModelSpec) -> Range:
        """KV heads that its query heads read."""
        group = spec.num_heads // spec.num_kv_heads
        if not len(self.heads):
            return Range(0, 0)
        return Range(self.heads.start // group, -(-self.heads.stop // group))

    def head_offset(self, spec: ModelSpec) -> int:
        """Query heads of its first KV head that other ranks own.

        Its query head h (from 0) reads its KV head (h + offset) // (heads of a KV head).
        """
        return self.heads.start % (spec.num_heads // spec.num_kv_heads)


def whole(spec: ModelSpec) -> Shard:
    """All of a model on one rank."""
    return Shard(
        layers=Range(0, spec.num_layers),
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
    return Split(heads=heads, ffn=columns, vocab=cut(spec.vocab_size, weights, granule=16))


def shards(
    split: Split, layers: Range, *, has_embedding: bool, has_head: bool
) -> tuple[Shard, ...]:
    """What each rank of an instance holds."""
    return tuple(
        Shard(
            layers=layers,
            heads=split.heads[rank],
            ffn=split.ffn[rank],
            vocab=split.vocab[rank],
            has_embedding=has_embedding,
            has_head=has_head,
            is_first=rank == 0,
            num_ranks=split.num_ranks,
        )
        for rank in range(split.num_ranks)
    )


def _layer_costs(spec: ModelSpec) -> tuple[float, float]:
    """Weights of a layer's attention and of its MLP: what a decode step reads of them."""
    heads = 2 * spec.num_heads + 2 * spec.num_kv_heads
    return heads * spec.head_dim * spec.hidden_size, 3 * spec.ffn_size * spec.hidden_size
