"""A replica that only starts requests: prompts up to the first token, then KV moves away.

    rate    rho / P        P: a prompt on all stages, one after another
    TTFT    as any replica's, without a step in the way
    moved   KV of a prompt over the slowest link to any device outside: as if it were sent after
            the first token. Live, most of it is sent while the prompt is computed

Prompts hardly overlap on the stages of such a replica: nothing but whole prompts, one or two to a
Step, is in them (simulated: two stages queue like one server of their sum). So layers are shared
out so that the way through all of them is shortest. Knows nothing of who decodes.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from shoal.core.cluster import Device
from shoal.core.split import Range, shards, split_by_weights
from shoal.planner.bits import within
from shoal.planner.fill import Option, StageTimes
from shoal.planner.formats import numbers_for
from shoal.planner.pipeline import Chain, Fixed, Operation
from shoal.planner.profiles import Problem
from shoal.policy.cost_model.memory import kv_token_bytes
from shoal.policy.cost_model.numbers import Numbers
from shoal.policy.cost_model.transport import message_s

MOST_BUSY = 0.9
"""Beyond that a queue of prompts grows long, whatever the SLO says."""
_HALVINGS = 40


def starting(chain: Chain, rate_per_s: float | None, fixed: Fixed = None) -> Operation | None:
    """
    Args:
        rate_per_s: of prompts; None: the most that keep the SLO.

    Returns:
        None: it can't start one in that time, or not at that rate.
    """
    found = fixed or prompt_layers(chain)
    if found is None:
        return None
    layers, variants = found
    parts = zip(chain.segments, layers, variants, strict=True)
    way_s = sum(
        n * each.group.variants[v].prompt_layer_s / each.num_instances for each, n, v in parts
    )
    low, high = 0.0, MOST_BUSY / way_s
    limit_s = chain.goal.slo.ttft_s
    if limit_s is not None and not _is_within(chain, found, high, limit_s):
        if not _is_within(chain, found, 0.0, limit_s):
            return None
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            low, high = (
                (middle, high) if _is_within(chain, found, middle, limit_s) else (low, middle)
            )
        high = low
    if rate_per_s is not None and rate_per_s > high * (1 + 1e-9):
        return None
    ttfts_s = chain.ttft_s(layers, variants, high if rate_per_s is None else rate_per_s, 0.0)
    if ttfts_s is None:
        return None
    return Operation(
        layers=layers,
        variants=variants,
        num_micro_batches=len(chain.segments),
        batch=1,
        tpot_s=0.0,
        ttft_s=ttfts_s[0],
        late_ttft_s=ttfts_s[1],
        rate_per_s=high,
    )


def moved_s(problem: Problem, names: Collection[str]) -> float:
    """In which KV of a prompt gets to a replica on these devices, from wherever it was computed."""
    cluster = problem.cluster
    outside = [each.name for each in cluster.devices if each.name not in names]
    inside = [cluster.device(name) for name in names]
    size_bytes = kv_bytes(problem, inside)
    links = {cluster.link(a.name, b) for a in inside for b in outside}
    return max((message_s(link, size_bytes) for link in links), default=0.0)


def kv_bytes(problem: Problem, devices: Sequence[Device]) -> float:
    """Of a prompt's KV, as these devices keep it."""
    goal, spec = problem.goal, problem.spec
    numbers = numbers_for(devices, goal.precisions[0], goal.kv_precision) or Numbers()
    whole = split_by_weights(spec, [1.0])
    layers = Range(0, spec.num_layers)
    (shard,) = shards(whole, layers, has_embedding=True, has_head=True)
    return goal.input_tokens * kv_token_bytes(spec, shard, numbers)


def _is_within(
    chain: Chain, found: tuple[tuple[int, ...], tuple[int, ...]], rate: float, limit_s: float
) -> bool:
    ttfts_s = chain.ttft_s(*found, rate, 0.0)
    return ttfts_s is not None and ttfts_s[1] <= limit_s


def prompt_layers(chain: Chain) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Layers and variants of each stage with which a prompt goes through fastest."""
    stages = prompt_stages(chain)
    return within(stages, chain.spec.num_layers, 1, 0.0, chain.limit)


def prompt_stages(chain: Chain) -> list[StageTimes]:
    """Times of a prompt; room beside KV of one in each stage, and of one that leaves."""
    num_prompts = len(chain.segments) + 1
    return [
        StageTimes(
            tuple(
                Option(each.prompt_layer_s, 0.0, each.most_layers(num_prompts, *ends))
                for each in segment.group.variants
            ),
            segment.num_instances,
        )
        for segment, ends in zip(chain.segments, chain.ends, strict=True)
    ]
