"""Steps that were handed out and have not come back. Knows nothing of requests.

Results of a route come in order, but for Steps that stop at an earlier hop; those of different
routes come as they may.
"""

from __future__ import annotations

from collections import Counter

from shoal.core.step import Step, StepResult
from shoal.engine.config import EngineConfig
from shoal.engine.scheduler import Batch


class Flight:
    """Numbers Steps, and remembers what is in them."""

    def __init__(self, config: EngineConfig) -> None:
        self._most = config.steps_per_route
        self._num_hops = [len(route) for route in config.routes]
        self._batches: dict[int, Batch] = {}
        self._of_route: Counter[int] = Counter()
        self.incarnation = 0
        self.next_step_id = 0

    def __len__(self) -> int:
        return len(self._batches)

    def has_room(self, route: int) -> bool:
        return self._of_route[route] < self._most

    def hand_out(self, batch: Batch, released: tuple[int, ...]) -> Step:
        """The Step of a batch that was filled for `next_step_id`."""
        assert batch.step_id == self.next_step_id
        self.next_step_id += 1
        self._batches[batch.step_id] = batch
        self._of_route[batch.route] += 1
        return Step(
            step_id=batch.step_id,
            incarnation=self.incarnation,
            rows=tuple(row for _, row in batch.rows),
            released=released,
            route=batch.route,
            num_hops=None if batch.num_hops == self._num_hops[batch.route] else batch.num_hops,
        )

    def take(self, result: StepResult) -> Batch:
        """What a Step of this incarnation that came back had in it."""
        batch = self._batches.pop(result.step_id)
        self._of_route[batch.route] -= 1
        return batch

    def skip(self, num_steps: int) -> None:
        """So many Steps, while none is in flight, are as if they had been there."""
        assert not self._batches, "Steps are in flight"
        self.next_step_id += num_steps

    def abandon(self) -> list[Batch]:
        """All of them, oldest first; a new incarnation begins."""
        batches = list(self._batches.values())
        self._batches.clear()
        self._of_route.clear()
        self.incarnation += 1
        self.next_step_id = 0
        return batches
