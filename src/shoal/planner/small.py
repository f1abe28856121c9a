"""The best plan of few devices: every way to use them is looked at.

    replicas   all partitions of the devices into replicas and those left out
    each       all its pipelines (`chains.py`), with the best layers for the batch it works at

Goodput and cost add up over replicas, so that sets of devices are looked at once each (dynamic
programming over sets): of replicas that do all of a request, or of those that start requests and
those that go on with them, by themselves. At first each set counts with a ceiling; those of which
the best plan is made are looked at closely, and there is a new best plan, until all sets in it were
looked at: no other can be better. Latency does not add up: requests are shared out by what
replicas could carry, and a replica's best pipeline depends on its share; a few candidates of each
set are kept for that.
Knows nothing of many devices: the work doubles and more with each.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

from shoal.core.plan import Role
from shoal.planner.ceiling import ceiling, least_latency_s
from shoal.planner.chains import Bench, Names, partitions
from shoal.planner.pipeline import Chain, Operation, Segment
from shoal.planner.profiles import Problem
from shoal.planner.prompts import moved_s
from shoal.planner.service import peak, quickest

MOST_DEVICES = 6

_SHARES = (1.0, 0.5, 0.25)
"""Of the rate, at which pipelines of a set compete for being kept."""
_WORTH_RATE, _WORTH_LATENCY = 1e-3, 5e-3
"""Gains below that are none: fewer devices are better then."""
_WORTH_ROLES = 5e-3
"""Moving KV about for less than that is not worth it."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A replica: its pipeline, and how it works when it carries the most it may."""

    chain: Chain
    operation: Operation

    @property
    def names(self) -> Names:
        groups = [group for segment in self.chain.segments for group in segment.groups]
        return tuple(name for group in groups for name in group.names)

    @property
    def rate_per_s(self) -> float:
        return self.operation.rate_per_s


_Memo = dict[Names, tuple[float, tuple[Names, ...]]]


class SmallSearch:
    """Args: `names` of the devices, at most `MOST_DEVICES`."""

    def __init__(self, problem: Problem, bench: Bench, names: Sequence[str]) -> None:
        self.problem, self.bench, self.names = problem, bench, tuple(names)
        self._kept: dict[Hashable, tuple[Choice, ...]] = {}
        self._chains: dict[Hashable, tuple[Chain, ...]] = {}
        # Of each role and set of devices: its chains by their ceilings, the highest first; and the
        # most that one of them carries, once that is known.
        self._ranked: dict[Hashable, list[tuple[float, Chain]]] = {}
        self._carried: dict[Hashable, float] = {}
        self._timed: dict[Hashable, list[tuple[float, Chain]]] = {}
        self._rate_limits: dict[Hashable, tuple[float, float]] = {}

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
            if rate >= goal.rate_per_s and (best is None or (price, -rate) < best[:2]):
                best = price, -rate, found
        return best[2] if best else ()

    def quickest(self) -> tuple[Choice, ...]:
        """The least mean latency at the goal's rate; empty: nothing carries it."""
        rate = self.problem.goal.rate_per_s
        best: tuple[float, tuple[Choice, ...]] | None = None
        for names in subsets(self.names):
            for blocks in partitions(names) if rate is not None else [(names,)]:
                least_s = self._least_mean_s(blocks, rate or 0.0)
                if best is not None and least_s >= best[0] * (1 - _WORTH_LATENCY):
                    continue
                found = self._shared(blocks, rate or 0.0)
                if found is None:
                    continue
                if best is None or found[0] < best[0] * (1 - _WORTH_LATENCY):
                    best = found
        return best[1] if best else ()

    def candidates(self, names: Names, role: Role = "any") -> tuple[Choice, ...]:
        """Pipelines of exactly these devices that are best at something; the most goodput first."""
        key = role, self.bench.key(names)
        if key not in self._kept:
            self._kept[key] = tuple(self._find(names, role))
        kept = self._kept[key]
        if kept and sorted(kept[0].names) != sorted(names):
            return tuple(
                Choice(moved(self.bench, each.chain, names), each.operation) for each in kept
            )
        return kept

    def _find(self, names: Names, role: Role) -> Iterator[Choice]:
        goal = self.problem.goal
        ranked = self._by_ceiling(names, role)
        best = _most_carrying(ranked)
        if best is not None:
            yield best
        if goal.objective != "latency":
            return
        rates = (0.0,) if goal.rate_per_s is None else [each * goal.rate_per_s for each in _SHARES]
        for rate in rates:
            quick = quickest_of(self.by_latency(names, rate), rate)
            if quick is not None:
                yield quick

    def _best_of(self, names: Names) -> tuple[Choice, ...]:
        """Replicas of some of these devices that together carry most."""
        best = self._in_role(names, "any")
        if not self.problem.goal.may_specialise:
            return best
        most = carried(best) * (1 + _WORTH_ROLES)
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

    def by_latency(self, names: Names, rate_per_s: float) -> list[tuple[float, Chain]]:
        """Its chains, those that may be quickest first."""
        key = rate_per_s, self.bench.key(names)
        if key not in self._timed:
            chains = self._all_chains(names)
            timed = [(least_latency_s(each, rate_per_s), each) for each in chains]
            self._timed[key] = sorted(timed, key=lambda each: each[0])
        return self._timed[key]

    def _least_mean_s(self, blocks: Sequence[Names], rate_per_s: float) -> float:
        """No replicas of these devices have less mean latency.

        Each replica's share is what it carries, of which two limits are known: those that may be
        quick are taken to carry the most that they may, the others the least.
        """
        if len(blocks) == 1:
            return self._least_latency_s(blocks[0], rate_per_s)
        limits = sorted((self._least_latency_s(each, 0.0), self._rates(each)) for each in blocks)
        least_s = math.inf
        for num_quick in range(1, len(limits) + 1):
            rates = [
                high if index < num_quick else low for index, (_, (low, high)) in enumerate(limits)
            ]
            if sum(rates):
                seconds = (
                    each * rate for (each, _), rate in zip(limits, rates, strict=True) if rate
                )
                least_s = min(least_s, sum(seconds) / sum(rates))
        return least_s

    def _rates(self, names: Names) -> tuple[float, float]:
        """The least and the most that the best replica of exactly these devices may carry."""
        key = self.bench.key(names)
        if key not in self._rate_limits:
            ranked = self._by_ceiling(names, "any")
            one = peak(ranked[0][1]) if ranked else None
            most = ranked[0][0] if ranked else 0.0
            self._rate_limits[key] = (one.rate_per_s if one else 0.0), most
        return self._rate_limits[key]

    def _least_latency_s(self, names: Names, rate_per_s: float) -> float:
        """No replica of exactly these devices has less."""
        timed = self.by_latency(names, rate_per_s)
        return timed[0][0] if timed else math.inf

    def _in_role(self, names: Names, role: Role) -> tuple[Choice, ...]:
        """The replicas of some of these devices that carry most."""
        while True:
            blocks = self._most(names, role, {(): (0.0, ())})[1]
            unknown = [each for each in blocks if (role, self.bench.key(each)) not in self._carried]
            if not unknown:
                return tuple(self.candidates(each, role)[0] for each in blocks)
            for each in unknown:
                found = self.candidates(each, role)
                self._carried[role, self.bench.key(each)] = found[0].rate_per_s if found else 0.0

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

    def _shared(
        self, blocks: Sequence[Names], rate_per_s: float
    ) -> tuple[float, tuple[Choice, ...]] | None:
        """Mean latency where replicas of these devices share the rate as they could carry it."""
        kept = [self.candidates(block) for block in blocks]
        if not all(kept):
            return None
        total = sum(each[0].rate_per_s for each in kept)
        output_tokens = self.problem.goal.output_tokens
        mean_s, choices = 0.0, []
        for own in kept:
            share = own[0].rate_per_s / total
            served = [(each.chain, quickest(each.chain, share * rate_per_s)) for each in own]
            quick = [Choice(chain, found) for chain, found in served if found is not None]
            if not quick:
                return None
            best = min(quick, key=lambda each: each.operation.latency_s(output_tokens))
            mean_s += share * best.operation.latency_s(output_tokens)
            choices.append(best)
        return mean_s, tuple(choices)


