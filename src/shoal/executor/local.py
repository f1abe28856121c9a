"""Executor: the workers of a replica in processes, on this host or on a cluster's.

    submit ─► every rank of every instance on the Step's route        encoded once
    rank 0 of its last instance ─► result ─► engine

Workers that fail are `recovery.py`'s. Everything happens on an event loop in a thread of its
own. Knows nothing of requests.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from shoal.core.errors import ConfigError
from shoal.core.model_spec import ModelSpec
from shoal.core.options import EngineOptions
from shoal.core.plan import ReplicaPlan
from shoal.core.step import ExecutorEvent, Step, StepResult
from shoal.core.step_times import MAX_STEPS_KEPT, InstanceStep, drained
from shoal.executor import Post
from shoal.executor.capacity import Capacity, Facts, links_line, settle
from shoal.executor.crew import Crew
from shoal.executor.dealing import Dealer
from shoal.executor.lab_state import VARIABLE, LabState
from shoal.executor.launcher import Launcher, LocalLauncher
from shoal.executor.link_forms import LinkForms
from shoal.executor.overdue import Overdue
from shoal.executor.recovery import Recovery
from shoal.executor.transfers import CrewMover, KVMover, Order
from shoal.executor.worker_process import WorkerProcess
from shoal.wire.kv_messages import KVKeys
from shoal.wire.messages import HostNet, LaunchFailed, Loading
from shoal.wire.worker_messages import (
    Beat,
    Bound,
    Deal,
    Dealt,
    Done,
    ExpertLoad,
    Failed,
    FromWorker,
    Loaded,
    Pulled,
    Release,
    ResetDone,
    Run,
    StoreGet,
    StoreSet,
    Warm,
)

log = logging.getLogger(__name__)

_LOOK_EVERY_S = 0.2
_NO_RESULT_S = 60.0

Progress = Callable[[int, int], None]
Result = TypeVar("Result")


class LocalExecutor:
    """Runs a replica plan in worker processes.

    Args:
        hosts: of a lab or a cluster, that the plan's ranks name.
        kv_keys: to exchange KV with workers of all replicas; None: they do not.

    Raises:
        DeviceError, ModelError, ConfigError: what the user can mend.
    """

    def __init__(
        self,
        replica: ReplicaPlan,
        options: EngineOptions,
        spec: ModelSpec,
        *,
        hosts: Mapping[str, HostNet],
        kv_keys: KVKeys | None = None,
        say: Callable[[str], None],
        progress: Progress,
    ) -> None:
        _check_hosts(replica, hosts)
        self._replica = replica
        self._progress = _TotalProgress(progress)
        self._post: Post = log.debug  # until someone listens
        self._when_lost: Callable[[], None] = lambda: None
        self._crew = Crew(
            replica,
            options,
            make_launcher(hosts),
            kv_keys=kv_keys.of_worker if kv_keys else None,
            take=self._take,
            gone=self._gone,
        )
        self._recovery = Recovery(
            replica, self._crew, post=self._tell, began=self._forget, give_up=self._give_up
        )
        self._lab = _lab_state(self._crew, _name_among_others(kv_keys))
        self._overdue = Overdue(_NO_RESULT_S)
        self._taken: deque[InstanceStep] = deque(maxlen=MAX_STEPS_KEPT)
        self._is_watched = False
        self._dealer: Dealer | None = None
        self._forms: LinkForms | None = None
        self._loop = asyncio.new_event_loop()
        self._mover = self._make_mover(spec, kv_keys) if kv_keys else None
        self._thread = threading.Thread(target=self._run, name="shoal-executor", daemon=True)
        self._thread.start()
        try:
            self.capacity: Capacity = self._call(self._launch(options, spec, say))
        except BaseException:
            self.close()
            raise

    def listen(self, post: Post) -> None:
        self._post = post

    def when_lost(self, tell: Callable[[], None]) -> None:
        """Call `tell`, from another thread, when workers cannot be started any more."""
        self._when_lost = tell

    @property
    def mover(self) -> KVMover | None:
        """Of the workers' KV; None: it stays where it is."""
        return self._mover

    def submit(self, step: Step) -> None:
        if self._dealer is not None and self._dealer.version:
            step = replace(step, dealing=self._dealer.version)
        frame = self._crew.codec.encode(Run(step))
        self._loop.call_soon_threadsafe(self._deliver, step, frame)

    def steps_taken(self) -> tuple[InstanceStep, ...]:
        return drained(self._taken)

    def close(self) -> None:
        """End every worker."""
        if self._thread.is_alive():
            self._call(self._end())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    # --- starting and ending ---

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    def _call(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    async def _launch(
        self, options: EngineOptions, spec: ModelSpec, say: Callable[[str], None]
    ) -> Capacity:
        started_s = time.monotonic()
        crews = [
            await self._crew.start(instance, 0) for instance in range(len(self._replica.instances))
        ]
        workers = [worker for crew in crews for worker in crew]
        found = await asyncio.gather(*(asyncio.shield(worker.loaded) for worker in workers))
        facts = {
            (worker.instance, worker.rank): each
            for worker, each in zip(workers, found, strict=True)
        }
        capacity = settle(self._replica, options, spec, facts)
        for line in capacity.lines:
            say(line)
        await self._crew.ready(workers)
        self._tell_forms(options, spec, workers, say)
        loading_s = time.monotonic() - started_s
        say(f"workers    {len(workers)} ready after {loading_s:.1f} s")
        self._is_watched = True
        if options.expert_redeal and spec.experts is not None:
            self._dealer = self._make_dealer(spec, facts)
        self._recovery.watch(loading_s)
        self._recovery.follow(self._look())
        return capacity

    def _tell_forms(
        self,
        options: EngineOptions,
        spec: ModelSpec,
        workers: list[WorkerProcess],
        say: Callable[[str], None],
    ) -> None:
        if links := [(each.name, link) for each in workers for link in each.warm.result().links]:
            say(links_line(links))
        warm = {(each.instance, each.rank): each.warm.result() for each in workers}
        self._forms = LinkForms(self._replica, options, spec, warm)
        for line in self._forms.lines:
            say(line)
        for worker in workers:
            worker.send(self._forms.of(worker.name))

    async def _end(self) -> None:
        self._is_watched = False
        self._recovery.close()
        if self._dealer is not None:
            self._dealer.close()
        await self._crew.close()

    def _give_up(self, reason: str) -> None:
        log.critical("%s", reason)
        self._when_lost()

    def _make_mover(self, spec: ModelSpec, keys: KVKeys) -> CrewMover:
        workers = self._crew.workers

        def send(name: str, order: Order) -> None:
            if (worker := workers.get(name)) is not None:
                worker.send(order)

        return CrewMover(
            self._replica,
            spec,
            keys.replica,
            addresses=lambda: {each.name: each.kv_address for each in list(workers.values())},
            send=send,
            call=self._loop.call_soon_threadsafe,
            arrived=self._tell,
        )

    def _make_dealer(self, spec: ModelSpec, facts: Facts) -> Dealer:
        def send(instance: int, deal: Deal) -> None:
            frame = self._crew.codec.encode(deal)
            for worker in self._crew.of(instance):
                worker.send_frame(frame)

        return Dealer(self._replica, spec, facts, send=send, redealt=self._crew.redealt)

    # --- Steps ---

    def _deliver(self, step: Step, frame: bytes) -> None:
        if step.incarnation != self._recovery.incarnation:
            return
        self._overdue.handed_out(step.step_id, step.route, time.monotonic())
        hops = self._replica.routes[step.route][: step.num_hops]
        on_route = {hop.instance for hop in hops}
        for worker in self._crew.workers.values():
            if worker.instance in on_route:
                worker.send_frame(frame)
            elif step.released:
                worker.send(Release(step.released))

    def _tell(self, event: ExecutorEvent) -> None:
        self._post(event)

    def _forget(self) -> None:
        self._overdue.forget()
        if self._dealer is not None:
            self._dealer.drop()
        if self._lab is not None:
            self._write_workers(self._lab)

    def _done(self, result: StepResult) -> None:
        if result.incarnation == self._recovery.incarnation:
            self._overdue.came(result.step_id, time.monotonic())
            self._post(result)

    # --- what workers say ---

    def _take(self, worker: WorkerProcess, message: FromWorker) -> None:
        match message:
            case Done(result):
                self._done(result)
            case Beat():
                self._recovery.liveness.beat(worker.name, message, time.monotonic())
                self._taken.extend(InstanceStep(worker.instance, each) for each in message.taken)
            case Failed():
                self._recovery.step_failed(worker, message)
            case ResetDone(incarnation):
                self._recovery.reset_done(worker, incarnation)
            case Pulled(pull_id, num_blocks):
                if self._mover is not None:
                    orders = self._mover.orders
                    orders.pulled(worker.name, worker.instance, pull_id, num_blocks)
            case ExpertLoad():
                if self._dealer is not None:
                    self._dealer.take_load(worker.instance, worker.rank, message)
            case Dealt():
                if self._dealer is not None:
                    self._dealer.take_dealt(worker.instance, worker.rank, message)
            case Loading(_, done, total):
                self._progress(worker.name, done, total)
            case Bound(addresses, pid, kv_address):
                worker.pid, worker.kv_address = pid, kv_address
                _settle(worker.bound, addresses)
            case Loaded():
                _settle(worker.loaded, message)
            case Warm():
                if self._forms is not None:
                    worker.send(self._forms.of(worker.name))
                _settle(worker.warm, message)
                self._put_in_lab(worker)
            case LaunchFailed(reason):
                worker.fail(f"{worker.name}: {reason}")
            case StoreSet():
                self._crew.set_in_store(worker, message)
            case StoreGet():
                self._crew.get_from_store(worker, message)

    def _gone(self, worker: WorkerProcess, how: str) -> None:
        if self._is_watched:
            self._recovery.worker_gone(worker, how)
            return
        for other in self._crew.workers.values():
            other.fail(f"{worker.name} {how}")  # without it there is no use in waiting for them

    # --- what is looked at from time to time ---

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            now = time.monotonic()
            if self._overdue.is_late(now):
                self._recovery.nothing_came(_NO_RESULT_S)
            if self._dealer is not None:
                self._dealer.look(now, self._recovery.down)
            if self._lab is not None and self._lab.changed():
                for worker in self._crew.workers.values():
                    self._put_in_lab(worker)

    def _put_in_lab(self, worker: WorkerProcess) -> None:
        if self._lab is not None and worker.is_warm:
            worker.send(self._lab.wanted(worker.name, worker.speed))
            self._write_workers(self._lab)

    def _write_workers(self, lab: LabState) -> None:
        lab.write_workers({each.name: each.pid for each in self._crew.workers.values()})


def _settle(future: asyncio.Future[Result], value: Result) -> None:
    if not future.done():
        future.set_result(value)


def _check_hosts(replica: ReplicaPlan, hosts: Mapping[str, HostNet]) -> None:
    named = {rank.host for each in replica.instances for rank in each.ranks if rank.host}
    if unknown := sorted(named - hosts.keys()):
        raise ConfigError(
            f"the plan names host {unknown[0]!r}, which is not there; hosts are a lab's or a "
            "cluster's: start it with `shoal lab up` or `shoal up`, or remove host from the plan"
        )


def make_launcher(hosts: Mapping[str, HostNet]) -> Launcher:
    """Of the hosts that a plan names: a cluster's, or this machine's.

    Raises:
        ConfigError: the cluster cannot be used.
    """
    for host in hosts.values():
        if host.cluster is not None:
            from shoal.executor.ray_launcher import RayLauncher

            return RayLauncher(host.cluster)
    return LocalLauncher(hosts)


def _name_among_others(kv_keys: KVKeys | None) -> str:
    """Of this replica, where there are several; one alone may have keys for its own routes."""
    if kv_keys is None:
        return ""
    known = {name.partition("/")[0] for keys in kv_keys.of_worker.values() for name in keys.public}
    return kv_keys.replica if len(known) > 1 else ""


def _lab_state(crew: Crew, replica: str) -> LabState | None:
    path = os.environ.get(VARIABLE)
    return LabState(Path(path), crew.hosts_of, replica) if path else None


class _TotalProgress:
    """How far all workers are with loading, together."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._parts: dict[str, tuple[int, int]] = {}

    def __call__(self, worker: str, done: int, total: int) -> None:
        self._parts[worker] = done, total
        sums = (sum(part) for part in zip(*self._parts.values(), strict=True))
        self._progress(*sums)
