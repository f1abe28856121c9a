"""Executor: all workers of a replica in threads of this process, over queues.

The same stages as in processes (`executor/local.py`), for tests and for `LLM` with a plan. A
thread cannot be ended or started again, so only Steps fail here, not workers. Knows nothing of
requests.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping

from torch import Tensor

from shoal.core.model_spec import ModelSpec
from shoal.core.options import EngineOptions
from shoal.core.plan import ReplicaPlan
from shoal.core.split import stacked
from shoal.core.step import Step, StepFailure
from shoal.core.step_times import InstanceStep
from shoal.executor import Post
from shoal.executor.capacity import Capacity, settle
from shoal.executor.shares import rank_options
from shoal.wire.peer_messages import PeerMessage
from shoal.wire.worker_messages import Done, Failed, Loaded, Release, ResetDone
from shoal.worker.groups import groups_in_threads
from shoal.worker.launch import LoadedWorker, load_worker, warm_up
from shoal.worker.place import Place
from shoal.worker.runner import Worker
from shoal.worker.stage import FromPeer, StageRunner

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]


class ThreadExecutor:
    """Runs a replica plan in this process.

    Raises:
        DeviceError, ModelError, ConfigError: what the user can mend.
    """

    def __init__(
        self,
        replica: ReplicaPlan,
        options: EngineOptions,
        spec: ModelSpec,
        *,
        say: Callable[[str], None],
        progress: Progress,
    ) -> None:
        self._replica = replica
        self._post: Post = log.debug  # until someone listens
        self._lock = threading.Lock()
        self._incarnation = 0
        self._runners: dict[str, StageRunner] = {}
        self._instances: list[list[StageRunner]] = []
        self._threads: list[threading.Thread] = []
        facts: dict[tuple[int, int], Loaded] = {}
        workers: list[list[Worker]] = [[] for _ in replica.instances]
        for instance, plan in enumerate(replica.instances):
            self._instances.append([])
            for rank, group in enumerate(groups_in_threads(len(plan.ranks), plan.split.streams)):
                place = Place(replica, instance, rank)
                loaded = load_worker(
                    rank_options(options, replica, instance, rank),
                    spec,
                    shard=place.shard,
                    group=group,
                    routes=replica.routes,
                    say=lambda line: None,
                    progress=progress,
                )
                facts[instance, rank] = loaded.facts
                workers[instance].append(loaded.worker)
                runner = StageRunner(
                    loaded.worker,
                    place,
                    _Queues(self._runners),
                    self._reporter(instance),
                    group=group,
                )
                self._runners[place.name] = runner
                self._instances[instance].append(runner)
                self._threads.append(_thread(place, loaded, runner))
        self.capacity: Capacity = settle(replica, options, spec, facts)
        for loaded_of, own in zip(workers, self.capacity.rank_blocks, strict=True):
            for worker, blocks in zip(loaded_of if own else (), stacked(own), strict=True):
                worker.hold(blocks)
        for line in self.capacity.lines:
            say(line)
        for thread in self._threads:
            thread.start()

    def listen(self, post: Post) -> None:
        self._post = post

    def submit(self, step: Step) -> None:
        hops = self._replica.routes[step.route][: step.num_hops]
        on_route = {hop.instance for hop in hops}
        for instance, runners in enumerate(self._instances):
            for runner in runners:
                if instance in on_route:
                    runner.post(step)
                elif step.released:
                    runner.post(Release(step.released))

    def steps_taken(self) -> tuple[InstanceStep, ...]:
        return tuple(
            InstanceStep(instance, each)
            for instance, runners in enumerate(self._instances)
            for each in runners[0].steps.take()
        )

    def close(self) -> None:
        for runner in self._runners.values():
            runner.stop()
        for thread in self._threads:
            thread.join()

    def _reporter(self, instance: int) -> Callable[[Done | Failed | ResetDone], None]:
        def report(message: Done | Failed | ResetDone) -> None:
            match message:
                case Done(result):
                    self._post(result)
                case Failed():
                    self._fail(message, instance)
                case ResetDone():
                    pass

        return report

    def _fail(self, failed: Failed, instance: int) -> None:
        with self._lock:
            if failed.incarnation != self._incarnation:
                return  # ranks of one instance fail together
            self._incarnation += 1
        for runner in self._runners.values():
            runner.reset(failed.incarnation + 1)
        self._post(
            StepFailure(
                step_id=failed.step_id,
                reason=failed.reason,
                incarnation=failed.incarnation,
                lost=(instance,),
            )
        )


class _Queues:
    """Messages among runners of one process: objects, handed over as they are."""

    def __init__(self, runners: Mapping[str, StageRunner]) -> None:
        self._runners = runners

    def send(self, peer: str, message: PeerMessage, hidden_TE: Tensor | None = None) -> None:
        self._runners[peer].post(FromPeer(message, hidden_TE))


def _thread(place: Place, loaded: LoadedWorker, runner: StageRunner) -> threading.Thread:
    def run() -> None:
        if place.hops:
            route, hop = next(iter(place.hops.items()))
            warm_up(loaded.worker, route=route, num_hops=len(place.routes[route]), hop=hop)
        runner.run()

    return threading.Thread(target=run, name=place.name, daemon=True)
