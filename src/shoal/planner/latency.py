"""The least mean latency at a rate, of a few devices: which sets of them serve, and which part of
all requests each takes.

    share     of the requests that a replica takes, in sixteenths; all together take 16
    mean      sum of share x latency at share x rate

Whichever sets and shares together have the least mean is found by dynamic programming over sets of
devices and sixteenths. At first each set counts with a floor: the latency of a request that is
alone, or what the set was found to take at a smaller share. What the best plan is made of is looked
at closely, and there is a new best plan, until all of it was looked at: no other can be better.
Knows nothing of how pipelines are found.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from shoal.planner.ceiling import least_latency_s
from shoal.planner.chains import Bench, Names
from shoal.planner.choice import Choice, moved
from shoal.planner.pipeline import Chain
from shoal.planner.service import has_seats, quickest, quickest_polished

SIXTEENTHS = 16
_WORTH = 1e-3
"""A device that gains less than that is left out."""
_NEAR, _NUM_POLISHED = 1.25, 8
"""Pipelines that take as much longer may be the quickest with other layers; so many of them."""

_Kinds = tuple[int, ...]
"""Devices by their kind, in order: those that are alike are not told apart."""
_Parts = tuple[tuple[_Kinds, int], ...]


class LatencySearch:
    """
    Args:
        names: of the devices.
        rate_per_s: of requests; 0: one that is alone.
        within_slo: replicas that do not keep it are none.
    """

    def __init__(
        self, bench: Bench, names: Names, rate_per_s: float, *, within_slo: bool = False
    ) -> None:
        self.bench, self.rate_per_s, self.within_slo = bench, rate_per_s, within_slo
        self._alike: dict[object, list[str]] = {}
        for each in names:
            self._alike.setdefault(bench.key([each]), []).append(each)
        self._members = list(self._alike.values())
        self._timed: dict[_Kinds, list[tuple[float, Chain]]] = {}
        self._known: dict[tuple[_Kinds, int], tuple[float, Choice | None]] = {}
        self._least_s = 0.0
        # What is alone is not shared out.
        self._units = range(1 if rate_per_s else SIXTEENTHS, SIXTEENTHS + 1)

    def found(self) -> tuple[Choice, ...]:
        """Replicas with their shares; empty: nothing carries the rate."""
        everything = tuple(
            kind for kind, names in enumerate(self._members) for _ in range(len(names))
        )
        self._least_s = min(self._floors(own)[1] for own in _parts_of(everything))
        while True:
            cost_s, parts = self._best(everything, {})[SIXTEENTHS]
            unknown = [each for each in parts if each not in self._known]
            if math.isinf(cost_s):
                return ()
            if not unknown:
                return tuple(self._on_devices(parts))
            for kinds, units in unknown:
                self._known[kinds, units] = self._closely(kinds, units)

    def _best(
        self, left: _Kinds, memo: dict[_Kinds, list[tuple[float, _Parts]]]
    ) -> list[tuple[float, _Parts]]:
        """For 0, 1, ... 16 sixteenths of the rate: the least that these devices add to the mean."""
        if left in memo:
            return memo[left]
        if not left:
            return [(0.0, ()), *((math.inf, ()) for _ in range(SIXTEENTHS))]
        best = list(self._best(left[1:], memo))  # without the first
        for own in _parts_of(left[1:], first=left[:1]):
            others = self._best(_without(left, own), memo)
            floors = self._floors(own)
            costs = [(units, units / SIXTEENTHS * floors[units]) for units in self._units]
            fixed_s = _WORTH * len(own) * self._least_s
            for units, cost_s in costs:
                if math.isinf(cost_s):
                    break
                for more in range(SIXTEENTHS - units + 1):
                    total_s = fixed_s + cost_s + others[more][0]
                    if total_s < best[units + more][0]:
                        best[units + more] = total_s, ((own, units), *others[more][1])
        memo[left] = best
        return best

    def _floors(self, kinds: _Kinds) -> list[float]:
        """By sixteenths: no pipeline of these devices is quicker; latency only rises with load."""
        timed = self._by_floor(kinds)
        least_s = timed[0][0] if timed else math.inf
        found = [least_s]
        for units in range(1, SIXTEENTHS + 1):
            known = self._known.get((kinds, units))
            least_s = max(least_s, known[0]) if known is not None else least_s
            found.append(least_s)
        return found

    def _closely(self, kinds: _Kinds, units: int) -> tuple[float, Choice | None]:
        rate_per_s = units / SIXTEENTHS * self.rate_per_s
        choice = quickest_of(self._by_floor(kinds), rate_per_s, within_slo=self.within_slo)
        if choice is None:
            return math.inf, None
        return choice.operation.latency_s(choice.chain.goal.output_tokens), choice

    def _by_floor(self, kinds: _Kinds) -> list[tuple[float, Chain]]:
        """Its pipelines, those that may be quickest first."""
        if kinds not in self._timed:
            spare = [iter(each) for each in self._members]
            chains = self.bench.chains([next(spare[kind]) for kind in kinds])
            timed = [(least_latency_s(each, 0.0), each) for each in chains]
            self._timed[kinds] = sorted(timed, key=lambda each: each[0])
        return self._timed[kinds]

    def _on_devices(self, parts: _Parts) -> Iterator[Choice]:
        spare = [iter(each) for each in self._members]
        for kinds, units in parts:
            choice = self._known[kinds, units][1]
            assert choice is not None, "what it takes is finite"
            names = tuple(next(spare[kind]) for kind in kinds)
            chain = moved(self.bench, choice.chain, names)
            yield replace(choice, chain=chain, share=units / SIXTEENTHS)


def quickest_of(
    timed: Sequence[tuple[float, Chain]], rate_per_s: float, *, within_slo: bool = False
) -> Choice | None:
    """The least latency at a rate; those that cannot be quicker than what was found are not looked
    at.

    Args:
        timed: pipelines and what none of them can be below, the least first.
        within_slo: those that do not keep it, with places for bunches of arrivals, are none.
    """
    output_tokens, best_s = 0.0, math.inf
    found: list[Choice] = []
    for least_s, chain in timed:
        if least_s >= best_s:
            break
        if least_latency_s(chain, rate_per_s) >= best_s:
            continue
        operation = quickest(chain, rate_per_s, within_slo=within_slo)
        output_tokens = chain.goal.output_tokens
        if operation is not None:
            found.append(Choice(chain, operation))
            best_s = min(best_s, operation.latency_s(output_tokens))

    def latency_s(choice: Choice) -> float:
        return choice.operation.latency_s(output_tokens)

    near = sorted((each for each in found if latency_s(each) < best_s * _NEAR), key=latency_s)

    def polished(choice: Choice) -> Choice:
        operation = quickest_polished(
            choice.chain, rate_per_s, choice.operation, within_slo=within_slo
        )
        is_better = not within_slo or has_seats(choice.chain, operation, rate_per_s)
        return replace(choice, operation=operation) if is_better else choice

    return min(map(polished, near[:_NUM_POLISHED]), key=latency_s, default=None)


def _parts_of(kinds: _Kinds, first: _Kinds = ()) -> list[_Kinds]:
    """All different sets of these, each with what is given first; the empty one only with it."""
    found: set[_Kinds] = {()}
    for kind in kinds:
        found |= {(*each, kind) for each in found}
    return sorted((first + each for each in found if first + each), key=lambda own: (len(own), own))


def _without(kinds: _Kinds, taken: _Kinds) -> _Kinds:
    left = list(kinds)
    for each in taken:
        left.remove(each)
    return tuple(left)
