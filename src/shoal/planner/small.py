"""The best plan of few devices: every way to use them is looked at.

    replicas   all partitions of the devices into replicas and those left out
    each       all its pipelines (`chains.py`), with the best layers for the batch it works at

Goodput and cost add up over replicas, so that sets of devices are looked at once each (dynamic
programming over sets): of replicas that do all of a request, or of those that start requests and
those that go on with them, by themselves. At first each set counts with a ceiling; those of which
the best plan is made are looked at closely, and there is a new best plan, until all sets in it were
looked at: no other can be better. Latency does not add up like that (`latency.py`).
Knows nothing of many devices: the work doubles and more with each.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace

from shoal.core.plan import Role
from shoal.planner.ceiling import ceiling
from shoal.planner.chains import Bench, Names
from shoal.planner.choice import Choice, carried, moved, share_of
from shoal.planner.latency import LatencySearch
from shoal.planner.pipeline import Chain
from shoal.planner.profiles import Problem
from shoal.planner.prompts import moved_s
from shoal.planner.service import peak, peak_polished, quickest

MOST_DEVICES = 6

_ROUNDING = 1e-9
_WORTH_RATE = 1e-3
"""Gains below that are none: fewer devices are better then."""
_NUM_POLISHED = 4
"""Pipelines of a set whose layers are looked at closely."""
WORTH_ROLES = 5e-3
"""Moving KV about for less than that is not worth it."""


_Memo = dict[Names, tuple[float, tuple[Names, ...]]]


class SmallSearch:
    """Args: `names` of the devices, at most `MOST_DEVICES`."""

    def __init__(self, problem: Problem, bench: Bench, names: Sequence[str]) -> None:
        self.problem, self.bench, self.names = problem, bench, tuple(names)
        self._kept: dict[Hashable, Choice | None] = {}
        self._chains: dict[Hashable, tuple[Chain, ...]] = {}
        # Of each role and set of devices: its chains by their ceilings, the highest first; and the
        # most that one of them carries, once that is known.
        self._ranked: dict[Hashable, list[tuple[float, Chain]]] = {}
        self._carried: dict[Hashable, float] = {}

    def most_goodput(self) -> tuple[Choice, ...]:
        """The most requests per second within the SLO; empty: not one."""
        return self._best_of(self.names)

    def cheapest(self) -> tuple[Choice, ...]:
        """The least price that carries the goal's rate; empty: nothing does."""
        goal = self.problem.goal
        assert goal.rate_per_s is not None
        best: tuple[float, float, tuple[Choice, ...]] | None = None
        for names in subsets(self.names):
            found = self._best_of(names)
            rate = carried(found)
            price = sum(goal.price(self.bench.devices[n]) for each in found for n in each.names)
            is_enough = rate * (1 + _ROUNDING) >= goal.rate_per_s
            if is_enough and (best is None or (price, -rate) < best[:2]):
                best = price, -rate, found
        return best[2] if best else ()

    def quickest(self) -> tuple[Choice, ...]:
        """The least mean latency at the goal's rate, within the SLO and with seats for bunches of
        arrivals if anything is; empty: nothing carries the rate."""
        goal = self.problem.goal
        rate_per_s = goal.rate_per_s or 0.0
        for within_slo in (True, False):
            search = LatencySearch(self.bench, self.names, rate_per_s, within_slo=within_slo)
            found = search.found()
            if found:
                return found
        if not rate_per_s:
            return ()
        # Near the most there is, sixteenths are too coarse: each takes as much as it carries.
        most = self._in_role(self.names, "any")
        served = (
            quickest(each.chain, rate_per_s * share_of(each, most), each.operation.held)
            for each in most
        )
        return most if all(each is not None for each in served) else ()

    def candidate(self, names: Names, role: Role = "any") -> Choice | None:
        """The pipeline of exactly these devices that carries most."""
        key = role, self.bench.key(names)
        if key not in self._kept:
            self._kept[key] = _most_carrying(self._by_ceiling(names, role))
        kept = self._kept[key]
        if kept is not None and sorted(kept.names) != sorted(names):
            return replace(kept, chain=moved(self.bench, kept.chain, names))
        return kept

    def _best_of(self, names: Names) -> tuple[Choice, ...]:
        """Replicas of some of these devices that together carry most."""
        best = self._in_role(names, "any")
        if not self.problem.goal.may_specialise:
            return best
        most = carried(best) * (1 + WORTH_ROLES)
        for starters in subsets(names):
            starting = self._in_role(starters, "prefill")
            if sum(each.rate_per_s for each in starting) <= most:
                continue
            others = tuple(each for each in names if each not in starters)
            both = (*starting, *self._in_role(others, "decode"))
            if carried(both) > most and _keep_alike(both):
                best, most = both, carried(both)
        return best

    def _all_chains(self, names: Names) -> tuple[Chain, ...]:
        devices = self.bench.key(names)
        if devices not in self._chains:
            self._chains[devices] = tuple(self.bench.chains(names))
        return self._chains[devices]

    def _by_ceiling(self, names: Names, role: Role) -> list[tuple[float, Chain]]:
        """Its chains, those that may carry most first."""
        key = role, self.bench.key(names)
        if key not in self._ranked:
            arrives_s = moved_s(self.problem, names) if role == "decode" else 0.0
            chains = [each.acting(role, arrives_s) for each in self._all_chains(names)]
            ranked = [(ceiling(each), each) for each in chains]
            self._ranked[key] = sorted(ranked, key=lambda each: -each[0])
        return self._ranked[key]

    def _in_role(self, names: Names, role: Role) -> tuple[Choice, ...]:
        """The replicas of some of these devices that carry most."""
        while True:
            blocks = self._most(names, role, {(): (0.0, ())})[1]
            unknown = [each for each in blocks if (role, self.bench.key(each)) not in self._carried]
            if not unknown:
                found = (self.candidate(each, role) for each in blocks)
                return tuple(each for each in found if each is not None)
            for each in unknown:
                best = self.candidate(each, role)
                self._carried[role, self.bench.key(each)] = best.rate_per_s if best else 0.0

    def _most(self, names: Names, role: Role, memo: _Memo) -> tuple[float, tuple[Names, ...]]:
        """What these devices carry at most, as far as it is known, and the sets that do."""
        if names not in memo:
            first, rest = names[0], names[1:]
            best = self._most(rest, role, memo)  # without the first
            for others in (*subsets(rest), ()):
                own = self._at_most((first, *others), role)
                if not own:
                    continue
                left = tuple(each for each in rest if each not in others)
                rate, blocks = self._most(left, role, memo)
                if rate + own > best[0] * (1 + _WORTH_RATE):
                    best = rate + own, ((first, *others), *blocks)
            memo[names] = best
        return memo[names]

    def _at_most(self, names: Names, role: Role) -> float:
        """Requests per second of one replica of exactly these devices; 0: they are none."""
        known = self._carried.get((role, self.bench.key(names)))
        if known is not None:
            return known
        ranked = self._by_ceiling(names, role)
        return ranked[0][0] if ranked else 0.0


