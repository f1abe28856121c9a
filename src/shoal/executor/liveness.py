"""Whether workers are alive, from what they say and when. Told the time, never asks for it.

    silent       no heartbeat: dead or stopped; its instance is started again
    stuck        at one Step for too long, or deaf to a Reset: the same
    cut off      alive, but two workers do not hear each other; waits until they do again

Knows nothing of processes or of how they are mended.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from shoal.wire.worker_messages import Beat

_SILENT_S = 3.0  # who stalls for two seconds goes on as if nothing were
_UNHEARD_S = 1.5
_HEARD_AGAIN_S = 0.75
_FRESH_S = 0.7  # two beats and some
_STEP_LIMIT_S = 60.0
_RESET_LIMIT_S = 5.0
"""A prompt's chunk that is under way cannot be interrupted on a rank without others."""


@dataclass(slots=True)
class _Pulse:
    """What is known of one worker."""

    at_s: float
    busy_s: float = 0.0
    unheard: dict[str, float] = field(default_factory=dict)
    reset_since_s: float | None = None


class Liveness:
    """Follows the workers that are ready."""

    def __init__(self) -> None:
        self._pulses: dict[str, _Pulse] = {}

    def begin(self, worker: str, now: float) -> None:
        """It is ready, and beats from now on."""
        self._pulses[worker] = _Pulse(now)

    def end(self, worker: str) -> None:
        self._pulses.pop(worker, None)

    def beat(self, worker: str, beat: Beat, now: float) -> None:
        if (pulse := self._pulses.get(worker)) is not None:
            pulse.at_s, pulse.busy_s, pulse.unheard = now, beat.busy_s, beat.heard_s

    def reset_sent(self, worker: str, now: float) -> None:
        if (pulse := self._pulses.get(worker)) is not None:
            pulse.reset_since_s = now

    def reset_done(self, worker: str) -> None:
        if (pulse := self._pulses.get(worker)) is not None:
            pulse.reset_since_s = None

    def forgive(self, seconds: float) -> None:
        """It was the observer that slept."""
        for pulse in self._pulses.values():
            pulse.at_s += seconds
            if pulse.reset_since_s is not None:
                pulse.reset_since_s += seconds

    def lost(self, now: float) -> Mapping[str, str]:
        """Workers that must be started again, and why."""
        found: dict[str, str] = {}
        for worker, pulse in self._pulses.items():
            if now - pulse.at_s > _SILENT_S:
                found[worker] = f"{worker} gave no sign of life for {_SILENT_S:g} s"
            elif pulse.busy_s > _STEP_LIMIT_S:
                found[worker] = (
                    f"{worker} has been at one Step for {_STEP_LIMIT_S:g} s; if it is only that "
                    "slow, lower --max-num-batched-tokens"
                )
            elif pulse.reset_since_s is not None and now - pulse.reset_since_s > _RESET_LIMIT_S:
                found[worker] = f"{worker} did not abandon its Step for {_RESET_LIMIT_S:g} s"
        return found

    def parted(self, now: float) -> frozenset[tuple[str, str]]:
        """Pairs, in order of name, one of which does not hear the other though both are alive."""
        return self._pairs(now, _UNHEARD_S)

    def hear_each_other(self, workers: Iterable[str], now: float) -> bool:
        """Whether those who talk with these workers are all heard, and hear them."""
        wanted = set(workers)
        return wanted <= self._pulses.keys() and not any(
            wanted & set(pair) for pair in self._pairs(now, _HEARD_AGAIN_S, only_fresh=False)
        )

    def _pairs(
        self, now: float, limit_s: float, *, only_fresh: bool = True
    ) -> frozenset[tuple[str, str]]:
        fresh = {
            worker
            for worker, pulse in self._pulses.items()
            if not only_fresh or now - pulse.at_s < _FRESH_S
        }
        return frozenset(
            (min(worker, peer), max(worker, peer))
            for worker in fresh
            for peer, seconds in self._pulses[worker].unheard.items()
            if peer in fresh and seconds > limit_s
        )


def to_take_down(
    pairs: Iterable[tuple[str, str]],
    instance_of: Mapping[str, int],
    num_stand_ins: Mapping[int, int],
) -> frozenset[int]:
    """Instances without which no parted pair is left: few, and such as others stand in for.

    Args:
        num_stand_ins: how many other instances each one's stage has.
    """
    left = {frozenset((instance_of[a], instance_of[b])) for a, b in pairs}
    chosen: set[int] = set()
    while left:
        candidates = {instance for pair in left for instance in pair}
        worst = max(
            candidates,
            key=lambda each: (sum(each in pair for pair in left), num_stand_ins[each], each),
        )
        chosen.add(worst)
        left = {pair for pair in left if worst not in pair}
    return frozenset(chosen)
