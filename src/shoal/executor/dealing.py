"""Who has which experts of a running replica: watched, and dealt anew where it pays.

    ExpertLoad ─► observed ─► policy ─► Deal to each rank ─► Dealt by all ─► in use, from the next
                                                                             Step submitted on

A rank's speed is what its Steps cost by the policy's model, over the time that it computed; where
that is not known, what the plan says. A dealing that not all ranks could load, or during which
workers failed, is dropped: the last complete one holds, also for workers that are started again.
Runs on the executor's event loop. Knows nothing of Steps' contents.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from shoal.core.model_spec import ModelSpec
from shoal.core.plan import ReplicaPlan, StagePlan
from shoal.core.split import Dealing
from shoal.policy.cost import STEP_TOKENS
from shoal.policy.dealing import Redealing, parts_of, redeal, share_cost
from shoal.wire.worker_messages import Deal, Dealt, ExpertLoad, Loaded

log = logging.getLogger(__name__)

WORTH = 0.1
"""Of the time that experts take: a dealing that is expected to save less is left."""
_LEAST_TOKENS = 64  # of an expert, on average, before loads are believed
_LEAST_STEPS = 64
_LEAST_STEP_S = 0.004  # of the slowest rank: below, what is not work would count as slowness
_PAUSE_S = 5.0
# The pause doubles with each dealing, so that noise moves experts ever more rarely.
_MAX_PAUSES = 64
_NEW_SHARE = 0.5  # of what was measured last, in what a rank's speed is believed to be
_LOAD_LIMIT_S = 600.0

Send = Callable[[int, Deal], None]
"""To all ranks of an instance."""


@dataclass(slots=True)
class _Seen:
    """Of an instance since its last dealing, older news counting less."""

    num_steps: float = 0.0
    tokens: list[list[float]] = field(default_factory=list)
    rank_steps: list[float] = field(default_factory=list)
    rank_s: list[float] = field(default_factory=list)

    def halve(self) -> None:
        self.num_steps /= 2
        self.tokens = [[count / 2 for count in layer] for layer in self.tokens]
        self.rank_steps = [0.0] * len(self.rank_steps)
        self.rank_s = [0.0] * len(self.rank_s)


@dataclass(slots=True)
class _Pending:
    version: int
    instance: int
    experts: tuple[Dealing, ...]
    waits_for: set[int]
    since_s: float


class Dealer:
    """Deals the experts of one replica.

    Args:
        facts: of each worker, by instance and rank.
        redealt: told of the plan with every dealing that is complete.

    Attributes:
        version: of the last complete dealing; from any thread.
    """

    def __init__(
        self,
        replica: ReplicaPlan,
        spec: ModelSpec,
        facts: Mapping[tuple[int, int], Loaded],
        *,
        send: Send,
        redealt: Callable[[ReplicaPlan], None],
    ) -> None:
        self.version = 0
        self._replica = replica
        self._spec = spec
        self._facts = facts
        self._send = send
        self._redealt = redealt
        self._numbers = itertools.count(1)
        self._pending: _Pending | None = None
        self._seen = [_Seen() for _ in replica.instances]
        self._quiet_until_s = 0.0
        self._pauses = 1
        self._believed: dict[int, list[float]] = {}
        self._thinking: asyncio.Task[None] | None = None

    # --- what workers say ---

    def take_load(self, instance: int, rank: int, load: ExpertLoad) -> None:
        seen = self._seen[instance]
        if not seen.rank_s:
            num_ranks = len(self._replica.instances[instance].ranks)
            seen.rank_s, seen.rank_steps = [0.0] * num_ranks, [0.0] * num_ranks
        if load.computed_s is not None:
            seen.rank_s[rank] += load.computed_s
            seen.rank_steps[rank] += load.num_steps
        if load.tokens:
            seen.num_steps += load.num_steps
            before = seen.tokens or [[0.0] * len(layer) for layer in load.tokens]
            seen.tokens = [
                [old + new for old, new in zip(*layers, strict=True)]
                for layers in zip(before, load.tokens, strict=True)
            ]

    def take_dealt(self, instance: int, rank: int, dealt: Dealt) -> None:
        pending = self._pending
        if pending is None or (pending.version, pending.instance) != (dealt.version, instance):
            return  # it was dropped
        if dealt.problem is not None:
            log.warning("experts stay where they are: rank %d: %s", rank, dealt.problem)
            self._quiet_until_s = pending.since_s + _LOAD_LIMIT_S
            self._pending = None
            return
        pending.waits_for.discard(rank)
        if not pending.waits_for:
            self._complete(pending)

    def drop(self) -> None:
        """Workers failed: what is not complete will not be."""
        self._pending = None
        self._seen = [_Seen() for _ in self._replica.instances]

    # --- from time to time ---

    def look(self, now: float, down: frozenset[int] = frozenset()) -> None:
        """Deal anew where enough was seen and it pays.

        Args:
            down: instances that run no Steps.
        """
        if self._pending is not None:
            if now - self._pending.since_s > _LOAD_LIMIT_S:
                self._pending = None
            return
        if now < self._quiet_until_s or (self._thinking and not self._thinking.done()):
            return
        for instance, seen in enumerate(self._seen):
            if instance not in down and self._is_enough(instance, seen):
                self._quiet_until_s = now + _PAUSE_S * self._pauses
                self._thinking = asyncio.create_task(self._think(instance, now))
                return

    def close(self) -> None:
        if self._thinking is not None:
            self._thinking.cancel()

    def _is_enough(self, instance: int, seen: _Seen) -> bool:
        if len(self._replica.instances[instance].ranks) < 2 or seen.num_steps < _LEAST_STEPS:
            return False
        if any(not each.expert_bytes for key, each in self._facts.items() if key[0] == instance):
            return False  # it cannot load others
        if any(0 < steps < _LEAST_STEPS for steps in seen.rank_steps):
            return False
        means = [sum(layer) / len(layer) for layer in seen.tokens if sum(layer)]
        return bool(means) and min(means) >= _LEAST_TOKENS

    async def _think(self, instance: int, now: float) -> None:
        plan, everything_seen = self._replica.instances[instance], self._seen
        loads = self._loads(instance)
        speeds = self._believe(instance, self.speeds(instance))
        self._seen[instance].halve()
        dealings = list(plan.split.dealings(plan.layers))
        found: dict[int, Redealing] = {}
        for index, dealing in enumerate(dealings):
            if dealing and self._spec.layers[plan.layers.start + index].has_experts:
                slots = self._slots(instance, dealing)
                found[index] = await asyncio.to_thread(redeal, dealing, loads[index], speeds, slots)
        before, after = (
            sum(getattr(each, name) for each in found.values()) for name in ("before_s", "after_s")
        )
        if not before or (before - after) / before < WORTH or self._seen is not everything_seen:
            return  # not worth it, or workers failed by now
        changed = {index: each for index, each in found.items() if each.dealing != dealings[index]}
        for index, each in changed.items():
            dealings[index] = each.dealing
        self._deal(instance, tuple(dealings), set(changed), now)
        log.info(
            "experts of instance %d are dealt anew (dealing %d): %d move, in %d layers, since "
            "ranks compute at %s and tokens went %.1f times as often as on average to the most "
            "wanted expert; expected to take %.0f %% less time than now",
            instance,
            self._pending.version if self._pending else 0,
            sum(each.num_loads for each in changed.values()),
            len(changed),
            " : ".join(f"{speed / max(speeds):.2f}" for speed in speeds),
            max(max(layer) * len(layer) / sum(layer) for layer in loads if sum(layer)),
            100 * (before - after) / before,
        )

    def _deal(
        self, instance: int, experts: tuple[Dealing, ...], changed: set[int], now: float
    ) -> None:
        plan = self._replica.instances[instance]
        version = next(self._numbers)
        ranks = set(range(len(plan.ranks)))
        self._pending = _Pending(version, instance, experts, ranks, now)
        dealings = {plan.layers.start + index: experts[index] for index in sorted(changed)}
        self._send(instance, Deal(version, self.version, dealings))

    def _complete(self, pending: _Pending) -> None:
        self._pending = None
        self._replica = with_experts(self._replica, pending.instance, pending.experts)
        self._redealt(self._replica)
        self.version = pending.version
        self._pauses = min(self._pauses * 2, _MAX_PAUSES)
        log.info("experts of instance %d: dealing %d is in use", pending.instance, pending.version)

    # --- what the policy is told ---

    def _loads(self, instance: int) -> list[list[float]]:
        """Tokens that a Step sends to each expert of each layer, on average."""
        seen = self._seen[instance]
        return [[count / seen.num_steps for count in layer] for layer in seen.tokens]

    def _believe(self, instance: int, measured: list[float]) -> list[float]:
        """Relative speeds, which one look at a busy machine does not overturn."""
        shares = [speed / sum(measured) for speed in measured]
        before = self._believed.get(instance, shares)
        self._believed[instance] = [
            old + _NEW_SHARE * (new - old) for old, new in zip(before, shares, strict=True)
        ]
        return self._believed[instance]

    def speeds(self, instance: int) -> list[float]:
        """Of each rank, in readings of an expert per second."""
        plan, seen = self._replica.instances[instance], self._seen[instance]
        planned = [rank.speed for rank in plan.ranks]
        work = self._work(instance)
        measured = [
            units * steps / seconds if seconds > 0 else 0.0
            for units, steps, seconds in zip(work, seen.rank_steps, seen.rank_s, strict=True)
        ]
        means = [s / steps for s, steps in zip(seen.rank_s, seen.rank_steps, strict=True) if steps]
        if max(means, default=0.0) < _LEAST_STEP_S:
            return planned
        ratios = [each / plan for each, plan in zip(measured, planned, strict=True) if each]
        if not ratios:
            return planned
        usual = sum(ratios) / len(ratios)
        return [each or plan * usual for each, plan in zip(measured, planned, strict=True)]

    def _work(self, instance: int) -> list[float]:
        """Of each rank in a Step, in readings of an expert: its experts, and all its other weights.

        Others are read once in a Step too, and used for every token.
        """
        plan, loads = self._replica.instances[instance], self._loads(instance)
        dealings = plan.split.dealings(plan.layers)
        expert_bytes = self._expert_bytes(instance)
        assert self._spec.experts is not None
        sums = [sum(layer) for layer in loads if sum(layer)]
        num_tokens = sum(sums) / len(sums) / self._spec.experts.num_active if sums else 0.0
        work = []
        for rank in range(len(plan.ranks)):
            held = sum(len(dealing[rank]) for dealing in dealings if dealing)
            others = max(0, self._facts[instance, rank].weight_bytes - held * expert_bytes)
            work.append(others / expert_bytes * (1 + num_tokens / STEP_TOKENS))
        for dealing, layer in zip(dealings, loads, strict=True):
            if dealing:
                for expert, parts in enumerate(parts_of(dealing, len(layer))):
                    for rank, part in enumerate(parts):
                        work[rank] += share_cost(layer[expert], part)
        return work

    def _slots(self, instance: int, dealing: Dealing) -> list[int]:
        layers = self._replica.instances[instance].layers
        num_layers = sum(each.has_experts for each in self._spec.layers[layers.start : layers.stop])
        return [
            len(shares) + self._facts[instance, rank].expert_room // num_layers
            for rank, shares in enumerate(dealing)
        ]

    def _expert_bytes(self, instance: int) -> int:
        return max(
            1, *(each.expert_bytes for key, each in self._facts.items() if key[0] == instance)
        )


def with_experts(replica: ReplicaPlan, instance: int, experts: Sequence[Dealing]) -> ReplicaPlan:
    """The same plan with other experts in one instance."""
    number = itertools.count()
    return replace(
        replica,
        stages=tuple(
            StagePlan(
                instances=tuple(
                    replace(each, split=replace(each.split, experts=tuple(experts)))
                    if next(number) == instance
                    else each
                    for each in stage.instances
                )
            )
            for stage in replica.stages
        ),
    )
