"""Who has which experts: dealt by what they cost on each rank, and dealt again when that changes.

A rank reads the weights of an expert once in a Step that sends it any token, and computes each
of its tokens. In units of one such reading, with n tokens in a Step on average:

    cost of a share f     P(any of its tokens)  +  f n / STEP_TOKENS
    time of a rank        sum of its shares' costs / its speed
    time of a layer       that of its slowest rank: all wait for each other after it

Tokens come to an expert as Poisson says; of n, a share f takes f n, rounded up or down. So a
decode step of few tokens is bound by how many experts are active, a prompt by tokens, and an expert
is worth having twice where its tokens, not its weights, are what costs.

Dealing anew is a climb by single steps (one expert moves; then also: two are exchanged, one is
shared with another rank), of which the first few that bring nearly all of the gain are taken; or,
where the climb ends far below it, a dealing from nothing.
Knows nothing of models, bytes, or how loads and speeds are found out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from shoal.core.errors import ConfigError
from shoal.core.split import WHOLE_SHARE, Dealing, ExpertShare
from shoal.policy.cost import STEP_TOKENS

_ENOUGH = 0.95
"""Of the gain that all steps of a climb would bring: those behind it are not worth loading for."""
_FRESH = 1.25
"""So many times as much must be gained by dealing from nothing, where nearly all experts move."""
_ROUNDING = 1e-9
"""Of a layer's time: what is less than that apart is the same."""
_MAX_STEPS = 512

Parts = list[list[int]]
"""Of each expert, what each rank takes of its tokens, in parts of WHOLE_SHARE."""


@dataclass(frozen=True, slots=True)
class Redealing:
    """A better dealing of a layer.

    Attributes:
        before_s, after_s: time of the layer, as the cost model predicts it.
        num_loads: experts that come to ranks which did not have them.
    """

    dealing: Dealing
    before_s: float
    after_s: float
    num_loads: int


def deal(loads: Sequence[float], speeds: Sequence[float], slots: Sequence[int]) -> Dealing:
    """A dealing from nothing: the costliest expert first, each where it ends soonest.

    Args:
        loads: tokens of a Step that go to each expert, on average.
        speeds: of each rank, in readings of an expert per second (or any unit).
        slots: experts that each rank has room for.

    Raises:
        ConfigError: there is no room for all experts, or no rank computes.
    """
    table = _Table(loads, speeds, slots, [[0] * len(speeds) for _ in loads])
    for expert in sorted(range(len(loads)), key=lambda each: -table.cost(each, WHOLE_SHARE)):
        ranks = [rank for rank, speed in enumerate(speeds) if speed > 0 and table.has_room(rank)]
        if not ranks:
            raise ConfigError(
                f"{len(loads)} experts are to be dealt, and ranks have room for {list(slots)} at "
                f"speeds {list(speeds)}; give them more memory, or add a rank"
            )
        cost = table.cost(expert, WHOLE_SHARE)
        rank = min(ranks, key=lambda each: table.times[each] + cost / speeds[each])
        table.set(expert, rank, WHOLE_SHARE)
    _climb(table)
    return dealing_of(table.parts)


def redeal(
    current: Dealing, loads: Sequence[float], speeds: Sequence[float], slots: Sequence[int]
) -> Redealing:
    """A better dealing of a layer, in few moves; the current one, if there is none.

    Args:
        slots: experts that each rank has room for; those it has already are kept in any case.
    """
    table = _Table(loads, speeds, slots, parts_of(current, len(loads)))
    before_s = max(table.times)
    climbed = _climb(table)
    gain_s = before_s - climbed[-1][0] if climbed else 0.0
    best = next((parts for time_s, parts in climbed if time_s <= before_s - _ENOUGH * gain_s), None)
    dealing = current if best is None else dealing_of(best)
    room = [max(pair) for pair in zip(slots, map(len, current), strict=True)]
    fresh = deal(loads, speeds, room)
    if before_s - layer_time(fresh, loads, speeds) > _FRESH * gain_s + _ROUNDING * before_s:
        dealing = fresh
    return Redealing(
        dealing,
        before_s,
        layer_time(dealing, loads, speeds),
        sum(
            len({share.expert for share in new} - {share.expert for share in old})
            for old, new in zip(current, dealing, strict=True)
        ),
    )


def best_single_moves(
    current: Dealing, loads: Sequence[float], speeds: Sequence[float], slots: Sequence[int]
) -> Dealing:
    """Where moving one whole expert at a time leads, each time the best of all such moves.

    What `redeal` begins with, and is measured by.
    """
    table = _Table(loads, speeds, slots, parts_of(current, len(loads)))
    for _ in range(_MAX_STEPS):
        if not table.take_best(_moves(table)):
            break
    return dealing_of(table.parts)


def layer_time(dealing: Dealing, loads: Sequence[float], speeds: Sequence[float]) -> float:
    """Of the slowest rank."""
    return max(_Table(loads, speeds, [0] * len(speeds), parts_of(dealing, len(loads))).times)


def share_cost(load: float, part: int) -> float:
    """Of a share of an expert in a Step, in readings of its weights.

    Args:
        load: tokens that all of it gets, on average.
        part: of WHOLE_SHARE.
    """
    if part == 0 or load <= 0:
        return 0.0
    share = part / WHOLE_SHARE
    idle, chance = 0.0, math.exp(-load)  # Poisson: of no token, one, two ...
    for count in range(math.ceil(1 / share)):
        idle += chance * (1 - count * share)
        chance *= load / (count + 1)
    return 1 - idle + share * load / STEP_TOKENS


