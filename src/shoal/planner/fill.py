"""Layers over the stages of a pipeline, so that a token's period is shortest.

    time of a stage    t_s = n_s a_s + c_s      n_s layers, 1 <= n_s <= most_s, of one option
    period             max(sum of t_s + n_s l_s + hops,  M max of t_s / k_s)

with M micro-batches in flight and k_s instances that share a stage's work; l_s is what a layer's
work of other micro-batches holds up. For a limit X on
t_s / k_s the least sum is had by filling the stages with the cheapest layers first; a larger X
makes the sum smaller and the second term larger, so the best X is where they meet (bisection). A
stage that can hold its layers in several ways takes the fastest that has room. Of equal periods the
one with the most even stages is taken: it carries more when there is more to do. Knows nothing of
devices.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

_CLOSE = 1e-4
"""Limits that are so near to each other give the same layers."""
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Option:
    """A way to hold layers: seconds of each, seconds beside them, and room.

    `late_s`: of each layer, that a token's way takes longer than its work.
    """

    layer_s: float
    fixed_s: float
    most_layers: int
    late_s: float = 0.0

    def time_s(self, num_layers: int) -> float:
        return num_layers * self.layer_s + self.fixed_s


class StageTimes:
    """A stage's options, and the instances that share its work.

    What the fastest option with room takes is worked out for all counts of layers at once; it never
    falls with them.
    """

    def __init__(self, options: Sequence[Option], num_instances: int = 1) -> None:
        self.options, self.num_instances = tuple(options), num_instances
        self.most_layers = max([each.most_layers for each in self.options])

    @cached_property
    def least_layer_s(self) -> float:
        """Of any option."""
        return min([each.layer_s for each in self.options])

    @cached_property
    def least_fixed_s(self) -> float:
        """Of any option."""
        return min([each.fixed_s for each in self.options])

    def choose(self, num_layers: int) -> int | None:
        """The fastest option that has room; None: there is none."""
        return self.held(num_layers)[0]

    def time_s(self, num_layers: int) -> float:
        """With the fastest option; without end where none has room."""
        return self.held(num_layers)[1]

    def held(self, num_layers: int) -> tuple[int | None, float, float]:
        """The fastest option that has room, its time, and how much longer a token's way takes."""
        if num_layers > self.most_layers:
            return None, math.inf, 0.0
        if len(self.options) == 1:
            own = self.options[0]
            return 0, own.time_s(num_layers), num_layers * own.late_s
        chosen, times = self._fastest
        best = chosen[num_layers]
        return best, times[num_layers], num_layers * self.options[best].late_s

    def within(self, limit_s: float) -> int:
        """Layers that it runs in a time."""
        limit_s *= 1 + _ROUNDING
        if len(self.options) > 1:
            return max(bisect_right(self._fastest[1], limit_s) - 1, 0)
        (own,) = self.options
        left_s = limit_s - own.fixed_s
        if left_s >= own.layer_s * own.most_layers:
            return own.most_layers
        return int(left_s / own.layer_s) if left_s > 0 else 0

    @cached_property
    def _fastest(self) -> tuple[list[int], list[float]]:
        """By layers, from 0 to as many as there is room for: the option, and its time."""
        rows = [(each.layer_s, each.fixed_s, each.most_layers) for each in self.options]
        layer_s, fixed_s, room = np.array(rows).T
        counts = np.arange(max(self.most_layers, 0) + 1)[:, None]
        times = np.where(room >= counts, counts * layer_s + fixed_s, np.inf)
        chosen = times.argmin(axis=1)
        least = np.take_along_axis(times, chosen[:, None], 1)[:, 0]
        return chosen.tolist(), least.tolist()


def fill(
    stages: Sequence[StageTimes], num_layers: int, num_micro_batches: int, hops_s: float
) -> tuple[int, ...] | None:
    """Layers of each stage, at least 1; None: they have no room for all."""
    room = [each.most_layers for each in stages]
    if len(stages) > num_layers or sum(room) < num_layers or min(room) < 1:
        return None
    if len(stages) == 1:
        return (num_layers,)
    order = sorted(range(len(stages)), key=lambda index: sum(stages[index].held(1)[1:]))
    best = _filled(room, order, num_layers)
    assert best is not None, "room was counted above"
    path, slowest = periods(stages, best, num_micro_batches, hops_s)
    best_s = max(path, slowest)
    tight, loose = 0.0, slowest / num_micro_batches
    while loose - tight > _CLOSE * loose:
        middle = (tight + loose) / 2
        found = _filled(
            [each.within(middle * each.num_instances) for each in stages], order, num_layers
        )
        if found is None:
            tight = middle
            continue
        path, slowest = periods(stages, found, num_micro_batches, hops_s)
        is_as_good = max(path, slowest) <= best_s * (1 + _ROUNDING)
        if is_as_good:
            best, best_s = found, min(best_s, max(path, slowest))
        if is_as_good or slowest > path:
            # What it came to is less than what it was allowed.
            loose = min(middle, slowest / num_micro_batches)
        else:
            tight = middle
    return tuple(best)


def periods(
    stages: Sequence[StageTimes], layers: Sequence[int], num_micro_batches: int, hops_s: float
) -> tuple[float, float]:
    """A token's way through all stages, and what the slowest takes for all micro-batches."""
    path, slowest = hops_s, 0.0
    for count, each in zip(layers, stages, strict=True):
        _, time, late = each.held(count)
        path += time + late
        slowest = max(slowest, time / each.num_instances)
    return path, num_micro_batches * slowest


def _filled(room: Sequence[int], order: Sequence[int], num_layers: int) -> list[int] | None:
    """One layer for each stage, the others to the first in order; None: no room."""
    if min(room) < 1:
        return None
    layers, left = [1] * len(room), num_layers - len(room)
    for index in order:
        if room[index] > left:
            layers[index] += left
            return layers
        layers[index] = room[index]
        left -= room[index] - 1
    return None if left else layers
