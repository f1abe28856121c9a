"""`find_plan`: the plan for a goal, or the nearest one there is and what stands in the way.

Few devices: all plans are looked at (`small.py`). Many: `large.py`. A wish that can't be met is
lowered in this order: the rate, then the SLO, then the precision of weights. Knows nothing of text
for people beyond the reasons it gives.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from shoal.core.cluster import Precision
from shoal.core.errors import ConfigError
from shoal.core.latency import Slo
from shoal.core.split import Range, shards, split_by_weights
from shoal.planner.chains import Bench
from shoal.planner.choice import Choice, carried, share_of
from shoal.planner.formats import numbers_for
from shoal.planner.goal import Goal
from shoal.planner.large import LargeSearch
from shoal.planner.more_bits import likeness, with_more_bits
from shoal.planner.pipeline import Operation
from shoal.planner.profiles import Problem
from shoal.planner.quality import log_limit, loss_of, percent
from shoal.planner.roles import with_roles
from shoal.planner.service import keeps, peak, quickest
from shoal.planner.small import MOST_DEVICES, SmallSearch
from shoal.policy.cost_model.memory import kv_token_bytes, weight_bytes
from shoal.policy.cost_model.numbers import Numbers

_MOST_MIXED = 4
"""Devices up to which stages may be in fewer bits than all layers could be within a limit."""
_LEAST_LOSS, _MORE_LOSS = 1e-4, 1.5
_FEWER_BITS: tuple[Precision, ...] = ("fp8", "int8", "int4")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What was found.

    Attributes:
        choices: replicas; `operation` of each is at the most it carries.
        flow_per_s: of requests that arrive: the goal's rate, or what is carried; 0: one at a time.
        at_rate: each replica at its share of those.
        bound: no plan of those looked at has more requests per second (goodput), or less latency or
            price (the others); None: not known.
        is_exact: all plans were looked at.
        num_looked_at: kinds of replicas in the search; 0: all.
        unmet: wishes that this plan does not meet, and what binds.
        prices: requests per second that one more device would bring, by its kind.
    """

    problem: Problem
    choices: tuple[Choice, ...]
    flow_per_s: float
    at_rate: tuple[Operation, ...]
    bound: float | None
    is_exact: bool
    num_looked_at: int = 0
    unmet: tuple[str, ...] = ()
    prices: tuple[tuple[str, float], ...] = ()

    @property
    def capacity_per_s(self) -> float:
        """Requests that all replicas carry."""
        return carried(self.choices)

    @property
    def gap(self) -> float | None:
        """How far from the bound it may be, as a share of the bound; 0: it is the best; None: not
        known, as there is no bound, or one of 0."""
        value = self.value
        if self.is_exact or value == self.bound:
            return 0.0
        if not self.bound:
            return None
        if self.problem.goal.objective == "goodput":
            return max(1 - value / self.bound, 0.0)
        return max(value / self.bound - 1, 0.0)

    @property
    def value(self) -> float:
        """Of the objective: requests per second, seconds, or price."""
        goal = self.problem.goal
        if goal.objective == "goodput":
            return self.capacity_per_s
        if goal.objective == "cost":
            devices = (self.problem.cluster.device(n) for c in self.choices for n in c.names)
            return sum(goal.price(each) for each in devices)
        return self.mean("latency")

    def mean(self, what: Literal["ttft", "tpot", "latency"]) -> float:
        """Over requests, as replicas share them."""
        if what == "latency":
            later_s = (self.problem.goal.output_tokens - 1) * self.mean("tpot")
            return self.mean("ttft") + later_s
        others = "decode" if what == "ttft" else "prefill"
        total = weights = 0.0
        for choice, operation in zip(self.choices, self.at_rate, strict=True):
            if choice.chain.role != others:
                value = operation.ttft_s if what == "ttft" else operation.tpot_s
                share = share_of(choice, self.choices)
                total += share * value
                weights += share
        return total / weights

    @property
    def log_loss(self) -> float:
        """Of the replica that loses most quality (`quality.py`)."""
        return max(each.log_loss for each in self.choices)

    @property
    def left_out(self) -> tuple[str, ...]:
        """Devices of no replica."""
        used = {name for each in self.choices for name in each.names}
        return tuple(d.name for d in self.problem.cluster.devices if d.name not in used)


def find_plan(problem: Problem) -> Outcome:
    """
    Raises:
        ConfigError: the model fits these devices in no precision that they have kernels for.
    """
    found = _search(problem)
    if found is None:
        return _nearest(problem)
    return _within_slo(problem, found) if found.unmet else found


