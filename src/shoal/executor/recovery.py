"""What an executor does about workers that fail.

    a Step failed        everyone is reset; the instance's KV is given up
    a worker is lost     the same, and its instance is started again, with growing pauses
    workers are parted   everyone is reset; an instance waits until it is heard again

Each time a new incarnation begins: Steps on their way are abandoned, and the engine is told.
Runs on the executor's event loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

from shoal.core.errors import ShoalError
from shoal.core.plan import ReplicaPlan
from shoal.core.step import ExecutorEvent, InstancesReady, StepFailure
from shoal.executor.crew import Crew
from shoal.executor.liveness import Liveness, to_take_down
from shoal.executor.worker_process import WorkerProcess
from shoal.wire.worker_messages import Failed, Reset

log = logging.getLogger(__name__)

_WATCH_EVERY_S = 0.1
_SLEPT_S = 0.6
_BLAME_AFTER_S = 0.3
_START_LIMIT_S = 300.0
_LONGER_THAN_AT_FIRST = 3.0
"""Times what all took to be ready at first, if that is more: a disk may be slower now."""
_MAX_RESTARTS = 5
_RESTARTS_WITHIN_S = 60.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 30.0


class Recovery:
    """Follows one crew, from when it is ready.

    Args:
        post: tells the engine.
        began: called when a new incarnation has begun.
        give_up: called when an instance cannot be started any more.
    """

    def __init__(
        self,
        replica: ReplicaPlan,
        crew: Crew,
        *,
        post: Callable[[ExecutorEvent], None],
        began: Callable[[], None],
        give_up: Callable[[str], None],
    ) -> None:
        self.incarnation = 0
        self.liveness = Liveness()
        self._replica = replica
        self._crew = crew
        self._post = post
        self._began = began
        self._give_up = give_up
        self._starting: set[int] = set()
        self._parted: set[int] = set()
        self._restarts: defaultdict[int, deque[float]] = defaultdict(deque)
        self._start_limit_s = _START_LIMIT_S
        self._tasks: set[asyncio.Task[None]] = set()
        per_stage = Counter(replica.stage_of(i) for i in range(len(replica.instances)))
        self._stand_ins = {
            i: per_stage[replica.stage_of(i)] - 1 for i in range(len(replica.instances))
        }

    def watch(self, loading_s: float) -> None:
        """Begin: all workers are ready, which took so long."""
        self._start_limit_s = max(_START_LIMIT_S, _LONGER_THAN_AT_FIRST * loading_s)
        now = time.monotonic()
        for name in self._crew.workers:
            self.liveness.begin(name, now)
        self.follow(self._watch())

    def follow(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Run it until `close`. If it fails, workers are not followed any more: all is given up."""
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    @property
    def down(self) -> frozenset[int]:
        """Instances that run no Steps."""
        return frozenset(self._starting | self._parted)

    def close(self) -> None:
        for task in self._tasks:
            task.cancel()

    # --- what happens ---

    def worker_gone(self, worker: WorkerProcess, how: str) -> None:
        """Its process ended."""
        if self._crew.workers.get(worker.name) is not worker:
            return  # it was to end
        if worker.instance not in self._starting:
            self._fail(f"{worker.name} {how}", lost={worker.instance})
        for mate in self._crew.of(worker.instance):
            mate.fail(f"{worker.name} {how}")  # whoever starts the instance tries again

    def step_failed(self, worker: WorkerProcess, failed: Failed) -> None:
        if failed.incarnation != self.incarnation:
            return
        if failed.blames_step:
            self._fail(failed.reason, step_id=failed.step_id, kv_lost={worker.instance})
        else:
            # Most often because a rank died, which is about to be noticed by itself.
            self.follow(self._blame_later(worker, failed))

    def nothing_came(self, seconds: float) -> None:
        """No Step of some route came back for so long, though all workers are alive."""
        self._fail(f"no Step came back for {seconds:g} s")

    def reset_done(self, worker: WorkerProcess, incarnation: int) -> None:
        if incarnation == self.incarnation:
            self.liveness.reset_done(worker.name)

    # --- a new incarnation ---

    def _fail(
        self,
        reason: str,
        *,
        step_id: int | None = None,
        kv_lost: Iterable[int] = (),
        lost: Iterable[int] = (),
        parted: Iterable[int] = (),
    ) -> None:
        lost = set(lost)
        log.error("%s; incarnation %d begins", reason, self.incarnation + 1)
        failed, self.incarnation = self.incarnation, self.incarnation + 1
        self._parted = (self._parted | set(parted)) - lost
        for instance in lost - self._starting:
            self._starting.add(instance)
            for worker in self._crew.of(instance):
                self.liveness.end(worker.name)
                worker.kill()
            self.follow(self._start_again(instance))
        now = time.monotonic()
        for worker in self._crew.workers.values():
            if worker.instance not in lost:
                worker.send(Reset(self.incarnation))
                self.liveness.reset_sent(worker.name, now)
        self._began()
        self._post(
            StepFailure(
                step_id=step_id,
                reason=reason,
                incarnation=failed,
                lost=tuple(sorted({*kv_lost, *lost})),
                down=tuple(sorted(self.down)),
            )
        )

    async def _blame_later(self, worker: WorkerProcess, failed: Failed) -> None:
        await asyncio.sleep(_BLAME_AFTER_S)
        if failed.incarnation == self.incarnation:
            self._fail(f"{worker.name}: {failed.reason}", kv_lost={worker.instance})

    async def _start_again(self, instance: int) -> None:
        pause_s = _FIRST_PAUSE_S
        await self._crew.end(self._crew.of(instance))
        while not await self._try_to_start(instance):
            await self._crew.end(self._crew.of(instance))
            await asyncio.sleep(pause_s)
            pause_s = min(4 * pause_s, _LONGEST_PAUSE_S)
        now = time.monotonic()
        for worker in self._crew.of(instance):
            self.liveness.begin(worker.name, now)
            # There may be a later one than when it began to load.
            worker.send(Reset(self.incarnation))
        self._starting.discard(instance)
        self._parted.add(instance)  # until its peers have heard it

    async def _try_to_start(self, instance: int) -> bool:
        self._count_start(instance)
        try:
            async with asyncio.timeout(self._start_limit_s):
                await self._crew.ready(await self._crew.start(instance, self.incarnation))
        except TimeoutError:
            log.error("instance %d was not ready after %g s", instance, self._start_limit_s)
            return False
        except (ShoalError, OSError) as error:
            log.error("instance %d did not start again: %s", instance, error)
            return False
        return True

    def _count_start(self, instance: int) -> None:
        now, restarts = time.monotonic(), self._restarts[instance]
        restarts.append(now)
        while now - restarts[0] > _RESTARTS_WITHIN_S:
            restarts.popleft()
        if len(restarts) > _MAX_RESTARTS:
            self._give_up(
                f"instance {instance} was lost again: it was started {_MAX_RESTARTS} times "
                f"within {_RESTARTS_WITHIN_S:g} s; look above for what ended it, and start again"
            )

    # --- signs of life ---

    async def _watch(self) -> None:
        last = time.monotonic()
        while True:
            await asyncio.sleep(_WATCH_EVERY_S)
            now = time.monotonic()
            if now - last > _SLEPT_S:
                self.liveness.forgive(now - last)
            last = now
            if lost := self.liveness.lost(now):
                instances = {self._instance_of(name) for name in lost}
                self._fail("; ".join(lost.values()), lost=instances)
                continue
            self._look_for_parted(now)
            self._look_for_heard(now)

    def _look_for_parted(self, now: float) -> None:
        down = self._starting | self._parted
        instance_of = {name: self._instance_of(name) for name in self._crew.workers}
        pairs = [
            pair
            for pair in self.liveness.parted(now)
            if not down & {instance_of[name] for name in pair}
        ]
        if pairs:
            text = ", ".join(" and ".join(pair) for pair in sorted(pairs))
            chosen = to_take_down(pairs, instance_of, self._stand_ins)
            self._fail(f"{text} do not hear each other", parted=chosen)

    def _look_for_heard(self, now: float) -> None:
        heard = {i for i in self._parted if self._is_heard(i, now)}
        if heard:
            self._parted -= heard
            log.info("instances %s run again", sorted(heard))
            self._post(InstancesReady(tuple(sorted(heard))))

    def _is_heard(self, instance: int, now: float) -> bool:
        names = {worker.name for worker in self._crew.of(instance)}
        return self.liveness.hear_each_other(names, now)

    def _instance_of(self, name: str) -> int:
        return self._crew.workers[name].instance

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("following the workers failed", exc_info=error)
            self._give_up(f"following the workers failed: {error}")
