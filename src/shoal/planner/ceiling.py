"""What no way to run a pipeline exceeds, for little work: most pipelines need no closer look.

    TPOT    >= path(b)              whatever the layers, and however many batches are in flight
    rate    <= b / (O x share(b))   share: of the slowest stage, with layers in fractions; less what
                                    is kept for bunches, with as many seats as there may be
    latency >= (O - 1/2) x path(b)  and a prompt's first chunk through the quickest layers; at a
                                    rate b is at least rate x O x path(b) / batches (Little's law)

for b sequences in a batch, at the largest b whose path keeps the SLO and whose KV has room; all
with the fastest split of each stage, even where it has no room. The rate rises with b: weights are
read once for more. Knows nothing of how pipelines are found.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from shoal.planner.bunches import mean_of
from shoal.planner.fill import StageTimes
from shoal.planner.pipeline import Chain
from shoal.planner.prompts import MOST_BUSY, prompt_stages

_HALVINGS = 20
_ROUNDING = 1e-9

_Relaxed = tuple[float, float, int, int]
"""Seconds of a layer and beside them, room, instances."""


def ceiling(chain: Chain) -> float:
    """Requests per second; 0: not even one request keeps the TPOT that is asked for."""
    goal, num_layers = chain.goal, chain.spec.num_layers
    if chain.role == "prefill":
        stages = _relaxed(prompt_stages(chain))
        way_s = _path_s([(s / k, fixed, most, k) for s, fixed, most, k in stages], num_layers)
        if way_s is None:
            return 0.0
        return MOST_BUSY / way_s

    def fits(batch: int) -> bool:
        stages = _relaxed(chain.stages(1, batch))
        path_s = _path_s(stages, num_layers)
        if path_s is None:
            return False
        return goal.slo.tpot_s is None or path_s + chain.hops_s(batch) <= goal.slo.tpot_s

    batch = last(fits, goal.max_concurrency)
    if not batch:
        return 0.0
    share_s = _slowest_s(_relaxed(chain.stages(1, batch)), num_layers)
    seats = goal.max_concurrency
    return batch / (goal.output_tokens * share_s) * mean_of(seats) / seats


def least_latency_s(chain: Chain, rate_per_s: float) -> float:
    """Seconds of a request; infinite: there is no room for those that are under way."""
    found = least_batch(chain, max(chain.micro_batch_counts()), rate_per_s)
    if found is None:
        return math.inf
    variants = (each for segment in chain.segments for each in segment.group.variants)
    prompt_s = chain.spec.num_layers * min(each.prompt_layer_s for each in variants)
    return (chain.goal.output_tokens - 0.5) * found[1] + prompt_s / chain.num_chunks


def least_batch(chain: Chain, num_batches: int, rate_per_s: float) -> tuple[int, float] | None:
    """Sequences that a batch has at a rate, and seconds of a token: no fewer and no less; None:
    there is no room for them."""
    batch, path_s = 0, 0.0
    while True:
        under_way = rate_per_s * chain.goal.output_tokens * path_s
        more = max(math.ceil(under_way / num_batches * (1 - _ROUNDING)), 1)
        if more <= batch:
            return batch, path_s
        batch = more
        if batch > chain.goal.max_concurrency:
            return None
        found = _path_s(_relaxed(chain.stages(1, batch)), chain.spec.num_layers)
        if found is None:
            return None
        path_s = found + chain.hops_s(batch)


def last(holds: Callable[[int], bool], most: int, first: int = 1) -> int:
    """The last of first, first + 1, ..., most for which it holds, where it holds for all before;
    first - 1: none."""
    low, high, step = first - 1, first, 1
    while high <= most and holds(high):
        low, high, step = high, high + step, step * 2
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        if holds(middle):
            low = middle
        else:
            high = middle
    return low


def _relaxed(stages: Sequence[StageTimes]) -> list[_Relaxed]:
    return [
        (each.least_layer_s, each.least_fixed_s, each.most_layers, each.num_instances)
        for each in stages
    ]


def _path_s(stages: Sequence[_Relaxed], num_layers: int) -> float | None:
    """Through all stages, the most layers on the quickest; None: no room."""
    left = num_layers - len(stages)
    if left < 0 or min(most for _, _, most, _ in stages) < 1:
        return None
    total = 0.0
    for layer_s, fixed_s, most, _ in sorted(stages):
        more = min(most - 1, left)
        left -= more
        total += fixed_s + (1 + more) * layer_s
    return None if left else total


def _slowest_s(stages: Sequence[_Relaxed], num_layers: int) -> float:
    """The least that the slowest stage can take, where layers may be cut."""
    low, high = 0.0, max((fixed + layer * most) / k for layer, fixed, most, k in stages)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        held = sum(
            min(most, max(middle * k - fixed, 0.0) / layer) for layer, fixed, most, k in stages
        )
        low, high = (low, middle) if held >= num_layers else (middle, high)
    return low
