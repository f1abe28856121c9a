"""What an executor does about workers that are lost; the workers are not there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest

from shoal.core.errors import DeviceError
from shoal.core.plan import InstancePlan, RankPlan, ReplicaPlan, StagePlan, default_routes
from shoal.core.split import Range, Split
from shoal.core.step import ExecutorEvent, InstancesReady, StepFailure
from shoal.executor import recovery
from shoal.executor.liveness import Liveness
from shoal.executor.recovery import Recovery
from shoal.wire.worker_messages import Beat

ONE_RANK = Split(heads=(Range(0, 4),), ffn=(Range(0, 32),), vocab=(Range(0, 8),))


def replica_of(num_instances: int) -> ReplicaPlan:
    """One stage."""
    instance = InstancePlan(layers=Range(0, 4), ranks=(RankPlan(),), split=ONE_RANK)
    stages = (StagePlan(instances=(instance,) * num_instances),)
    return ReplicaPlan(stages=stages, routes=default_routes(stages))


class Worker:
    def __init__(self, name: str, instance: int) -> None:
        self.name, self.instance = name, instance

    def send(self, message: object) -> None:
        """Nobody is there."""

    def kill(self) -> None:
        """As above."""

    def fail(self, reason: str) -> None:
        """Nobody waits for it."""


@dataclass
class Crew:
    """`start_takes_s` is asked before each start, and may raise."""

    replica: ReplicaPlan
    start_takes_s: Callable[[int], float] = lambda instance: 0.0
    workers: dict[str, Worker] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for instance in range(len(self.replica.instances)):
            self._add(instance)

    def of(self, instance: int) -> list[Worker]:
        return [each for each in self.workers.values() if each.instance == instance]

    async def start(self, instance: int, incarnation: int) -> list[Worker]:
        await asyncio.sleep(self.start_takes_s(instance))
        self._add(instance)
        return self.of(instance)

    async def ready(self, workers: Iterable[Worker]) -> None:
        """At once."""

    async def end(self, workers: Iterable[Worker]) -> None:
        for worker in workers:
            self.workers.pop(worker.name, None)

    def _add(self, instance: int) -> None:
        name = self.replica.worker_name(instance, 0)
        self.workers[name] = Worker(name, instance)


@dataclass
class Lab:
    """A recovery, and what it said."""

    crew: Crew
    loading_s: float = 0.0
    said: list[ExecutorEvent] = field(default_factory=list)
    given_up: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        crew: Any = self.crew
        self.recovery = Recovery(
            self.crew.replica,
            crew,
            post=self.said.append,
            began=lambda: None,
            give_up=self.given_up.append,
        )
        self.recovery.watch(self.loading_s)

    def lose(self, *instances: int) -> None:
        for instance in instances:
            worker: Any
            (worker,) = self.crew.of(instance)
            self.recovery.worker_gone(worker, "was ended by SIGKILL")

    async def until_ready(self, *instances: int) -> None:
        """All beat, and hear each other."""
        for _ in range(2000):
            now = asyncio.get_running_loop().time()
            for name in self.crew.workers:
                beat = Beat(incarnation=0, num_steps=0, busy_s=0.0, heard_s={})
                self.recovery.liveness.beat(name, beat, now)
                self.recovery.liveness.reset_done(name)
            if not self.recovery.down & set(instances) or self.given_up:
                return
            await asyncio.sleep(0.01)
        raise AssertionError(f"{self.recovery.down} are down still")


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "_WATCH_EVERY_S", 0.01)


def test_many_instances_that_are_lost_together_are_all_started_again() -> None:
    """As with a machine that eight of them were on."""

    async def run() -> Lab:
        lab = Lab(Crew(replica_of(9)))
        lab.lose(*range(8))
        await lab.until_ready(*range(8))
        lab.recovery.close()
        return lab

    lab = asyncio.run(run())
    assert not lab.given_up
    assert sum(isinstance(each, StepFailure) for each in lab.said) == 8
    ready = [each for each in lab.said if isinstance(each, InstancesReady)]
    assert {i for each in ready for i in each.instances} == set(range(8))


def test_one_that_is_lost_again_and_again_is_given_up() -> None:
    async def run() -> Lab:
        lab = Lab(Crew(replica_of(2)))
        for _ in range(6):
            assert not lab.given_up
            lab.lose(1)
            await lab.until_ready(1)
        lab.recovery.close()
        return lab

    (reason,) = asyncio.run(run()).given_up
    assert "instance 1 was lost again: it was started 5 times" in reason


def test_what_took_long_to_load_may_take_as_long_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "_START_LIMIT_S", 0.02)

    async def run(loading_s: float) -> Lab:
        starts: list[int] = []

        def takes_s(instance: int) -> float:
            starts.append(instance)
            return 0.1 if len(starts) < 3 else 0.0

        lab = Lab(Crew(replica_of(1), takes_s), loading_s)
        lab.lose(0)
        await lab.until_ready(0)
        lab.recovery.close()
        assert len(starts) == (1 if loading_s else 3)
        return lab

    for loading_s in (0.0, 1000.0):
        assert not asyncio.run(run(loading_s)).given_up


def test_pauses_between_tries_do_not_grow_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "_MAX_RESTARTS", 100)
    sleep, pauses = asyncio.sleep, list[float]()

    async def at_once(seconds: float) -> None:
        pauses.append(seconds)
        await sleep(0)

    async def run() -> Lab:
        tries: list[int] = []

        def fails(instance: int) -> float:
            tries.append(instance)
            if len(tries) <= 10:
                raise DeviceError("no such device")
            return 0.0

        lab = Lab(Crew(replica_of(1), fails))
        lab.lose(0)
        await lab.until_ready(0)
        lab.recovery.close()
        return lab

    monkeypatch.setattr(asyncio, "sleep", at_once)
    assert not asyncio.run(run()).given_up
    between = [each for each in pauses if each >= recovery._FIRST_PAUSE_S]
    assert between[:4] == pytest.approx([0.1, 0.4, 1.6, 6.4])
    assert between[4:10] == pytest.approx([25.6] + [30.0] * 5)


def test_what_follows_the_workers_does_not_end_unseen() -> None:
    async def run() -> Lab:
        lab = Lab(Crew(replica_of(1)))

        async def look() -> None:
            raise ValueError("a file that cannot be read")

        lab.recovery.follow(look())
        while not lab.given_up:
            await asyncio.sleep(0)
        lab.recovery.close()
        return lab

    (reason,) = asyncio.run(run()).given_up
    assert "a file that cannot be read" in reason


def test_who_is_slow_hears_what_helps() -> None:
    liveness = Liveness()
    liveness.begin("a", 0.0)
    liveness.beat("a", Beat(incarnation=0, num_steps=0, busy_s=61.0, heard_s={}), 0.0)
    assert "--max-num-batched-tokens" in liveness.lost(1.0)["a"]