def _within_slo(problem: Problem, quickest: Outcome) -> Outcome:
    """Who wants low latency gets the lowest there is within the SLO, at the rate; where nothing
    keeps both, the plan that carries most if that one does, or carries more of the rate, or else
    the lowest latency of all."""
    if problem.goal.objective != "latency":
        return quickest
    most = _search(_with(problem, replace(problem.goal, objective="goodput")))
    is_short = quickest.flow_per_s < (problem.goal.rate_per_s or 0.0) * (1 - 1e-9)
    if most is None or (most.unmet and not (is_short and _carries_more(most, quickest))):
        return quickest
    return _stand_in(problem, most)


def _stand_in(problem: Problem, most: Outcome) -> Outcome:
    """What carries most, where nothing is known of lower latencies."""
    return replace(most, problem=problem, bound=None, is_exact=False, num_looked_at=0)


def _carries_more(one: Outcome, other: Outcome) -> bool:
    return one.flow_per_s > other.flow_per_s * (1 + 1e-9)


def _search(problem: Problem) -> Outcome | None:
    devices = problem.cluster.devices
    if len(devices) > _MOST_MIXED:
        problem = _with(problem, replace(problem.goal, precisions=_always_allowed(problem)))
    goal = problem.goal
    if len(devices) <= MOST_DEVICES:
        small = SmallSearch(problem, Bench(problem, devices), [d.name for d in devices])
        ways = {"goodput": small.most_goodput, "latency": small.quickest, "cost": small.cheapest}
        return _outcome(problem, ways[goal.objective](), None, is_exact=True)
    large = LargeSearch(problem)
    found = {
        "goodput": large.most_goodput,
        "latency": large.quickest,
        "cost": large.cheapest,
    }[goal.objective]()
    if goal.may_specialise and goal.objective != "latency":
        found = with_roles(problem, found)
    outcome = _outcome(problem, found.choices, found.bound, is_exact=False)
    if outcome is None:
        return None
    # Over the links that its devices have, a replica may do better than its column.
    nearest = max if goal.objective == "goodput" else min
    bound = nearest(found.bound, outcome.value)
    return replace(outcome, bound=bound, num_looked_at=found.num_columns, prices=found.prices)


def _outcome(
    problem: Problem, choices: Sequence[Choice], bound: float | None, *, is_exact: bool
) -> Outcome | None:
    if not choices:
        return None
    goal = problem.goal
    full = with_more_bits([_at_its_most(each) for each in choices], goal)
    total = carried(full)
    unmet: tuple[str, ...] = ()
    rate = goal.rate_per_s
    if rate is None:
        flow = 0.0 if goal.objective == "latency" else total
    elif rate <= total * (1 + 1e-9):
        flow = rate
    else:
        flow = total
        unmet = (
            f"the rate of {rate:g} requests/s: these devices carry {total:.3g} within the SLO "
            f"({goal.slo}); add devices, or lower --rate",
        )
    at_rate: list[Operation] = []
    served: dict[Hashable, Operation] = {}
    for each in full:
        own = flow * share_of(each, full)
        key = likeness(each), each.operation, own
        if key not in served:
            served[key] = _serving(each, own)
        at_rate.append(served[key])
    if not unmet and not all(keeps(goal, each) for each in at_rate):
        tpot_s, ttft_s = max(o.tpot_s for o in at_rate), max(o.ttft_s for o in at_rate)
        unmet = (
            f"the SLO ({goal.slo}): at this rate TPOT is {tpot_s * 1e3:.3g} ms and TTFT "
            f"{ttft_s * 1e3:.3g} ms; lower --rate, add devices, or take --objective goodput",
        )
    return Outcome(
        problem=problem,
        choices=full,
        flow_per_s=flow,
        at_rate=tuple(at_rate),
        bound=bound,
        is_exact=is_exact,
        unmet=unmet,
    )


def _serving(choice: Choice, rate_per_s: float) -> Operation:
    """At a rate, within the SLO where that can be."""
    chain, held = choice.chain, choice.operation.held
    kept = quickest(chain, rate_per_s, held, within_slo=True)
    return kept or quickest(chain, rate_per_s, held) or choice.operation


def _at_its_most(choice: Choice) -> Choice:
    """The same layers, working as hard as the SLO lets them; as they can, where it is kept by
    nothing."""
    held = choice.operation.held
    most = peak(choice.chain, held) or peak(choice.chain.without_slo(), held)
    return choice if most is None else replace(choice, operation=most)


