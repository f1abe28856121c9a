"""Heads and FFN columns of a layer over ranks that differ, by speed and by memory.

    time of a rank    max(bytes / rate, flops / rate)  of its heads, KV heads and columns, to decode
                      + flops / rate of prompts that come with it, and of attention
                      + KV that its KV heads read / rate

Heads are few and cut in several ways; for each of them columns fill up what a limit on the time
leaves, and the limit is lowered until the columns just have room (bisection). Where memory binds,
ranks get no more than their part of it. Knows nothing of pipelines.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from shoal.core.model_spec import ModelSpec
from shoal.core.split import Range, Split, cut, split_by_weights, stacked

GRANULE = 32
"""FFN columns are cut at multiples of so many, as plan files want it."""

_HALVINGS = 30
_MOST_COMPOSITIONS = 120


@dataclass(frozen=True, slots=True, kw_only=True)
class RankRates:
    """What bounds a rank's part of a layer.

    Attributes:
        bytes_per_s, flops_per_s, attention_flops_per_s: that its kernels reach.
        most_bytes: of weights and KV in a layer; infinite: memory does not bind.
    """

    bytes_per_s: float
    flops_per_s: float
    attention_flops_per_s: float
    most_bytes: float = math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class Units:
    """What parts of a layer take.

    Attributes:
        weight_bytes: of one weight.
        num_reads: of all weights; 0: only prompts count.
        kv_read_bytes, kv_kept_bytes: of one KV head, in a step, and in memory.
        column_bytes: of what a step takes for a column, by layer.
        num_tokens: that a step decodes.
        prompt_tokens: that come with it.
        head_flops: of attention, for a query head.
    """

    weight_bytes: float
    kv_read_bytes: float
    kv_kept_bytes: float
    column_bytes: float
    num_tokens: float
    prompt_tokens: float
    head_flops: float
    num_reads: float = 1.0


def balanced(spec: ModelSpec, ranks: Sequence[RankRates], units: Units) -> Split | None:
    """The split whose slowest rank is fastest; None: memory does not hold a layer."""
    weights = [each.bytes_per_s for each in ranks]
    if spec.experts is not None or spec.latent is not None:
        return split_by_weights(spec, weights, granule=GRANULE)
    best: tuple[float, tuple[int, ...], tuple[int, ...]] | None = None
    for heads in _head_cuts(spec, weights):
        found = _columns(spec, heads, ranks, units, best[0] if best else math.inf)
        if found is not None and (best is None or found[0] < best[0]):
            best = found[0], heads, found[1]
    if best is None:
        return None
    columns = _whole(best[2], spec.ffn_size)
    return Split(
        heads=stacked(best[1]), ffn=stacked(columns), vocab=cut(spec.vocab_size, weights, 16)
    )


def _head_cuts(spec: ModelSpec, weights: Sequence[float]) -> Iterator[tuple[int, ...]]:
    """By weight; in whole groups of a KV head; and all there are, if they are few."""
    yield tuple(len(each) for each in cut(spec.num_heads, weights))
    group = spec.num_heads // spec.num_kv_heads
    yield tuple(len(each) for each in cut(spec.num_heads, weights, granule=group))
    count = math.comb(spec.num_heads + len(weights) - 1, len(weights) - 1)
    if count <= _MOST_COMPOSITIONS:
        yield from compositions(spec.num_heads, len(weights))


def compositions(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    """All ways to share out a number, parts of 0 among them."""
    for edges in itertools.combinations_with_replacement(range(total + 1), parts - 1):
        yield tuple(b - a for a, b in itertools.pairwise((0, *edges, total)))


def _columns(
    spec: ModelSpec,
    heads: Sequence[int],
    ranks: Sequence[RankRates],
    units: Units,
    at_most_s: float,
) -> tuple[float, tuple[int, ...]] | None:
    """The least time of the slowest rank, and the columns of each, in granules; None: no room, or
    not in that time."""
    parts = [
        _Part.of(spec, own, rank, units) for own, rank in zip(stacked(heads), ranks, strict=True)
    ]
    num_granules = -(-spec.ffn_size // GRANULE)
    if any(part.most_columns < 0 for part in parts):
        return None
    longest_s = max(part.time_s(num_granules * GRANULE) for part in parts)
    tight, loose = 0.0, min(longest_s, at_most_s)
    most: list[int] | None = None
    for _ in range(_HALVINGS):
        limit = loose if most is None else (tight + loose) / 2
        room = [int(part.columns_within(limit) // GRANULE) for part in parts]
        if min(room) >= 0 and sum(room) >= num_granules:
            most, loose = room, limit
        elif most is None:
            return None
        else:
            tight = limit
    assert most is not None
    best = _trimmed(most, num_granules)
    times = [part.time_s(n * GRANULE) for part, n in zip(parts, best, strict=True)]
    return max(times), best


@dataclass(frozen=True, slots=True)
class _Part:
    """A rank's heads are settled: what it takes is a line in its columns."""

    most_bytes: float
    fixed_weights: float
    fixed_s: float
    column_weights: float
    column_bytes: float
    weight_bytes: float
    weight_s: float

    @classmethod
    def of(cls, spec: ModelSpec, heads: Range, rank: RankRates, units: Units) -> _Part:
        group = spec.num_heads // spec.num_kv_heads
        kv_heads = -(-heads.stop // group) - heads.start // group if len(heads) else 0
        head_weights = spec.head_dim * spec.hidden_size
        return cls(
            most_bytes=rank.most_bytes - kv_heads * units.kv_kept_bytes,
            fixed_weights=2 * head_weights * (len(heads) + kv_heads),
            fixed_s=kv_heads * units.kv_read_bytes / rank.bytes_per_s
            + len(heads) * units.head_flops / rank.attention_flops_per_s,
            column_weights=3 * spec.hidden_size,
            column_bytes=3 * spec.hidden_size * units.weight_bytes + units.column_bytes,
            weight_bytes=units.weight_bytes,
            weight_s=max(
                units.num_reads * units.weight_bytes / rank.bytes_per_s,
                2 * units.num_tokens / rank.flops_per_s,
            )
            + 2 * units.prompt_tokens / rank.flops_per_s,
        )

    @property
    def most_columns(self) -> float:
        """That memory holds."""
        return (self.most_bytes - self.fixed_weights * self.weight_bytes) / self.column_bytes

    def time_s(self, columns: int) -> float:
        weights = self.fixed_weights + columns * self.column_weights
        return self.fixed_s + weights * self.weight_s

    def columns_within(self, limit_s: float) -> float:
        """In a time; less than 0: the heads alone take longer."""
        weights = (limit_s - self.fixed_s) / self.weight_s
        by_time = (weights - self.fixed_weights) / self.column_weights
        return min(by_time, self.most_columns, 1e9)


def _trimmed(room: Sequence[int], total: int) -> tuple[int, ...]:
    """As much of the room as is needed, in the same proportions."""
    if sum(room) == total:
        return tuple(room)
    shares = [len(each) for each in cut(total, room)]
    over = [max(own - most, 0) for own, most in zip(shares, room, strict=True)]
    left = sum(over)
    taken = [own - more for own, more in zip(shares, over, strict=True)]
    for index, most in enumerate(room):
        more = min(most - taken[index], left)
        taken[index] += more
        left -= more
    return tuple(taken)


def _whole(granules: Sequence[int], total: int) -> tuple[int, ...]:
    """Columns of so many granules; the last one that has any ends at the total."""
    ends = [min(each * GRANULE, total) for each in itertools.accumulate(granules)]
    return tuple(b - a for a, b in itertools.pairwise((0, *ends)))