def parts_of(dealing: Dealing, num_experts: int) -> Parts:
    parts = [[0] * len(dealing) for _ in range(num_experts)]
    for rank, shares in enumerate(dealing):
        for share in shares:
            parts[share.expert][rank] += share.stop - share.start
    return parts


def dealing_of(parts: Parts) -> Dealing:
    """The dealing in which ranks take an expert's tokens in their order."""
    ranks: list[list[ExpertShare]] = [[] for _ in parts[0]]
    for expert, each in enumerate(parts):
        start = 0
        for rank, part in enumerate(each):
            if part:
                ranks[rank].append(ExpertShare(expert, start, start + part))
            start += part
    return tuple(tuple(shares) for shares in ranks)


Change = tuple[tuple[int, int, int], ...]
"""(expert, rank, new part), taken together."""


class _Table:
    """A layer's parts, and what they cost each rank."""

    def __init__(
        self, loads: Sequence[float], speeds: Sequence[float], slots: Sequence[int], parts: Parts
    ) -> None:
        self.loads, self.speeds, self.parts = loads, speeds, parts
        self._costs: dict[tuple[float, int], float] = {}
        num_held = [sum(1 for each in parts if each[rank]) for rank in range(len(speeds))]
        self._slots = [max(pair) for pair in zip(slots, num_held, strict=True)]
        self._num_held = num_held
        self.times = [self._time(rank) for rank in range(len(speeds))]

    def cost(self, expert: int, part: int) -> float:
        key = (self.loads[expert], part)
        if key not in self._costs:
            self._costs[key] = share_cost(*key)
        return self._costs[key]

    def has_room(self, rank: int) -> bool:
        return self._num_held[rank] < self._slots[rank]

    def set(self, expert: int, rank: int, part: int) -> None:
        self._num_held[rank] += bool(part) - bool(self.parts[expert][rank])
        self.parts[expert][rank] = part
        self.times[rank] = self._time(rank)

    def times_after(self, change: Change) -> list[float]:
        """Of all ranks, largest first."""
        times = list(self.times)
        for expert, rank, part in change:
            difference = self.cost(expert, part) - self.cost(expert, self.parts[expert][rank])
            if difference:
                times[rank] += difference / self.speeds[rank] if self.speeds[rank] else math.inf
        return sorted(times, reverse=True)

    def take_best(self, changes: Iterator[Change]) -> bool:
        """Make the best of the changes, if it makes the slowest rank (or else the next) faster."""
        now = sorted(self.times, reverse=True)
        best, chosen = now, None
        for change in changes:
            times = self.times_after(change)
            if times < best:
                best, chosen = times, change
        if chosen is None or not _is_better(best, now):
            return False
        for each in chosen:
            self.set(*each)
        return True

    def _time(self, rank: int) -> float:
        cost = sum(self.cost(expert, each[rank]) for expert, each in enumerate(self.parts))
        if cost == 0:
            return 0.0
        return cost / self.speeds[rank] if self.speeds[rank] > 0 else math.inf


def _is_better(times: list[float], now: list[float]) -> bool:
    """By more than rounding, at the first place where they differ."""
    for new, old in zip(times, now, strict=True):
        if abs(new - old) > _ROUNDING * now[0]:
            return new < old
    return False


def _climb(table: _Table) -> list[tuple[float, Parts]]:
    """Layer time and parts after each step, as long as one helps."""
    steps: list[tuple[float, Parts]] = []
    while len(steps) < _MAX_STEPS and (
        table.take_best(_moves(table)) or table.take_best(_exchanges(table))
    ):
        steps.append((max(table.times), [list(each) for each in table.parts]))
    return steps


def _moves(table: _Table) -> Iterator[Change]:
    """All that one rank has of one expert goes to another."""
    for expert, parts in enumerate(table.parts):
        for source, part in enumerate(parts):
            if part:
                for target, there in enumerate(parts):
                    if target != source and (there or table.has_room(target)):
                        yield (expert, source, 0), (expert, target, there + part)


def _exchanges(table: _Table) -> Iterator[Change]:
    """What may help the slowest rank when no move does: to share an expert, or to exchange two."""
    slowest = max(range(len(table.times)), key=lambda rank: table.times[rank])
    held = [expert for expert, parts in enumerate(table.parts) if parts[slowest]]
    others = [rank for rank in range(len(table.times)) if rank != slowest]
    for expert in held:
        parts = table.parts[expert]
        for rank in others:
            if parts[rank] or table.has_room(rank):
                for eighths in range(1, 8):
                    given = parts[slowest] * eighths // 8
                    yield (
                        (expert, slowest, parts[slowest] - given),
                        (
                            expert,
                            rank,
                            parts[rank] + given,
                        ),
                    )
            for back, theirs in enumerate(table.parts):
                if theirs[rank] and back != expert and not theirs[slowest] and not parts[rank]:
                    yield (
                        (expert, slowest, 0),
                        (expert, rank, parts[slowest]),
                        (back, rank, 0),
                        (back, slowest, theirs[rank]),
                    )
