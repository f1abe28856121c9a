"""Heads and FFN columns of a layer over ranks that differ, by speed and by memory.

    of a rank    c + max(bytes / rate, flops / rate) of weights, and of attention
    D, P         that of the slowest rank, in a step, and in a prompt
    sought       the least D + w P, for several w

What a rank takes is a line in its columns, once its heads are settled. Heads are cut in several
ways. In the best split for some w the slowest rank of a step is the slowest of a prompt, too (or
only one of the two counts, or memory binds): along each such line both limits are lowered together
until the columns just have room (bisection), for all cuts of heads and all loads at once. Of what
is found, a split is dropped that another one equals in all. Knows nothing of pipelines.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from shoal.core.model_spec import ModelSpec
from shoal.core.split import Split, cut, split_by_weights, stacked

GRANULE = 32
"""FFN columns are cut at multiples of so many, as plan files want it."""

_HALVINGS = 26
_MOST_COMPOSITIONS = 130
_ALIKE = 1e-3
"""Splits that differ by less than that are the same."""
_ENDLESS = 1e30

Array = npt.NDArray[np.float64]
_Cut = tuple[tuple[int, ...], tuple[int, ...]]
"""Heads and granules of columns of each rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankRates:
    """What bounds a rank's part of a layer; `layer_s` is what any layer takes, however small."""

    bytes_per_s: float
    flops_per_s: float
    attention_flops_per_s: float
    layer_s: float
    exposed: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What a prompt takes.

    Attributes:
        num_tokens: of it.
        kv_read_bytes: of one KV head.
        head_flops: of attention, for a query head.
    """

    num_tokens: float
    kv_read_bytes: float
    head_flops: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """A step for which a split is to be quick, and the room that there is.

    Attributes:
        num_tokens: that it decodes.
        kv_read_bytes, kv_kept_bytes: of one KV head, in a step, and in memory.
        head_flops: of attention, for a query head.
        column_bytes: of what a step takes for a column, by layer.
        most_bytes: of each rank, of weights and KV in a layer; infinite: memory does not bind.
        prompts: for each step, as many weights as other loads have; nothing and a prompt alone are
            looked at besides.
    """

    num_tokens: float
    kv_read_bytes: float
    kv_kept_bytes: float
    head_flops: float
    column_bytes: float
    most_bytes: tuple[float, ...]
    prompts: tuple[float, ...]


def quick_splits(
    spec: ModelSpec,
    ranks: Sequence[RankRates],
    weight_bytes: float,
    prompt: Prompt,
    loads: Sequence[Load],
) -> list[Split]:
    """Splits that are the quickest of some load, with some weight of prompts; none: no room.

    Args:
        weight_bytes: of one weight.
    """
    speeds = [each.bytes_per_s for each in ranks]
    if spec.experts is not None or spec.latent is not None:
        return [split_by_weights(spec, speeds, granule=GRANULE)]
    found = _Layer(spec, ranks, weight_bytes, prompt, loads).quickest()
    vocab = cut(spec.vocab_size, speeds, 16)
    return [
        Split(heads=stacked(heads), ffn=stacked(_whole(columns, spec.ffn_size)), vocab=vocab)
        for heads, columns in found
    ]


class _Layer:
    """Lines of all loads (K), cuts of heads (C) and ranks (R): times of heads, and of a column."""

    def __init__(
        self,
        spec: ModelSpec,
        ranks: Sequence[RankRates],
        weight_bytes: float,
        prompt: Prompt,
        loads: Sequence[Load],
    ) -> None:
        def of_ranks(name: str) -> Array:
            return np.array([getattr(each, name) for each in ranks])

        def of_loads(name: str) -> Array:
            return np.array([getattr(each, name) for each in loads]).reshape(len(loads), -1)

        rates, flops = of_ranks("bytes_per_s"), of_ranks("flops_per_s")
        self.heads = np.array(list(_head_cuts(spec, list(rates))))
        self.num_granules = -(-spec.ffn_size // GRANULE)
        heads, kv = self.heads, _kv_heads(spec, self.heads)
        head_weights = 2.0 * spec.head_dim * spec.hidden_size * (heads + kv)
        column_weights = 3.0 * spec.hidden_size * GRANULE
        reads_s = weight_bytes / rates
        exposed = of_ranks("exposed")
        step_s = _both(reads_s, 2 * of_loads("num_tokens") / flops, exposed)[:, None]
        prompt_s = _both(reads_s, 2 * prompt.num_tokens / flops, exposed)
        attention = of_ranks("attention_flops_per_s")
        step_attention_s = _both(
            of_loads("kv_read_bytes")[:, None] * kv / rates,
            of_loads("head_flops")[:, None] * heads / attention,
            exposed,
        )
        prompt_attention_s = _both(
            prompt.kv_read_bytes * kv / rates, prompt.head_flops * heads / attention, exposed
        )
        # (K, C, R) and (K, 1, R); (C, R) and (R).
        self.step_s = of_ranks("layer_s") + step_attention_s + head_weights * step_s
        self.step_granule_s = column_weights * step_s
        self.prompt_s = of_ranks("layer_s") + prompt_attention_s + head_weights * prompt_s
        self.prompt_granule_s = column_weights * prompt_s
        kept = of_loads("kv_kept_bytes")[:, None] * kv + head_weights * weight_bytes
        granule_bytes = column_weights * weight_bytes + GRANULE * of_loads("column_bytes")[:, None]
        self.prompts = of_loads("prompts")
        self.room = np.minimum((of_loads("most_bytes")[:, None] - kept) / granule_bytes, _ENDLESS)

    def quickest(self) -> list[_Cut]:
        """Heads and granules of columns of each rank."""
        granules, fits = self._filled()
        # A rank that has nothing is better left out.
        fits &= (self.heads[None, :, None] + granules > 0).all(-1)
        step_s = (self.step_s[:, :, None] + self.step_granule_s[:, :, None] * granules).max(-1)
        prompt_s = (self.prompt_s[:, None] + self.prompt_granule_s * granules).max(-1)
        num_lines = granules.shape[2]
        found: dict[_Cut, None] = {}
        mixed = (step_s + each[:, None, None] * prompt_s for each in self.prompts.T)
        for cost in (step_s, *mixed, prompt_s):
            best = np.where(fits, cost, np.inf).reshape(len(cost), -1).argmin(axis=1)
            for load, index in enumerate(best):
                number, line = divmod(int(index), num_lines)
                if fits[load, number, line]:
                    taken = _trimmed(granules[load, number, line].tolist(), self.num_granules)
                    found[tuple(self.heads[number].tolist()), taken] = None
        return self._unlike(list(found))

    def _filled(self) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
        """(K, C, lines, R): granules of each rank at the tightest limit on each line that holds
        all; and (K, C, lines): whether any does."""
        starts, rates = self._lines()
        room = self.room[:, :, None]

        def held(limit: Array) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
            by_time = ((limit[..., None] - starts) * rates).min(axis=0)
            most = np.floor(np.minimum(by_time, room) + 1e-9)
            return most, (most.min(-1) >= 0) & (most.sum(-1) >= self.num_granules)

        loose = (starts + self.num_granules / rates).max(axis=(0, -1)) * (1 + 1e-9)
        tight = np.zeros_like(loose)
        fits = held(loose)[1]
        for _ in range(_HALVINGS):
            middle = (tight + loose) / 2
            enough = held(middle)[1]
            loose, tight = np.where(enough, middle, loose), np.where(enough, tight, middle)
        return np.where(fits[..., None], held(loose)[0], 0).astype(int), fits

    def _lines(self) -> tuple[Array, Array]:
        """(2, K, C, lines, R): what a step and a prompt leave of a limit, and granules for it.

        On line j the limit of prompts is where rank j takes as long as the limit of a step; on the
        last two lines only the step counts, and only the prompt.
        """
        num_loads, num_cuts, num_ranks = self.step_s.shape
        shape = (num_loads, num_cuts, num_ranks + 2, num_ranks)
        starts, rates = np.zeros((2, *shape)), np.full((2, *shape), _ENDLESS)
        steps = np.broadcast_to(self.step_granule_s, self.step_s.shape)
        starts[0, :, :, :-1] = self.step_s[:, :, None]
        rates[0, :, :, :-1] = 1 / steps[:, :, None]
        ratio = (steps / self.prompt_granule_s)[..., None]
        later = self.prompt_s[:, None, :] - self.prompt_s[:, :, None]
        starts[1, :, :, :-2] = self.step_s[..., None] + later * ratio
        rates[1, :, :, :-2] = 1 / (self.prompt_granule_s * ratio)
        starts[1, :, :, -1] = self.prompt_s
        rates[1, :, :, -1] = 1 / self.prompt_granule_s
        return starts, rates

    def _unlike(self, found: list[_Cut]) -> list[_Cut]:
        """Without those that another one equals or beats: in steps, in a prompt, and in room."""
        if len(found) < 2:
            return found
        numbers = {tuple(heads): number for number, heads in enumerate(self.heads.tolist())}
        cuts = [numbers[heads] for heads, _ in found]
        granules = np.array([each for _, each in found])
        times = np.vstack(
            [
                (self.step_s[:, cuts] + self.step_granule_s * granules).max(-1),
                (self.prompt_s[cuts] + self.prompt_granule_s * granules).max(-1)[None],
            ]
        ).T
        spare = np.where(granules > 0, self.room[:, cuts] / np.maximum(granules, 1), _ENDLESS)
        room = np.round(np.minimum(spare.min(-1), 1.0) / _ALIKE).T
        kept: list[int] = []
        for number in np.argsort(times.sum(axis=1) / times.sum(), kind="stable").tolist():
            beaten = any(
                bool(
                    (times[other] <= times[number] * (1 + _ALIKE)).all()
                    and (room[other] >= room[number]).all()
                )
                for other in kept
            )
            if not beaten:
                kept.append(number)
        return [found[number] for number in sorted(kept)]


def _both(reads_s: Array, products_s: Array, exposed: Array) -> Array:
    """The longer, and of the shorter what it does not hide."""
    return np.maximum(reads_s, products_s) + exposed * np.minimum(reads_s, products_s)


def _kv_heads(spec: ModelSpec, heads: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """That each rank's heads touch."""
    group = spec.num_heads // spec.num_kv_heads
    stops = heads.cumsum(axis=1)
    return np.where(heads > 0, -(-stops // group) - (stops - heads) // group, 0)


def _head_cuts(spec: ModelSpec, weights: Sequence[float]) -> Iterator[tuple[int, ...]]:
    """By weight; in whole groups of a KV head; and all there are, if they are few."""
    group = spec.num_heads // spec.num_kv_heads
    by_weight = tuple(len(each) for each in cut(spec.num_heads, weights))
    in_groups = tuple(len(each) for each in cut(spec.num_heads, weights, granule=group))
    count = math.comb(spec.num_heads + len(weights) - 1, len(weights) - 1)
    every = compositions(spec.num_heads, len(weights)) if count <= _MOST_COMPOSITIONS else ()
    yield from dict.fromkeys((by_weight, in_groups, *every))


def compositions(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    """All ways to share out a number, parts of 0 among them."""
    for edges in itertools.combinations_with_replacement(range(total + 1), parts - 1):
        yield tuple(b - a for a, b in itertools.pairwise((0, *edges, total)))


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
