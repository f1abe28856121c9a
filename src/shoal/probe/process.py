"""A process that measures one device: started by a prober with one end of a socket pair.

    python -m shoal.probe.process FD

    control   questions in, answers out                     (its end is the process's end)
    mesh      messages to and from the others, which are timed
    main      one question at a time

Knows nothing of what the answers are for.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
from collections.abc import Iterator
from queue import SimpleQueue

import msgspec
import torch

from shoal.cluster.nvml import read_topology
from shoal.comm.store import PrefixStore
from shoal.core.errors import ShoalError
from shoal.core.measured import DeviceMeasure
from shoal.model.cache import models_folder
from shoal.probe.cpu import measure_cpu
from shoal.probe.cuda import measure_cuda
from shoal.probe.disk import read_rate
from shoal.probe.ways import message_points, sum_points
from shoal.wire.channel import Codec, ThreadChannel
from shoal.wire.mesh import Mesh
from shoal.wire.probe_messages import (
    Answer,
    Calibrate,
    Calibrated,
    DescribeMachine,
    DeviceMeasured,
    DiskMeasured,
    LaunchProbe,
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
from shoal.wire.worker_messages import Bound, Connect, FromWorker, Lab, StoreValue, ToWorker
from shoal.worker.calibrate import calibrate
from shoal.worker.groups import GroupPlace, Rendezvous, make_group
from shoal.worker.process import die_with_parent
from shoal.worker.speed import Speed

log = logging.getLogger(__name__)

_ROUND_TRIP_S = 10.0

Channel = ThreadChannel[ToWorker, FromWorker]


def main() -> None:
    """Answer the prober at the other end until it is gone."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    die_with_parent()
    codec: Codec[ToWorker, FromWorker] = Codec(ToWorker)
    channel: Channel = ThreadChannel(socket.socket(fileno=int(sys.argv[1])), codec)
    messages = channel.receive()
    first = next(messages, None)
    if not isinstance(first, LaunchProbe):
        sys.exit("the first message of a measuring process must be LaunchProbe")
    process = _Process(channel, first)
    threading.Thread(target=process.listen, args=(messages,), daemon=True).start()
    process.run()


class _Process:
    """Wires one device."""

    def __init__(self, channel: Channel, launch: LaunchProbe) -> None:
        self._channel = channel
        self._launch = launch
        self._device = torch.device(launch.device)
        self._speed = Speed(launch.speed)
        self._mesh = Mesh(launch.keys, launch.address)
        self._rendezvous = Rendezvous(channel.send)
        self._questions: SimpleQueue[Question] = SimpleQueue()

    def run(self) -> None:
        """Does not return."""
        self._channel.send(Bound(self._mesh.addresses, os.getpid()))
        while True:
            question = self._questions.get()
            try:
                answer = self._answer(question)
            except (ShoalError, OSError, RuntimeError, MemoryError) as error:
                answer = Unmeasured(" ".join(str(error).split())[:400] or type(error).__name__)
            self._channel.send(answer)

    def listen(self, messages: Iterator[ToWorker]) -> None:
        """Take what the prober says; its end, however it comes, is ours."""
        try:
            for message in messages:
                self._take(message)
        except (OSError, ShoalError):
            log.exception("the prober cannot be understood any more")
        finally:
            os._exit(0)

    def _take(self, message: ToWorker) -> None:
        if isinstance(message, Connect):
            for peer, addresses in message.addresses.items():
                if peer != self._launch.name:
                    self._mesh.connect(peer, addresses[0])
        elif isinstance(message, Lab):
            self._speed.set(message.speed)
            for peer, link in message.links.items():
                self._mesh.set_link(peer, link.bandwidth_bytes_per_s, link.latency_s, link.cut)
        elif isinstance(message, StoreValue):
            self._rendezvous.take(message.key, message.value)
        elif isinstance(message, Question):
            self._questions.put(message)
        else:
            log.error("%s is no question, and ignored", type(message).__name__)

    def _answer(self, question: Question) -> Answer:
        match question:
            case MeasureDevice(seconds):
                return DeviceMeasured(self._measure(seconds))
            case MeasureWay(peer):
                points = message_points(
                    lambda size: self._mesh.round_trip(peer, size, _ROUND_TRIP_S)
                )
                return WayMeasured(points)
            case MeasureSums():
                return self._sums(question)
            case MeasureDisk():
                return DiskMeasured(read_rate(models_folder()))
            case DescribeMachine():
                return MachineDescribed(msgspec.json.encode(read_topology()))
            case Calibrate(spec, options, budget_s):
                found = calibrate(spec, options, speed=self._launch.speed, budget_s=budget_s)
                return Calibrated(found.spec, options, found.taken)

    def _measure(self, seconds: float) -> DeviceMeasure:
        if self._device.type == "cpu":
            return measure_cpu(self._launch.num_threads, self._speed, seconds)
        return measure_cuda(self._device, self._speed, seconds)

    def _sums(self, question: MeasureSums) -> Answer:
        place = GroupPlace(
            kind=question.kind,
            rank=question.rank,
            size=question.size,
            streams=tuple(range(question.size)),
            fd=None,
            address=self._launch.address,
            device=self._launch.device,
        )
        group = make_group(place, PrefixStore(f"{question.number}", self._rendezvous.store))
        if group is None:
            return Unmeasured("a sum needs two ranks")
        try:
            return SumsMeasured(sum_points(group, self._device))
        finally:
            group.close()


if __name__ == "__main__":
    main()
