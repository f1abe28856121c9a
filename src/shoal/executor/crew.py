"""The worker processes of a replica: started instance by instance, found by name.

    start      every rank of an instance is told what to load, its keys, its group's memory
    connect    all are told where all are
    end        an instance's processes are killed, and reaped

Runs on the executor's event loop. Knows nothing of Steps, or of when an instance is to be
started again.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from shoal.core.options import EngineOptions
from shoal.core.plan import ReplicaPlan
from shoal.core.split import stacked
from shoal.executor.capacity import rank_blocks
from shoal.executor.launcher import Launcher, Spot, WorkerCodec
from shoal.executor.rank_store import RankStore
from shoal.executor.shares import rank_options
from shoal.executor.worker_process import WorkerProcess
from shoal.wire.curve import MeshKeys, make_keys
from shoal.wire.worker_messages import (
    Connect,
    FromWorker,
    HoldBlocks,
    LaunchWorker,
    StoreGet,
    StoreSet,
)
from shoal.worker.group_kinds import group_kind, group_memory

Take = Callable[[WorkerProcess, FromWorker], None]
Gone = Callable[[WorkerProcess, str], None]


class Crew:
    """The workers there are.

    Args:
        launcher: starts them.
        kv_keys: of each worker, to exchange KV with those of all replicas.
        take: told what a worker says; gone: that it ended, and how.
    """

    def __init__(
        self,
        replica: ReplicaPlan,
        options: EngineOptions,
        launcher: Launcher,
        *,
        kv_keys: Mapping[str, MeshKeys] | None = None,
        take: Take,
        gone: Gone,
    ) -> None:
        self.codec: WorkerCodec = WorkerCodec(FromWorker)
        self.workers: dict[str, WorkerProcess] = {}
        self.hosts_of = {
            replica.worker_name(instance, rank): each.host
            for instance, plan in enumerate(replica.instances)
            for rank, each in enumerate(plan.ranks)
        }
        self._replica = replica
        self._options = options
        self._launcher = launcher
        self._take = take
        self._gone = gone
        self._keys = make_keys(self.hosts_of)
        self._kv_keys = kv_keys or {}
        self._kv_bytes: dict[str, int] = {}
        self._stores: dict[int, RankStore] = {}
        self._following: set[asyncio.Task[None]] = set()

    def of(self, instance: int) -> list[WorkerProcess]:
        return [each for each in self.workers.values() if each.instance == instance]

    def redealt(self, replica: ReplicaPlan) -> None:
        """Workers that are started from now on have these experts."""
        self._replica = replica

    async def start(self, instance: int, incarnation: int) -> list[WorkerProcess]:
        """Start an instance's workers; they load by themselves."""
        ranks = self._replica.instances[instance].ranks
        self._stores[instance] = RankStore()
        spots = await self._launcher.place(instance, ranks)
        kind = group_kind(ranks)
        if kind == "shared_memory" and not all(spot.is_child for spot in spots):
            kind = "gloo"  # no descriptor gets there
        fd = group_memory(kind, len(ranks))
        started = []
        try:
            for rank, spot in enumerate(spots):
                started.append(await self._start(instance, rank, incarnation, kind, fd, spot))
        finally:
            if fd is not None:
                os.close(fd)
        return started

    async def ready(self, workers: Iterable[WorkerProcess]) -> None:
        """Let everyone know where all are, and wait until these have run their first Step.

        Raises:
            DeviceError: one of them ended.
        """
        workers = list(workers)
        await _all(worker.bound for worker in workers)
        for worker in workers:
            self._kv_bytes[worker.name] = (await worker.loaded).kv_bytes
        for instance in sorted({worker.instance for worker in workers}):
            self._share_blocks(instance)
        self.connect()
        await _all(worker.warm for worker in workers)

    def _share_blocks(self, instance: int) -> None:
        """Tell its ranks which KV blocks are whose, where they split KV by tokens."""
        workers = sorted(self.of(instance), key=lambda each: each.rank)
        own = rank_blocks(self._replica, instance, [each.loaded.result() for each in workers])
        for worker, blocks in zip(workers if own else (), stacked(own), strict=True):
            worker.send(HoldBlocks(blocks))

    def connect(self) -> None:
        """Tell everyone where all are; who has moved is reached anew."""
        addresses = {
            name: each.bound.result() for name, each in self.workers.items() if each.is_bound
        }
        for worker in self.workers.values():
            if worker.is_bound:
                worker.send(Connect(addresses))

    async def end(self, workers: Iterable[WorkerProcess]) -> None:
        """Kill and reap them."""
        workers = list(workers)
        for worker in workers:
            worker.kill()
            if self.workers.get(worker.name) is worker:
                del self.workers[worker.name]
        await asyncio.gather(*(asyncio.to_thread(worker.wait) for worker in workers))

    async def close(self) -> None:
        """End everyone."""
        await self.end(self.workers.values())
        for task in list(self._following):
            task.cancel()
        await asyncio.gather(*self._following, return_exceptions=True)
        await asyncio.to_thread(self._launcher.close)

    def set_in_store(self, worker: WorkerProcess, message: StoreSet) -> None:
        """One rank's word to the others of its instance, who may be waiting for it."""
        self._stores[worker.instance].set(message)

    def get_from_store(self, worker: WorkerProcess, message: StoreGet) -> None:
        self._stores[worker.instance].get(worker.send, message)

    async def _start(
        self, instance: int, rank: int, incarnation: int, kind: str, fd: int | None, spot: Spot
    ) -> WorkerProcess:
        place = self._replica.instances[instance].ranks[rank]
        name = self._replica.worker_name(instance, rank)
        options = rank_options(self._options, self._replica, instance, rank, spot.num_cpus)
        if name in self._kv_bytes:
            # As much as the engine counts on, whatever is free now.
            options = replace(options, kv_cache_memory_bytes=self._kv_bytes[name] or None)
        keys = self._keys[name]
        worker = WorkerProcess(
            LaunchWorker(
                name=name,
                options=options,
                replica=self._replica,
                instance=instance,
                rank=rank,
                incarnation=incarnation,
                group=kind,
                group_fd=fd,
                address=spot.address,
                keys=keys,
                speed=place.speed,
                kv_keys=self._kv_keys.get(name),
            ),
            self.codec,
        )
        self.workers[name] = worker
        await worker.start(spot)
        task = asyncio.create_task(self._follow(worker))
        self._following.add(task)
        task.add_done_callback(self._following.discard)
        return worker

    async def _follow(self, worker: WorkerProcess) -> None:
        how = "said what cannot be understood"
        try:
            while (message := await worker.receive()) is not None:
                self._take(worker, message)
            how = ""
        finally:
            worker.kill()
            how = how or await asyncio.to_thread(worker.wait)
            worker.fail(f"{worker.name} {how}")
            self._gone(worker, how)


async def _all(futures: Iterable[asyncio.Future[Any]]) -> None:
    """All of them, or the first failure."""
    await asyncio.gather(*map(asyncio.shield, futures))
