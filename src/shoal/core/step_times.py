"""What Steps took on an instance, kept for whoever fits a cost model to it.

    a Step's seconds    from when the instance could begin it (it was there, and the one before it
                        had ended) until it had ended

So they add up to what the instance is busy, with all that lies between two Steps. Knows nothing of
models or of fitting.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TypeVar

from shoal.core.plan import ReplicaPlan
from shoal.core.split import Range
from shoal.core.step import Step

Rows = tuple[tuple[int, int, bool], ...]
"""Of each row: the position of its first new token, new tokens, whether it samples."""

Kept = TypeVar("Kept")

MAX_STEPS_KEPT = 4096
"""Of a replica."""

_KEPT = 32


@dataclass(frozen=True, slots=True)
class StepTaken:
    """Seconds that an instance took for these layers of a Step."""

    layers: Range
    rows: Rows
    seconds: float


@dataclass(frozen=True, slots=True)
class InstanceStep:
    """Of which instance of its replica."""

    instance: int
    taken: StepTaken


@dataclass(frozen=True, slots=True)
class ReplicaSteps:
    """The latest Steps of a replica.

    Attributes:
        plan: what they ran on; None: one device.
        dtype: of its weights and KV, as its engine says it.
    """

    plan: ReplicaPlan | None
    dtype: str
    steps: tuple[InstanceStep, ...]


class StepClock:
    """Times of the Steps of one instance; the latest are kept until they are taken."""

    def __init__(self) -> None:
        self._taken: deque[StepTaken] = deque(maxlen=_KEPT)
        self._ended_s = 0.0

    def note(self, step: Step, layers: Range, began_s: float, ended_s: float) -> None:
        """A Step that could begin at `began_s`, if the one before it had ended."""
        seconds = ended_s - max(began_s, self._ended_s)
        self._ended_s = ended_s
        rows = tuple((row.start, row.num_tokens, row.samples) for row in step.rows)
        if rows and seconds > 0:
            self._taken.append(StepTaken(layers, rows, seconds))

    def take(self) -> tuple[StepTaken, ...]:
        """Those since the last call; from any thread."""
        return drained(self._taken)


def drained(kept: deque[Kept]) -> tuple[Kept, ...]:
    """All that is there; others may add meanwhile."""
    return tuple(kept.popleft() for _ in range(len(kept)))