def _keep_alike(choices: Sequence[Choice]) -> bool:
    """Whether all keep the same numbers: KV of others would be computed again."""
    kept = {
        segment.group.variants[number].numbers
        for each in choices
        for segment, number in zip(each.chain.segments, each.operation.variants, strict=True)
    }
    return len(kept) == 1


def _most_carrying(ranked: Sequence[tuple[float, Chain]]) -> Choice | None:
    """The most requests per second; those that cannot reach what was found are not looked at."""
    found: list[Choice] = []
    best = 0.0
    for most, chain in ranked:
        if most <= best:
            break
        operation = peak(chain)
        if operation is not None:
            found.append(Choice(chain, operation))
            best = max(best, operation.rate_per_s)
    found.sort(key=lambda each: -each.rate_per_s)
    polished = [
        replace(each, operation=peak_polished(each.chain, each.operation))
        for each in found[:_NUM_POLISHED]
    ]
    return max(polished, key=lambda each: each.rate_per_s, default=None)


def subsets(names: Names) -> Iterator[Names]:
    """All but the empty one, the small ones first."""
    masks = sorted(range(1, 1 << len(names)), key=lambda mask: (mask.bit_count(), mask))
    for mask in masks:
        yield tuple(each for index, each in enumerate(names) if mask >> index & 1)
