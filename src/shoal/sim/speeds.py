"""How fast a replica is to a router, from what a few Steps cost there.

    a chunk of a prompt, and half of it       what a token takes, where it takes longest
    the same far into a prompt                what a pair of tokens takes
    one that decodes, many, many with much    a Step, a row, a token of context, all the way through

Knows nothing of queues or of time.
"""

from __future__ import annotations

from collections.abc import Sequence

from shoal.core.speed import Speed
from shoal.policy.cost_model.loads import StepLoad
from shoal.sim.setup import ReplicaSetup

_CHUNK, _FAR = 2048, 8192
_MANY, _CONTEXT = 32, 1024
_LEAST_S = 1e-9

RowSizes = Sequence[tuple[int, int, bool]]


def speed_of(setup: ReplicaSetup) -> Speed:
    """Of a replica's cost, over all of its routes."""
    chunk = min(_CHUNK, setup.config.max_num_batched_tokens)
    half, far = max(chunk // 2, 1), min(_FAR, setup.config.max_model_len)
    whole_s = _longest_s(setup, [(0, chunk, True)])
    token_s = (whole_s - _longest_s(setup, [(0, half, True)])) / max(chunk - half, 1)
    pair_s = (_longest_s(setup, [(far, chunk, True)]) - whole_s) / (chunk * far)
    # What tokens of that chunk take includes pairs among them.
    among = (chunk * chunk - half * half) / 2 / max(chunk - half, 1)
    one_s = _through_s(setup, [(0, 1, True)])
    many_s = _through_s(setup, [(0, 1, True)] * _MANY)
    long_s = _through_s(setup, [(_CONTEXT, 1, True)] * _MANY)
    row_s = max((many_s - one_s) / (_MANY - 1), 0.0)
    return Speed(
        step_s=max(one_s - row_s, 0.0),
        token_s=max(token_s - pair_s * among, _LEAST_S),
        row_s=row_s,
        context_s=max((long_s - many_s) / (_MANY * _CONTEXT), 0.0),
        pair_s=max(pair_s, 0.0),
    )


def _through_s(setup: ReplicaSetup, rows: RowSizes) -> float:
    """Seconds of a Step from its beginning to its tokens, of all routes on average."""
    cost, load = setup.cost, StepLoad.of(rows, setup.cost.windows)
    total_s = sum(
        cost.compute_s(load, number, hop) + cost.transfer_s(len(rows), number, hop)
        for number, route in enumerate(setup.config.routes)
        for hop in range(len(route))
    )
    return total_s / len(setup.config.routes)


def _longest_s(setup: ReplicaSetup, rows: RowSizes) -> float:
    """Seconds of the busiest instance for each Step, if routes are taken in turns."""
    busy_s = [0.0] * len(setup.config.instance_blocks)
    load = StepLoad.of(rows, setup.cost.windows)
    for number, route in enumerate(setup.config.routes):
        for index, hop in enumerate(route):
            busy_s[hop.instance] += setup.cost.compute_s(load, number, index)
    return max(busy_s) / len(setup.config.routes)


def speeds_of(replicas: Sequence[ReplicaSetup]) -> dict[str, Speed]:
    """Those of one cost and configuration are worked out once."""
    known: dict[tuple[int, int], Speed] = {}
    for each in replicas:
        alike = id(each.cost), id(each.config)
        if alike not in known:
            known[alike] = speed_of(each)
    return {each.name: known[id(each.cost), id(each.config)] for each in replicas}
