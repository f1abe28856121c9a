"""Where workers run, and how Steps get to them. Knows nothing of requests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from shoal.core.step import ExecutorEvent, Step
from shoal.core.step_times import InstanceStep

Post = Callable[[ExecutorEvent], None]


class Executor(Protocol):
    """Runs the Steps of one engine.

    Steps of a route are run in the order they are submitted. After a `StepFailure` nothing of
    its incarnation comes any more.
    """

    def listen(self, post: Post) -> None:
        """Tell `post` of results and failures from now on, from any thread; called once."""

    def submit(self, step: Step) -> None:
        """Run a Step; does not block."""

    def steps_taken(self) -> tuple[InstanceStep, ...]:
        """What Steps took since the last call, the latest of them; from any thread."""

    def close(self) -> None:
        """End what runs, and all that was started for it."""
