"""Steps that were handed out and have not come back. Knows nothing of requests.

Results of a route come in order, but for Steps that stop at an earlier hop; those of different
routes come as they may.
"""

from __future__ import annotations

from collections import Counter

from shoal.core.step import Step, StepResult
from shoal.engine.batch import Batch
from shoal.engine.config import EngineConfig


class Flight:
    """Numbers Steps, and remembers what is in them.

    Attributes:
        depth: Steps of one route that are in flight at most.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.depth = config.steps_per_route
        self._num_hops = [len(route) for route in config.routes]
        self._batches: dict[int, Batch] = {}
        self._of_route: Counter[int] = Counter()
        self.incarnation = 0
        self.next_step_id = 0

    def __len__(self) -> int:
        return len(self._batches)

    @property
    def batches(self) -> list[Batch]:
        """Oldest first."""
        return list(self._batches.values())

    def has_room(self, route: int) -> bool:
        return self._of_route[route] < self.depth

    def hand_out(self, batch: Batch, released: tuple[int, ...]) -> Step:
        """The Step of a batch that was filled for `next_step_id`."""
        assert batch.step_id == self.next_step_id
        self.next_step_id += 1
        self._batches[batch.step_id] = batch
        self._of_route[batch.route] += 1
        return self.step(batch, released)

    def step(self, batch: Batch, released: tuple[int, ...]) -> Step:
        """What workers are told of a batch."""
        return Step(
            step_id=batch.step_id,
            incarnation=self.incarnation,
            rows=tuple([row for _, row in batch.rows]),
            released=released,
            route=batch.route,
            num_hops=None if batch.num_hops == self._num_hops[batch.route] else batch.num_hops,
        )

    def take(self, result: StepResult) -> Batch:
        """What a Step of this incarnation that came back had in it."""
        batch = self._batches.pop(result.step_id)
        self._of_route[batch.route] -= 1
        return batch

    def skip(self, num_steps: int) -> list[Batch]:
        """As if so many had come back, and as many been handed out; those in flight then, oldest
        first, with the rows of those that were."""
        batches = self.batches
        for batch in batches:
            batch.step_id += num_steps
            batch.num_prompt_tokens, batch.num_prompt_pairs = 0, 0.0
        self._batches = {batch.step_id: batch for batch in batches}
        self.next_step_id += num_steps
        return batches

    def abandon(self) -> list[Batch]:
        """All of them, oldest first; a new incarnation begins."""
        batches = list(self._batches.values())
        self._batches.clear()
        self._of_route.clear()
        self.incarnation += 1
        self.next_step_id = 0
        return batches