def _nearest(problem: Problem) -> Outcome:
    """Without the rate, then without the SLO, then with fewer bits."""
    goal = problem.goal
    if goal.objective != "goodput":
        carried = _search(_with(problem, replace(goal, objective="goodput")))
        if carried is not None and goal.objective == "latency" and not carried.unmet:
            return _stand_in(problem, carried)
        if carried is not None:
            return replace(carried, unmet=carried.unmet or _no_rate(carried))
    if goal.slo != Slo():
        free = replace(goal, slo=Slo(), objective="latency", rate_per_s=None)
        quick = _search(_with(problem, free))
        if quick is not None:
            return replace(quick, unmet=_missed_slo(goal, quick))
    if goal.max_quality_loss is not None:
        freer = _with_more_loss(problem)
        if freer is not None:
            return freer
    lower = tuple(each for each in _FEWER_BITS if each not in goal.precisions)
    for count in range(1, len(lower) + 1):
        precisions = (*goal.precisions, *lower[:count])
        wish = replace(goal, precisions=precisions, slo=Slo(), max_quality_loss=None)
        found = _search(_with(problem, wish))
        if found is not None:
            reason = f"{_shortage(problem)}; with weights in {lower[count - 1]} it fits"
            return replace(found, unmet=(reason, *found.unmet))
    raise ConfigError(
        f"{_shortage(problem)}, and fewer bits do not help ({', '.join(_FEWER_BITS)}); add "
        "devices, or take a smaller model or shorter requests"
    )


def _always_allowed(problem: Problem) -> tuple[Precision, ...]:
    """Precisions that keep the limit of quality even in all layers; if there are any."""
    goal = problem.goal
    if goal.max_quality_loss is None:
        return goal.precisions
    most = log_limit(goal.max_quality_loss)
    kept = (p for p in goal.precisions if loss_of(problem.spec, p).log_ratio <= most)
    return tuple(kept) or goal.precisions


def _with_more_loss(problem: Problem) -> Outcome | None:
    """In the precisions that were asked for, with about as little more loss as there can be."""
    goal = problem.goal
    assert goal.max_quality_loss is not None, "there is a limit"
    most = max(goal.max_quality_loss, _LEAST_LOSS)
    while most < 1:
        most = min(most * _MORE_LOSS, 1.0)
        found = _search(_with(problem, replace(goal, max_quality_loss=most, slo=Slo())))
        if found is not None:
            reason = (
                f"perplexity at most {goal.max_quality_loss:.2%} higher: there is no memory for so "
                f"many bits; the nearest is {percent(found.log_loss):.2%} higher; raise "
                "--max-quality-loss, or add devices"
            )
            return replace(found, unmet=(reason, *found.unmet))
    return None


def _with(problem: Problem, goal: Goal) -> Problem:
    return replace(problem, goal=goal)


def _no_rate(outcome: Outcome) -> tuple[str, ...]:
    return (
        f"the objective at that rate: the nearest is the most that is carried, "
        f"{outcome.capacity_per_s:.3g} requests/s",
    )


def _missed_slo(goal: Goal, outcome: Outcome) -> tuple[str, ...]:
    """What of the SLO even one request at a time misses."""
    reasons = []
    ttft, tpot = outcome.mean("ttft"), outcome.mean("tpot")
    if goal.slo.tpot_s is not None and tpot > goal.slo.tpot_s:
        reasons.append(
            f"the SLO TPOT of {goal.slo.tpot_s * 1e3:.3g} ms: one request alone takes "
            f"{tpot * 1e3:.3g} ms per token at best, which memory bandwidth and links bind"
        )
    if goal.slo.ttft_s is not None and ttft > goal.slo.ttft_s:
        reasons.append(
            f"the SLO TTFT of {goal.slo.ttft_s * 1e3:.3g} ms: a prompt of {goal.input_tokens:.0f} "
            f"tokens alone takes {ttft * 1e3:.3g} ms at best, which arithmetic binds"
        )
    if not reasons and not keeps(goal, outcome.at_rate[0]):
        reasons.append(f"the SLO ({goal.slo}): TTFT and TPOT are met one at a time, not together")
    return tuple(reasons) or (
        f"the SLO ({goal.slo}) at any load: only less than one request keeps it",
    )


def _shortage(problem: Problem) -> str:
    """How much memory is missing, in the precision that was asked for."""
    spec, goal = problem.spec, problem.goal
    usable = [
        each
        for each in problem.cluster.devices
        if any(numbers_for([each], p, goal.kv_precision) for p in goal.precisions)
    ]
    asked = ", ".join(goal.precisions)
    if not usable:
        return f"no device has kernels for weights in {asked}"
    whole = split_by_weights(spec, [1.0])
    (shard,) = shards(whole, Range(0, spec.num_layers), has_embedding=True, has_head=True)
    numbers = numbers_for(usable[:1], goal.precisions[-1], goal.kv_precision) or Numbers()
    needed = weight_bytes(spec, shard, numbers)
    have = sum(each.memory_bytes for each in usable)
    tokens = goal.longest_tokens
    kept = tokens * kv_token_bytes(spec, shard, numbers)
    return (
        f"memory binds: weights in {goal.precisions[-1]} take {needed / 1e9:,.1f} GB, KV of a "
        f"request of {tokens:,} tokens {kept / 1e9:,.1f} GB, and activations come on top; "
        f"{len(usable)} usable devices have {have / 1e9:,.1f} GB"
    )