def carried(choices: Sequence[Choice]) -> float:
    """Requests per second: those that are started must also be gone on with."""
    rates: dict[Role, float] = {"any": 0.0, "prefill": 0.0, "decode": 0.0}
    for each in choices:
        rates[each.chain.role] += each.rate_per_s
    return rates["any"] + min(rates["prefill"], rates["decode"])


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
    best: Choice | None = None
    for most, chain in ranked:
        if most <= (best.rate_per_s if best else 0.0):
            break
        found = peak(chain)
        if found is not None and (best is None or found.rate_per_s > best.rate_per_s):
            best = Choice(chain, found)
    return best


def quickest_of(timed: Sequence[tuple[float, Chain]], rate_per_s: float) -> Choice | None:
    """The least latency at a rate; those that cannot be quicker than what was found are not looked
    at.

    Args:
        timed: pipelines and what none of them can be below, the least first.
    """
    best: tuple[float, Choice] | None = None
    for least_s, chain in timed:
        if best is not None and least_s >= best[0]:
            break
        found = quickest(chain, rate_per_s)
        if found is None:
            continue
        latency_s = found.latency_s(chain.goal.output_tokens)
        if best is None or latency_s < best[0]:
            best = latency_s, Choice(chain, found)
    return None if best is None else best[1]


def subsets(names: Names) -> Iterator[Names]:
    """All but the empty one, the small ones first."""
    masks = sorted(range(1, 1 << len(names)), key=lambda mask: (mask.bit_count(), mask))
    for mask in masks:
        yield tuple(each for index, each in enumerate(names) if mask >> index & 1)


def moved(bench: Bench, chain: Chain, names: Names) -> Chain:
    """The same pipeline on other devices, which are alike one by one."""
    spare = list(names)

    def swapped(own: Names) -> list[str]:
        found = []
        for each in own:
            other = next(name for name in spare if bench.key([name]) == bench.key([each]))
            spare.remove(other)
            found.append(other)
        return found

    segments = [
        Segment(tuple(bench.group(swapped(group.names)) for group in segment.groups))
        for segment in chain.segments
    ]
    return Chain(bench.problem, segments).acting(chain.role, chain.moved_s)
