"""What a sequence costs on a route: which KV to compute again, and where.

Cost is counted in token-layers: one token through one layer is 1. A Step of its own reads the
weights of its layers once more, which costs as much as `STEP_TOKENS` more tokens in it:

    cost of a run     (tokens + STEP_TOKENS) x layers of the hops that run
    load of a hop     tokens that run on its instance x its layers, x largest / own capacity
    cost of a route   its runs + the load of its hops

A hop's KV can only be made from what the hops before it give, so those run as well; hops after it
that still have theirs are spared:

    cached    hop 0  ########........       positions 0-8: hops 0 and 1 run (hop 1 lost its KV),
              hop 1  ................       hop 0 writes again what it has; from 8 on, all run
              hop 2  ########........

A sequence that runs can go on on another route; its KV is copied there (`gain_of_moving`).

Knows nothing of blocks, instances that fail, or how fast a device is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

STEP_TOKENS = 16
"""Tokens that cost as much as reading the weights once more."""
COPY_SHARE = 1 / 8
"""What copying a token's KV costs its workers, as a share of computing it."""


@dataclass(frozen=True, slots=True)
class Run:
    """Positions up to `stop` (from where the last one stops) through the first `num_hops` hops."""

    stop: int
    num_hops: int


@dataclass(frozen=True, slots=True)
class Work:
    """What is left to compute: `runs` from position `start` on; the last one takes all hops."""

    start: int
    runs: tuple[Run, ...]
    cost: float


def cheapest_work(cached: Sequence[int], layers: Sequence[int], total: int) -> Work:
    """How to get the KV of positions [0, total) onto all hops.

    Starting over, and building again only up to a lost hop, are both among the choices.

    Args:
        cached: for each hop, how many positions from 0 on it has already; fewer than `total`.
        layers: of each hop.
    """
    pieces = _pieces(cached, total)
    sums = [sum(layers[:count]) for count in range(len(layers) + 1)]

    # Of what is left from each piece on, backwards: some pieces go together, on the hops of the
    # last of them.
    best: list[tuple[float, tuple[Run, ...]]] = [(0.0, ())]
    for first in reversed(range(len(pieces) - 1)):
        choices = []
        for run, (cost, runs) in zip(pieces[first + 1 :], best, strict=True):
            tokens = run.stop - pieces[first].stop + STEP_TOKENS
            choices.append((tokens * sums[run.num_hops] + cost, (run, *runs)))
        best.insert(0, min(choices, key=_first))
    cost, runs = best[0]
    return Work(pieces[0].stop, runs, cost)


@dataclass(frozen=True, slots=True)
class OtherHop:
    """A hop of another route, for a sequence that runs.

    Attributes:
        layers: of the hop.
        cached: positions whose KV will be there.
        copied: how many of them must be copied there.
        less_load: of other sequences, than on the hop that it would leave.
    """

    layers: int
    cached: int
    copied: int = 0
    less_load: float = 0.0


def gain_of_moving(hops: Sequence[OtherHop], total: int) -> float:
    """What a sequence of `total` tokens gains by going on on another route; below 0 it loses.

    That is the load of others that it is rid of, less what is copied, less what is computed again.
    """
    work = cheapest_work([hop.cached for hop in hops], [hop.layers for hop in hops], total)
    copied = sum(hop.copied * hop.layers for hop in hops)
    return sum(hop.less_load for hop in hops) - COPY_SHARE * copied - work.cost


def hop_load(layers: int, tokens: int, capacity: float) -> float:
    """What `tokens` tokens of others mean for a hop of so many layers."""
    return layers * tokens / capacity


def route_cost(
    work: Work, layers: Sequence[int], tokens: Sequence[int], capacities: Sequence[float]
) -> float:
    """What binding a sequence to a route costs it: its own work, behind that of others.

    Args:
        layers: of each hop.
        tokens: for each hop, those of all sequences that run on its instance.
        capacities: of each hop's instance, as a share of the largest.
    """
    hops = zip(layers, tokens, capacities, strict=True)
    return work.cost + sum(hop_load(count, num, share) for count, num, share in hops)


def _pieces(cached: Sequence[int], total: int) -> list[Run]:
    """Where the number of hops that must run changes; the first is what nobody must run."""
    pieces = [Run(min(cached), 0)]
    for num_hops in range(1, len(cached) + 1):
        # From here on every later hop lacks nothing before this position.
        stop = min(cached[num_hops:], default=total)
        if stop > pieces[-1].stop:
            pieces.append(Run(stop, num_hops))
    return pieces


def _first(choice: tuple[float, tuple[Run, ...]]) -> float:
    return choice[0]
