"""Executor: one worker in this process, in a thread of its own.

Steps run in the order they came. On a device that works asynchronously the next Step is
launched before the last one's result is collected. Knows nothing of requests.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Protocol

from shoal.core.split import Range
from shoal.core.step import ExecutorEvent, Step, StepFailure, StepResult
from shoal.core.step_times import InstanceStep, StepClock
from shoal.executor import Post

log = logging.getLogger(__name__)

# How often an asynchronous device is looked at while nothing new is there to launch.
_POLL_S = 0.0005


class PendingResult(Protocol):
    """A Step that was launched."""

    @property
    def done(self) -> bool:
        """Whether `wait` returns at once."""
        ...

    def wait(self) -> StepResult: ...


class StepWorker(Protocol):
    """What the executor needs of a worker (`worker/runner.py`, or a fake in tests)."""

    def launch(self, step: Step) -> PendingResult:
        """Start a Step; its result is collected with `wait`."""
        ...

    def reset(self) -> None:
        """Forget every sequence: a new incarnation begins."""
        ...


@dataclass(frozen=True, slots=True)
class _Launched:
    step: Step
    pending: PendingResult
    began_s: float


class InprocExecutor:
    """Runs a worker in a thread; after a failure, drops Steps of the old incarnation.

    Args:
        layers: of the worker; None: what Steps take is not kept.
    """

    def __init__(self, worker: StepWorker, layers: Range | None = None) -> None:
        self._worker = worker
        self._layers = layers
        self._clock = StepClock()
        self._ready_s = 0.0
        self._post: Post = log.debug  # until someone listens
        self._steps: SimpleQueue[Step | Callable[[], None] | None] = SimpleQueue()
        self._launched: deque[_Launched] = deque()
        self._failed_incarnation = -1
        self._others: list[Callable[[], None]] = []
        self._thread = threading.Thread(target=self._run, name="shoal-worker", daemon=True)
        self._thread.start()

    def listen(self, post: Post) -> None:
        """Tell `post` of results and failures, from the worker's thread."""
        self._post = post

    def tell(self, event: ExecutorEvent) -> None:
        """Pass on what is not a Step's, from any thread."""
        self._post(event)

    def submit(self, step: Step) -> None:
        self._steps.put(step)

    def steps_taken(self) -> tuple[InstanceStep, ...]:
        return tuple(InstanceStep(0, each) for each in self._clock.take())

    def between_steps(self, do: Callable[[], None]) -> None:
        """Have the worker's thread call something, in order with the Steps; if that raises, it is
        logged."""
        self._steps.put(do)

    def close_too(self, close: Callable[[], None]) -> None:
        """Have `close` end something else that reads the worker, once its thread has ended."""
        self._others.append(close)

    def close(self) -> None:
        """Finish the Step that runs, then end the thread."""
        self._steps.put(None)
        self._thread.join()
        for close in self._others:
            close()

    def _run(self) -> None:
        while True:
            try:
                has_waited = self._steps.empty()
                item = self._steps.get(timeout=_POLL_S if self._launched else None)
                if has_waited:
                    self._ready_s = time.monotonic()
            except Empty:
                pass
            else:
                if item is None:
                    return
                if isinstance(item, Step):
                    self._launch(item)
                else:
                    self._do(item)
            while self._launched and self._launched[0].pending.done:
                self._collect()

    def _do(self, chore: Callable[[], None]) -> None:
        try:
            chore()
        except Exception:
            # Whoever waits for it has a time limit; Steps must go on.
            log.exception("what was to be done between two Steps failed")

    def _launch(self, step: Step) -> None:
        if step.incarnation <= self._failed_incarnation:
            return
        try:
            began_s = self._ready_s
            self._launched.append(_Launched(step, self._worker.launch(step), began_s))
        except Exception as error:  # noqa: BLE001 - see _fail
            self._fail(step, error)

    def _collect(self) -> None:
        first = self._launched.popleft()
        try:
            result = first.pending.wait()
        except Exception as error:  # noqa: BLE001 - see _fail
            self._fail(first.step, error)
        else:
            if self._layers is not None:
                self._clock.note(first.step, self._layers, first.began_s, time.monotonic())
            self._post(result)

    def _fail(self, step: Step, error: Exception) -> None:
        """Whatever a device throws ends the incarnation, not the engine."""
        log.error("step %d failed", step.step_id, exc_info=error)
        self._failed_incarnation = step.incarnation
        self._launched.clear()
        self._worker.reset()
        self._post(
            StepFailure(
                step_id=step.step_id,
                reason=f"{type(error).__name__}: {error}",
                incarnation=step.incarnation,
            )
        )
