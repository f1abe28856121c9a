"""What replicas of one name did before they were lost: counted along with those that are there.

Knows nothing of why they were lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from shoal.core.stats import Computed, EngineStats
from shoal.sim.records import ReplicaSample
from shoal.sim.replica import SimulatedReplica


class Past:
    """
    Args:
        num_instances: of each of them.
    """

    def __init__(self, num_instances: int) -> None:
        self._none = (0.0,) * num_instances
        self._stats: list[EngineStats] = []
        self._busy_s: list[tuple[float, ...]] = []

    def add(self, lost: SimulatedReplica) -> None:
        self._stats.append(lost.stats())
        self._busy_s.append(lost.busy_s)

    def stats(self, present: SimulatedReplica | None) -> EngineStats:
        """Counters of all of them together."""
        return _summed([*self._stats, *([] if present is None else [present.stats()])])

    def sample(self, present: SimulatedReplica | None, now: float) -> ReplicaSample:
        """How the one that is there stands; tokens and seconds are those of all."""
        none = ReplicaSample(0, 0, 0.0, (0,) * len(self._none), 0, self._none)
        found = none if present is None else present.sample(now)
        if not self._stats:
            return found
        busy_s = tuple(map(sum, zip(*self._busy_s, found.busy_s, strict=True)))
        tokens = sum(each.output_tokens for each in self._stats) + found.output_tokens
        return replace(found, busy_s=busy_s, output_tokens=tokens)


def _summed(found: Sequence[EngineStats]) -> EngineStats:
    return EngineStats(
        prompt_tokens=sum(each.prompt_tokens for each in found),
        cached_tokens=sum(each.cached_tokens for each in found),
        output_tokens=sum(each.output_tokens for each in found),
        preemptions=sum(each.preemptions for each in found),
        computed=Computed(steps=sum(each.computed.steps for each in found)),
        busy_s=sum(each.busy_s for each in found),
    )
