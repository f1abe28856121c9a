"""Pipelines that bring more than their devices' prices, by dynamic programming.

For a batch, a number of stages S and the time of the slowest,

    cost[s, l] = min over offers o   price_o + cost[s - 1, l - layers of o in that time]

and the cheapest that hold all layers, with and without what embedding and head take besides. Not
counted: messages between stages, and what prompts hold up. Knows nothing of where prices come from.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shoal.planner.inventory import Form
from shoal.planner.profiles import Problem, Variant

_DEPTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32)
"""Stages of pipelines that prices are asked for."""
_BATCHES = (1, 4, 8, 16, 24, 32, 48, 64, 96, 128, 256)
_SLACKS = (1.0, 0.7, 0.5)
"""Of the time that the SLO leaves for a step of the slowest stage."""
_PACES = (1.1, 1.4, 2.0, 3.0)
"""Without a SLO: of the time that a stage of the quickest form takes for its part."""

Stages = tuple[tuple[Form, int], ...]
"""Of each stage its form and how many groups of it are its instances."""


@dataclass(frozen=True, slots=True)
class Offer:
    """A stage that could be had: so many alike groups.

    Attributes:
        uses: of each resource of the stock, by its number.
        copies: how many such stages there may be.
        price: of all its groups.
    """

    form: Form
    instances: int
    uses: tuple[tuple[int, int], ...]
    copies: int
    price: float
    variants: Sequence[Variant]


class Pricing:
    """
    Args:
        stock: of each resource.
    """

    def __init__(self, problem: Problem, offers: Sequence[Offer], stock: Sequence[int]) -> None:
        self.goal, self.num_layers = problem.goal, problem.spec.num_layers
        self.offers, self.stock = offers, stock
        # Embedding and head take the place of layers.
        self._most_layers = self.num_layers + self.num_layers // 16 + 1

    def pipelines(self) -> dict[Stages, float]:
        """With what they are thought to bring for what they cost."""
        found: dict[Stages, float] = {}
        for batch in (each for each in _BATCHES if each <= self.goal.max_concurrency):
            for depth in (each for each in _DEPTHS if each <= self.num_layers):
                if batch * depth > self.goal.max_concurrency:
                    break
                for pace_s in self._paces(batch, depth):
                    rate = batch / (self.goal.output_tokens * pace_s)
                    for price, stages in self._cheapest(batch, depth, pace_s):
                        worth = rate / max(price, 1e-12)
                        if worth > found.get(stages, 0.0):
                            found[stages] = worth
        return found

    def _paces(self, batch: int, depth: int) -> list[float]:
        """Seconds of the slowest stage."""
        if self.goal.slo.tpot_s is not None:
            return [self.goal.slo.tpot_s / depth * each for each in _SLACKS]
        quickest_s = min(
            self.num_layers / depth * self._layer_s(each, batch) + each.step_s
            for offer in self.offers
            for each in offer.variants
        )
        return [quickest_s * each for each in _PACES]

    def _layer_s(self, variant: Variant, batch: int) -> float:
        return variant.layer_s(batch) + batch / self.goal.output_tokens * variant.prompt_layer_s

    def _cheapest(self, batch: int, depth: int, pace_s: float) -> Iterator[tuple[float, Stages]]:
        """Of so many stages, none of which takes longer: those that just hold all layers, and those
        that hold embedding and head besides."""
        held = ((each, self._held(each, batch, depth, pace_s)) for each in self.offers)
        items = _worthwhile([(each, layers) for each, layers in held if layers], depth)
        if not items:
            return
        cost, taken = packed_stages(
            [(each.price, layers, min(each.copies, depth)) for each, layers in items],
            depth,
            self._most_layers,
        )
        for num_layers in (self.num_layers, self._most_layers):
            if np.isfinite(cost[depth, num_layers]):
                counts = traced(taken, [layers for _, layers in items], depth, num_layers)
                chosen = [
                    each for (each, _), n in zip(items, counts, strict=True) for _ in range(n)
                ]
                if self._is_in_stock(chosen):
                    stages = tuple((each.form, each.instances) for each in chosen)
                    yield float(cost[depth, num_layers]), stages

    def _held(self, offer: Offer, batch: int, depth: int, pace_s: float) -> int:
        """Layers that a stage runs in time and has room for."""
        sequences, most = -(-depth * batch // offer.instances), 0
        for each in offer.variants:
            in_time = (pace_s * offer.instances - each.step_s) / self._layer_s(each, batch)
            if in_time >= 1:
                most = max(most, min(int(in_time), each.most_layers(sequences, False, False)))
        return min(most, self.num_layers)

    def _is_in_stock(self, chosen: Sequence[Offer]) -> bool:
        left = list(self.stock)
        for each in chosen:
            for resource, count in each.uses:
                left[resource] -= count * each.instances
        return min(left) >= 0


def _worthwhile(items: Sequence[tuple[Offer, int]], depth: int) -> list[tuple[Offer, int]]:
    """Without those that another one, of which there are enough for all stages, is at least as
    good as in price and layers."""
    order = sorted(range(len(items)), key=lambda n: (items[n][0].price, -items[n][1], n))
    kept, most = set[int](), 0
    for number in order:
        offer, layers = items[number]
        if layers > most:
            kept.add(number)
            most = layers if offer.copies >= depth else most
    return [each for number, each in enumerate(items) if number in kept]


def packed_stages(
    items: Sequence[tuple[float, int, int]], depth: int, num_layers: int
) -> tuple[npt.NDArray[np.float64], list[npt.NDArray[np.int8]]]:
    """The least price of exactly s stages that hold at least l layers, and of each item how often
    it is taken there.

    Args:
        items: price, layers, and how often there may be one.
    """
    cost = np.full((depth + 1, num_layers + 1), np.inf)
    cost[0, 0] = 0.0
    taken = []
    for price, layers, copies in items:
        best, often = cost.copy(), np.zeros(cost.shape, dtype=np.int8)
        for count in range(1, min(copies, depth) + 1):
            held = np.maximum(np.arange(num_layers + 1) - count * layers, 0)
            other = cost[: depth + 1 - count][:, held] + count * price
            better = other < best[count:]
            best[count:][better] = other[better]
            often[count:][better] = count
        cost = best
        taken.append(often)
    return cost, taken


def traced(
    taken: Sequence[npt.NDArray[np.int8]], layers: Sequence[int], depth: int, num_layers: int
) -> list[int]:
    """How often each item is in the cheapest way to hold so many layers in so many stages."""
    counts = []
    for often, own in zip(reversed(taken), reversed(layers), strict=True):
        count = int(often[depth, num_layers])
        counts.append(count)
        depth, num_layers = depth - count, max(num_layers - count * own, 0)
    return counts[::-1]
