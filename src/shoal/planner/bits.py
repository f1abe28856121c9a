"""Bits of weights for what they are worth: within a limit of quality, and more where they are free.

    within     the layers and precisions of a pipeline whose tokens come soonest within the limit:
               a layer's time has a price for each quality that it loses (Lagrange), the price is
               halved and doubled until what is lost is just within the limit. Stages that are
               alike are told apart by a little, so that they change one after another; where there
               are few ways, single stages then take fewer bits, those first that gain most
    richer     a stage gets more bits where its replica does not become worse by more than counts,
               or, without a limit, than what it gains in quality

Knows nothing of where losses come from (`quality.py`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from shoal.planner.fill import StageTimes, fill, periods

Held = tuple[tuple[int, ...], tuple[int, ...]]
"""Layers and variants of each stage."""

NOISE = 0.01
"""Of what a plan is worth, below which plans are equal."""

_APART = 1e-3
_FIRST_PRICE = 1e-2
_MOST_PRICE = 1e6
_STEP = 10.0
_CLOSE = 1.1
_MOST_TRIED = 12
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Limit:
    """
    Attributes:
        losses: of each stage, for each of its variants: ln of perplexity's ratio if the whole model
            were like it.
        most: of all layers together.
    """

    losses: tuple[tuple[float, ...], ...]
    most: float

    def loss(self, held: Held) -> float:
        parts = zip(*held, self.losses, strict=True)
        return sum(n * losses[v] for n, v, losses in parts) / sum(held[0])

    def allows(self, held: Held) -> bool:
        return self.loss(held) <= self.most * (1 + _ROUNDING)


def within(
    stages: Sequence[StageTimes],
    num_layers: int,
    num_micro_batches: int,
    hops_s: float,
    limit: Limit,
) -> Held | None:
    """The layers and variants with which tokens come soonest; None: nothing is within the limit."""

    def period_s(held: Held) -> float:
        fixed = _fixed(stages, held[1])
        return max(periods(fixed, held[0], num_micro_batches, hops_s))

    def at(price: float) -> Held | None:
        priced = _priced(stages, limit, price)
        return _filled(priced, num_layers, num_micro_batches, hops_s)

    found = at(0.0)
    if found is None or limit.allows(found):
        return found
    low, high = _FIRST_PRICE, _FIRST_PRICE
    while not limit.allows(found):
        low, high = high, high * _STEP
        found = at(high)
        if found is None or high > _MOST_PRICE:
            return None
    best = found
    while high / low > _CLOSE:
        middle = (low * high) ** 0.5
        found = at(middle)
        if found is not None and limit.allows(found):
            high = middle
            best = min(best, found, key=period_s)
        else:
            low = middle
    if sum(len(each.options) for each in stages) > _MOST_TRIED:
        return best
    return _with_fewer(stages, best, limit, period_s, (num_layers, num_micro_batches, hops_s))


def richer(
    held: Held,
    losses: Sequence[Sequence[float]],
    worth: Callable[[Held], float | None],
    *,
    trades: bool,
) -> Held:
    """The same layers with more bits, where they cost next to nothing.

    Args:
        losses: as of `Limit`.
        worth: of a replica that works with these; None: there is no room.
        trades: a hundredth more perplexity is worth a hundredth more of that.
    """
    layers, best = held
    first = worth(held)
    if not first:
        return held
    limit = Limit(tuple(map(tuple, losses)), 0.0)
    for stage in sorted(range(len(layers)), key=lambda n: -layers[n] * losses[n][best[n]]):
        own = losses[stage]
        more = [v for v in range(len(own)) if own[v] < own[best[stage]]]
        for variant in sorted(more, key=lambda each: own[each]):
            tried = layers, _put(best, stage, variant)
            value = worth(tried)
            gained = limit.loss(held) - limit.loss(tried) if trades else 0.0
            if value is not None and value >= first * (1 - max(NOISE, gained)):
                best = tried[1]
                break
    return layers, best


def _priced(stages: Sequence[StageTimes], limit: Limit, price: float) -> list[StageTimes]:
    """Layers that lose quality take longer, by what the price says, in times of a usual layer."""
    usual_s = min(option.layer_s for each in stages for option in each.options)
    scale_s = price * usual_s / max(limit.most, max(map(max, limit.losses)) * _APART)
    return [
        StageTimes(
            tuple(
                replace(option, layer_s=option.layer_s + scale_s * loss * (1 + _APART * index))
                for option, loss in zip(each.options, losses, strict=True)
            ),
            each.num_instances,
        )
        for index, (each, losses) in enumerate(zip(stages, limit.losses, strict=True))
    ]


def _filled(
    stages: Sequence[StageTimes], num_layers: int, num_micro_batches: int, hops_s: float
) -> Held | None:
    layers = fill(stages, num_layers, num_micro_batches, hops_s)
    if layers is None:
        return None
    chosen = (each.choose(n) for n, each in zip(layers, stages, strict=True))
    return layers, tuple(each for each in chosen if each is not None)


def _with_fewer(
    stages: Sequence[StageTimes],
    held: Held,
    limit: Limit,
    period_s: Callable[[Held], float],
    load: tuple[int, int, float],
) -> Held:
    """Single stages in other variants, with their layers shared out anew, while that helps."""
    best = held
    while True:
        tried = []
        for stage, each in enumerate(stages):
            for variant in range(len(each.options)):
                if variant != best[1][stage]:
                    variants = _put(best[1], stage, variant)
                    found = fill(_fixed(stages, variants), *load)
                    tried += [(found, variants)] if found is not None else []
        tried += [(layers, best[1]) for layers in _shifted(best[0])]
        fit = [each for each in tried if limit.allows(each) and _has_room(stages, each)]
        better = min(fit, key=period_s, default=best)
        if period_s(better) >= period_s(best) * (1 - _ROUNDING):
            return best
        best = better


def _shifted(layers: tuple[int, ...]) -> list[tuple[int, ...]]:
    found = []
    for sender, receiver in itertools.permutations(range(len(layers)), 2):
        if layers[sender] > 1:
            other = list(layers)
            other[sender] -= 1
            other[receiver] += 1
            found.append(tuple(other))
    return found


def _has_room(stages: Sequence[StageTimes], held: Held) -> bool:
    parts = zip(*held, stages, strict=True)
    return all(n <= each.options[v].most_layers for n, v, each in parts)


def _fixed(stages: Sequence[StageTimes], variants: Sequence[int]) -> list[StageTimes]:
    parts = zip(stages, variants, strict=True)
    return [StageTimes((each.options[v],), each.num_instances) for each, v in parts]


def _put(variants: tuple[int, ...], stage: int, variant: int) -> tuple[int, ...]:
    return (*variants[:stage], variant, *variants[stage + 1 :])
