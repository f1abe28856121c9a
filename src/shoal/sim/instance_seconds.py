"""Seconds of a Step on an instance by the cost model, for whoever asks a million times.

    time(load)   what tokens alone decide (weights, products, sums between ranks)   kept by tokens
                 + attention: what is read or multiplied, the longer and of the shorter what is
                   exposed                                                       linear in both

Both slopes are taken from the model itself, with loads too long to leave anything else in sight.
Knows nothing of Steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from shoal.policy.cost_model.loads import StepLoad, Windows
from shoal.policy.cost_model.times import InstanceCost

_MANY = 1 << 40
_MOST_KEPT = 100_000

Slopes = tuple[tuple[float, ...], ...]
"""Seconds of one position or pair: of each rank, in each window."""


class InstanceSeconds:
    """`cost.time(load).total_s`; of loads by these windows."""

    def __init__(self, cost: InstanceCost, windows: Windows) -> None:
        self._cost = cost
        self._windows = windows
        self._none = (0,) * len(windows)
        self._reads = self._slopes(reads=True)
        self._pairs = self._slopes(reads=False)
        self._exposed = cost.exposed
        # By tokens, rows that sample, and prompts that end.
        self._fixed: dict[tuple[int, int, int], tuple[tuple[float, ...], float]] = {}

    def __call__(self, load: StepLoad) -> float:
        fixed, communication_s = self._without_attention(load)
        if len(fixed) == len(self._windows) == 1:
            attention_s = _both(
                self._reads[0][0] * load.kv_tokens[0],
                self._pairs[0][0] * load.pairs[0],
                self._exposed[0],
            )
            return fixed[0] + attention_s + communication_s
        ranks = zip(fixed, self._reads, self._pairs, self._exposed, strict=True)
        slowest = max(
            seconds + _both(_sum(reads, load.kv_tokens), _sum(pairs, load.pairs), exposed)
            for seconds, reads, pairs, exposed in ranks
        )
        return slowest + communication_s

    def decodes(self, lengths: Sequence[int], count: int) -> list[float]:
        """Of so many Steps, each with a token of each sequence; the very floats of one by one.

        Args:
            lengths: positions that each attends to in the first of them.
        """
        if self._windows != (None,):
            return [self(load) for load in decode_loads(lengths, count, self._windows)]
        num_rows, total = len(lengths), sum(lengths)
        bare = StepLoad(num_rows, num_rows, self._windows, self._none, self._none)
        fixed, communication_s = self._without_attention(bare)
        # A token reads as many positions as it makes pairs.
        reads = range(total, total + count * num_rows, num_rows)
        if any(self._exposed):
            of_ranks = zip(fixed, self._reads, self._pairs, self._exposed, strict=True)
            ranks = [(f, r[0], p[0], exposed) for f, r, p, exposed in of_ranks]
            return [
                max(f + _both(r * n, p * n, exposed) for f, r, p, exposed in ranks)
                + communication_s
                for n in reads
            ]
        slopes = (max(r[0], p[0]) for r, p in zip(self._reads, self._pairs, strict=True))
        lines = list(dict.fromkeys(zip(fixed, slopes, strict=True)))
        if len(lines) > 1:
            return [max(f + slope * n for f, slope in lines) + communication_s for n in reads]
        ((seconds, slope),) = lines
        return [seconds + slope * n + communication_s for n in reads]

    def _without_attention(self, load: StepLoad) -> tuple[tuple[float, ...], float]:
        """Of each rank, and of all sums between them."""
        key = load.num_tokens, load.num_sampled, load.num_ended
        known = self._fixed.get(key)
        if known is not None:
            return known
        bare = StepLoad(
            load.num_tokens,
            load.num_sampled,
            self._windows,
            self._none,
            self._none,
            load.num_ended,
        )
        if len(self._fixed) >= _MOST_KEPT:
            self._fixed.clear()
        self._fixed[key] = found = self._rank_seconds(bare), self._cost.communication_s(bare)
        return found

    def _slopes(self, *, reads: bool) -> Slopes:
        bare = self._rank_seconds(StepLoad(0, 0, self._windows, self._none, self._none))
        by_window = []
        for index in range(len(self._windows)):
            many = (*self._none[:index], _MANY, *self._none[index + 1 :])
            kv_tokens, pairs = (many, self._none) if reads else (self._none, many)
            by_window.append(self._rank_seconds(StepLoad(0, 0, self._windows, kv_tokens, pairs)))
        return tuple(
            tuple((seconds[rank] - base) / _MANY for seconds in by_window)
            for rank, base in enumerate(bare)
        )

    def _rank_seconds(self, load: StepLoad) -> tuple[float, ...]:
        return tuple(each.total_s for each in self._cost.rank_times(load))


def decode_loads(lengths: Sequence[int], count: int, windows: Windows) -> Iterator[StepLoad]:
    """As `InstanceSeconds.decodes` has them."""
    num_rows, total = len(lengths), sum(lengths)
    for ahead in range(count):
        read = tuple(
            total + ahead * num_rows
            if window is None
            else sum(min(each + ahead, window) for each in lengths)
            for window in windows
        )
        yield StepLoad(num_rows, num_rows, windows, read, read)


def _both(reads: float, pairs: float, exposed: float) -> float:
    return reads + exposed * pairs if reads >= pairs else pairs + exposed * reads


def _sum(slopes: Sequence[float], amounts: Sequence[int]) -> float:
    return sum(slope * amount for slope, amount in zip(slopes, amounts, strict=True))
