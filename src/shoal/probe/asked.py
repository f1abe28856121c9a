"""Processes that measure, as the prober follows them: started, connected, asked.

Knows nothing of what is asked.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from shoal.core.errors import DeviceError
from shoal.core.plan import RankPlan
from shoal.executor.launcher import Launcher, Running, Spot, WorkerCodec
from shoal.executor.rank_store import RankStore
from shoal.wire.curve import MeshKeys, make_keys
from shoal.wire.messages import LaunchFailed
from shoal.wire.probe_messages import Answer, LaunchProbe, Question
from shoal.wire.worker_messages import (
    Bound,
    Connect,
    FromWorker,
    StoreGet,
    StoreSet,
    ToWorker,
)

_START_LIMIT_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """A device to be measured.

    Attributes:
        name: its own: "a.0", "a.cpu".
        device: on its host: "cpu", "cuda:0".
        machine: what shares cores, memory and disk; hosts of a lab are one.
        place: as a launcher wants it; `rank.host` None: here.
    """

    name: str
    host: str
    device: str
    machine: str
    num_threads: int
    speed: float = 1.0
    place: str | None = None

    @property
    def rank(self) -> RankPlan:
        return RankPlan(device=self.device, host=self.place)


class Asked:
    """One process."""

    def __init__(self, site: Site, store: RankStore) -> None:
        loop = asyncio.get_running_loop()
        self.site = site
        self.bound: asyncio.Future[tuple[str, ...]] = loop.create_future()
        self._store = store
        self._codec: WorkerCodec = WorkerCodec(FromWorker)
        self._running: Running | None = None
        self._answers: asyncio.Queue[Answer | None] = asyncio.Queue()
        self._following: asyncio.Task[None] | None = None

    async def start(self, spot: Spot, keys: MeshKeys) -> None:
        launch = LaunchProbe(
            name=self.site.name,
            device=self.site.device,
            num_threads=spot.num_cpus or self.site.num_threads,
            speed=self.site.speed,
            address=spot.address,
            keys=keys,
        )
        self._running = await spot.start(launch, self._codec)
        self._following = asyncio.create_task(self._follow(self._running))

    def send(self, message: ToWorker) -> None:
        if self._running is not None:
            self._running.send_frame(self._codec.encode(message))

    async def ask(self, question: Question, limit_s: float) -> Answer:
        """
        Raises:
            DeviceError: no answer came; the process is ended then.
        """
        self.send(question)
        try:
            answer = await asyncio.wait_for(self._answers.get(), limit_s)
        except TimeoutError:
            self.kill()
            raise DeviceError(f"no answer came within {limit_s:g} s") from None
        if answer is None:
            self._answers.put_nowait(None)  # for whoever asks next
            raise DeviceError("its process has ended; its own words stand above")
        return answer

    def kill(self) -> None:
        if self._running is not None:
            self._running.kill(self._running.pid)

    async def ended(self) -> None:
        """Wait until nothing more will come of it."""
        if self._following is not None:
            await self._following

    async def _follow(self, running: Running) -> None:
        while (message := await running.receive()) is not None:
            if isinstance(message, Bound):
                self.bound.set_result(message.addresses)
            elif isinstance(message, StoreSet):
                self._store.set(message)
            elif isinstance(message, StoreGet):
                self._store.get(self.send, message)
            elif isinstance(message, Answer):
                self._answers.put_nowait(message)
            elif isinstance(message, LaunchFailed):
                break
        running.kill(running.pid)
        await asyncio.to_thread(running.wait)
        if not self.bound.done():
            self.bound.set_exception(DeviceError(f"{self.site.name} could not be measured"))
            self.bound.exception()  # it may be that nobody waits
        self._answers.put_nowait(None)


async def start_all(launcher: Launcher, sites: Sequence[Site]) -> dict[str, Asked]:
    """Every process, by name, connected to every other.

    Raises:
        ShoalError: one of them did not start; the others are ended.
    """
    keys, store = make_keys(site.name for site in sites), RankStore()
    asked = {site.name: Asked(site, store) for site in sites}
    try:
        for number, each in enumerate(asked.values()):
            (spot,) = await launcher.place(number, [each.site.rank])
            await each.start(spot, keys[each.site.name])
        async with asyncio.timeout(_START_LIMIT_S):
            addresses = {name: await each.bound for name, each in asked.items()}
    except TimeoutError:
        await end_all(asked.values())
        raise DeviceError(f"a process did not start within {_START_LIMIT_S:g} s") from None
    except BaseException:
        await end_all(asked.values())
        raise
    for each in asked.values():
        each.send(Connect(addresses))
    return asked


async def end_all(asked: Iterable[Asked]) -> None:
    """Kill and reap them."""
    asked = list(asked)
    for each in asked:
        each.kill()
    await asyncio.gather(*(each.ended() for each in asked), return_exceptions=True)
