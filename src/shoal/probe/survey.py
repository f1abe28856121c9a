"""Asks processes on every device, in an order that keeps them out of each other's way.

    1  each device alone; devices of one machine one after another
    2  those of one machine at once, if there are several: what holds while all run
    3  disks, what each machine says of itself
    4  messages from host to host, then sums among them: one pair or group at a time
    5  if it is wanted, Steps of a model's shape: devices of a machine at once again

What cannot be measured is left out, with the reason. Knows nothing of what becomes of it.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import msgspec

from shoal.cluster.topology import Gpu, GpuPair, Topology
from shoal.core.cluster import Points
from shoal.core.errors import ShoalError
from shoal.core.measured import DeviceMeasure
from shoal.executor.launcher import Launcher
from shoal.probe.asked import Asked, Site, end_all, start_all
from shoal.wire.probe_messages import (
    Answer,
    Calibrate,
    Calibrated,
    DescribeMachine,
    DeviceMeasured,
    DiskMeasured,
    MachineDescribed,
    MeasureDevice,
    MeasureDisk,
    MeasureSums,
    MeasureWay,
    Question,
    SumsMeasured,
    Unmeasured,
    WayMeasured,
)
from shoal.wire.worker_messages import Lab, Link

DEVICE_S = 3.0
_FEW_HOSTS = 4
"""Among so many every pair and group is measured; among more, neighbours and the first of them."""

_LIMIT_S, _STEPS_LIMIT_S = 120.0, 600.0
"""Only of a machine that is busy with other things so much is ever needed."""

Progress = Callable[[str, int, int], None]
"""(what is measured now, steps done, steps in all)"""


@dataclass(frozen=True, slots=True)
class Sums:
    """All-reduces among devices, by name."""

    devices: tuple[str, ...]
    kind: str
    points: Points


@dataclass(slots=True, kw_only=True)
class Survey:
    """What was found; devices by name, machines and disks by host.

    Attributes:
        alone, together: of each device; the latter where its machine has several.
        ways: messages between two devices.
        calibrated: Steps that ran there.
        problems: what was not measured, for people.
    """

    sites: tuple[Site, ...]
    alone: dict[str, DeviceMeasure] = field(default_factory=dict)
    together: dict[str, DeviceMeasure] = field(default_factory=dict)
    ways: dict[tuple[str, str], Points] = field(default_factory=dict)
    sums: list[Sums] = field(default_factory=list)
    disks: dict[str, float] = field(default_factory=dict)
    topologies: dict[str, Topology] = field(default_factory=dict)
    calibrated: dict[str, list[Calibrated]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def gpu(self, name: str) -> Gpu | None:
        """What the driver says of a device; CUDA may count others, and otherwise, than it does."""
        site = next(each for each in self.sites if each.name == name)
        uuid, topology = self.alone[name].uuid, self.topologies.get(site.host)
        if not uuid or topology is None:
            return None
        return next((each for each in topology.gpus if each.uuid.endswith(uuid)), None)

    def pair(self, a: str, b: str) -> GpuPair | None:
        """What the driver says of two GPUs of a host."""
        one, other = self.gpu(a), self.gpu(b)
        host = next(each.host for each in self.sites if each.name == a)
        if one is None or other is None:
            return None
        return self.topologies[host].pair(one.index, other.index)


def survey(
    launcher: Launcher,
    sites: Sequence[Site],
    links: Mapping[tuple[str, str], Link],
    progress: Progress,
    *,
    device_s: float = DEVICE_S,
    calibrations: Sequence[Calibrate] = (),
) -> Survey:
    """Measure it all.

    Args:
        links: of a lab, between hosts: what sockets make of them.
        device_s: for one device, about.
        calibrations: Steps of a model's shape, in each precision that a device has kernels for.

    Raises:
        ShoalError: a process cannot be started anywhere.
    """
    surveyor = _Surveyor(launcher, sites, links, progress, device_s, calibrations)
    return asyncio.run(surveyor.run())


class _Surveyor:
    def __init__(
        self,
        launcher: Launcher,
        sites: Sequence[Site],
        links: Mapping[tuple[str, str], Link],
        progress: Progress,
        device_s: float,
        calibrations: Sequence[Calibrate],
    ) -> None:
        self._launcher, self._links, self._device_s = launcher, links, device_s
        self._calibrations = calibrations
        self._say = progress
        self._found = Survey(sites=tuple(sites))
        self._asked: dict[str, Asked] = {}
        self._num_done = 0
        self._num_steps = 1

    async def run(self) -> Survey:
        try:
            self._step("starting")
            self._asked = await start_all(self._launcher, self._found.sites)
            self._set_links()
            pairs = self._pairs()
            groups = self._groups()
            machines = self._machines()
            self._num_steps = 2 + len(self._asked) + len(machines) + len(pairs) + len(groups)
            self._num_steps += len(self._calibrations) * len(machines)
            await asyncio.gather(*(self._alone(each) for each in machines))
            for each in machines:
                await self._at_once(each)
            await self._describe()
            for a, b in pairs:
                await self._way(a, b)
            for number, group in enumerate(groups):
                await self._sums(number, *group)
            for wanted in self._calibrations:
                for names in machines:
                    await self._calibrate(wanted, names)
            self._step("done")
            return self._found
        finally:
            await end_all(self._asked.values())
            await asyncio.to_thread(self._launcher.close)

    def _set_links(self) -> None:
        for name, asked in self._asked.items():
            links = {
                peer: link
                for peer, other in self._asked.items()
                if (link := self._link(asked.site.host, other.site.host)) and peer != name
            }
            asked.send(Lab(asked.site.speed, links))

    def _link(self, a: str, b: str) -> Link | None:
        return self._links.get((a, b)) or self._links.get((b, a))

    def _machines(self) -> list[list[str]]:
        found: dict[str, list[str]] = {}
        for name, asked in self._asked.items():
            found.setdefault(asked.site.machine, []).append(name)
        return list(found.values())

    def _firsts(self) -> list[str]:
        """The first device of each host."""
        found: dict[str, str] = {}
        for name, asked in self._asked.items():
            found.setdefault(asked.site.host, name)
        return list(found.values())

    def _pairs(self) -> list[tuple[str, str]]:
        """Of hosts, and of devices within a host that are not all GPUs."""
        firsts = self._firsts()
        every = list(itertools.combinations(firsts, 2))
        if len(firsts) > _FEW_HOSTS:
            every = [*itertools.pairwise(firsts), *((firsts[0], each) for each in firsts[2:])]
        inside = [
            (a, b)
            for a, b in itertools.combinations(self._asked, 2)
            if self._asked[a].site.host == self._asked[b].site.host
            and self._asked[b].site.device == "cpu"
        ]
        return every + inside

    def _groups(self) -> list[tuple[str, tuple[str, ...]]]:
        """Of hosts, a device of each; and of the GPUs of a host."""
        firsts = self._firsts()
        few = len(firsts) <= _FEW_HOSTS
        groups: list[tuple[str, ...]] = []
        for size in range(2, len(firsts) + 1):
            if few:
                groups += itertools.combinations(firsts, size)
            elif size & (size - 1) == 0:
                groups.append(tuple(firsts[:size]))
        for host in dict.fromkeys(each.site.host for each in self._asked.values()):
            gpus = [
                name
                for name, each in self._asked.items()
                if each.site.host == host and each.site.device != "cpu"
            ]
            groups += [tuple(gpus[:size]) for size in (2, 4, 8, 16) if size <= len(gpus)]
        return [(self._kind(each), each) for each in groups]

    def _kind(self, names: Sequence[str]) -> str:
        is_cuda = [self._asked[name].site.device != "cpu" for name in names]
        return "nccl" if all(is_cuda) else "gloo"

    async def _alone(self, names: Sequence[str]) -> None:
        for name in names:
            self._step(f"{name} alone")
            answer = await self._ask(name, MeasureDevice(self._device_s))
            if isinstance(answer, DeviceMeasured):
                self._found.alone[name] = answer.measure

    async def _at_once(self, names: Sequence[str]) -> None:
        self._step("devices at once")
        able = [name for name in names if name in self._found.alone]
        if len(able) < 2:
            return
        question = MeasureDevice(self._device_s)
        answers = await asyncio.gather(*(self._ask(name, question) for name in able))
        for name, answer in zip(able, answers, strict=True):
            if isinstance(answer, DeviceMeasured):
                self._found.together[name] = answer.measure

    async def _describe(self) -> None:
        for name in self._firsts():
            host = self._asked[name].site.host
            answer = await self._ask(name, DescribeMachine())
            if isinstance(answer, MachineDescribed):
                self._found.topologies[host] = msgspec.json.decode(answer.topology, type=Topology)
            answer = await self._ask(name, MeasureDisk())
            if isinstance(answer, DiskMeasured):
                self._found.disks[host] = answer.bytes_per_s

    async def _way(self, a: str, b: str) -> None:
        self._step(f"{a} to {b}")
        answer = await self._ask(a, MeasureWay(b))
        if isinstance(answer, WayMeasured):
            self._found.ways[a, b] = answer.points

    async def _sums(self, number: int, kind: str, names: tuple[str, ...]) -> None:
        self._step(f"sums of {', '.join(names)}")
        answers = await asyncio.gather(
            *(
                self._ask(name, MeasureSums(number, kind, rank, len(names)))
                for rank, name in enumerate(names)
            )
        )
        first = answers[0]
        if all(isinstance(each, SumsMeasured) for each in answers):
            assert isinstance(first, SumsMeasured)
            self._found.sums.append(Sums(names, kind, first.points))

    async def _calibrate(self, wanted: Calibrate, names: Sequence[str]) -> None:
        """Devices of a machine at once, as they will serve."""
        able = [name for name in names if name in self._found.alone]
        options = wanted.options
        self._step(f"steps of {options.dtype if options.quantize == 'none' else options.quantize}")
        questions = [self._fitted(wanted, name) for name in able]
        answers = await asyncio.gather(*map(self._ask, able, questions))
        for name, answer in zip(able, answers, strict=True):
            if isinstance(answer, Calibrated):
                self._found.calibrated.setdefault(name, []).append(answer)

    def _fitted(self, wanted: Calibrate, name: str) -> Calibrate:
        site = self._asked[name].site
        num_threads = site.num_threads if site.device == "cpu" else None
        options = replace(wanted.options, device=site.device, num_threads=num_threads)
        return msgspec.structs.replace(wanted, options=options)

    async def _ask(self, name: str, question: Question) -> Answer | None:
        """None: it was not answered, or not measured; that is noted."""
        try:
            limit_s = _STEPS_LIMIT_S if isinstance(question, Calibrate) else _LIMIT_S
            answer = await self._asked[name].ask(question, limit_s)
        except ShoalError as error:
            self._found.problems.append(f"{name}: {error}")
            return None
        if isinstance(answer, Unmeasured):
            what = type(question).__name__.removeprefix("Measure").lower()
            self._found.problems.append(f"{name}: {what} not measured: {answer.reason}")
            return None
        return answer

    def _step(self, what: str) -> None:
        self._say(what, self._num_done, self._num_steps)
        self._num_done += 1
