"""Layers and splits that are better for a goal than those of the shortest period, by small moves.

    a move    some layers from one stage to another, or another variant of one stage

`fill.py` makes a token's period short. What a request takes besides, prompts and the wait for a
place, may want other layers; moves of an eighth of the layers, then of half as many, down to one,
are kept as long as they help. Knows nothing of goals.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

from shoal.planner.pipeline import Chain, Operation

Held = tuple[tuple[int, ...], tuple[int, ...]]
"""Layers and variants of each stage."""

_MOST_ROUNDS = 16
_WORTH = 1e-6


def polished(
    chain: Chain,
    start: Operation,
    work: Callable[[Held], Operation | None],
    cost: Callable[[Operation], float],
) -> Operation:
    """
    Args:
        work: how the pipeline works with these; None: not at all.
        cost: what is to be least.
    """
    best, least = start, cost(start)
    step = max(chain.spec.num_layers // 8, 1)
    for _ in range(_MOST_ROUNDS):
        before = least
        for held in _moves(chain, best, step):
            found = work(held)
            if found is not None and cost(found) < least * (1 - _WORTH):
                best, least = found, cost(found)
                break
        if least == before:
            if step == 1:
                break
            step //= 2
    return best


def _moves(chain: Chain, found: Operation, step: int) -> Iterator[Held]:
    stages = range(len(chain.segments))
    for sender, receiver in itertools.permutations(stages, 2):
        layers = list(found.layers)
        layers[sender] -= step
        layers[receiver] += step
        if layers[sender] >= 1:
            yield tuple(layers), found.variants
    if step > 1:
        return
    for stage in stages:
        for variant in range(len(chain.segments[stage].group.variants)):
            if variant != found.variants[stage]:
                variants = list(found.variants)
                variants[stage] = variant
                yield found.layers, tuple(variants)
