"""A worker process: started by an executor with one end of a socket pair, ends with it.

    python -m shoal.worker.process FD

    control   Steps in, results and signs of life out       (its end is the worker's end)
    mesh      activations and tokens, to and from other workers
    main      loads, warms up, then runs Steps

Knows nothing of requests.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from shoal.comm.interfaces import interface_of, measure
from shoal.core.errors import ShoalError, WireError
from shoal.model.spec import read_spec
from shoal.wire.channel import Codec, ThreadChannel
from shoal.wire.loading import LoadingReport
from shoal.wire.mesh import Mesh
from shoal.wire.messages import LaunchFailed
from shoal.wire.worker_messages import (
    Beat,
    Bound,
    Connect,
    FromWorker,
    Lab,
    LaunchWorker,
    LinkFacts,
    Release,
    Reset,
    Run,
    StoreValue,
    ToWorker,
    Warm,
)
from shoal.worker.groups import GroupPlace, Rendezvous, make_group
from shoal.worker.launch import load_worker, warm_up
from shoal.worker.mesh_transport import MeshTransport
from shoal.worker.place import Place
from shoal.worker.speed import Speed
from shoal.worker.stage import StageRunner

log = logging.getLogger(__name__)

Channel = ThreadChannel[ToWorker, FromWorker]

_BEAT_EVERY_S = 0.25
_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Serve the executor at the other end until it is gone."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    _die_with_parent()
    codec: Codec[ToWorker, FromWorker] = Codec(ToWorker)
    channel: Channel = ThreadChannel(socket.socket(fileno=int(sys.argv[1])), codec)
    messages = channel.receive()
    first = next(messages, None)
    if not isinstance(first, LaunchWorker):
        sys.exit("the first message of a worker process must be LaunchWorker")
    process = _WorkerProcess(channel, first)
    threading.Thread(target=process.listen, args=(messages,), daemon=True).start()
    try:
        process.run()
    except ShoalError as error:
        channel.send(LaunchFailed(str(error)))
        channel.close()
    except BaseException:
        log.exception("%s cannot go on", first.name)
    # Threads may be in the middle of what nobody waits for.
    os._exit(1)


class _WorkerProcess:
    """Wires one worker."""

    def __init__(self, channel: Channel, launch: LaunchWorker) -> None:
        self._channel = channel
        self._launch = launch
        self._place = Place(launch.replica, launch.instance, launch.rank)
        self._mesh = Mesh(launch.keys, launch.address)
        self._addresses: dict[str, str] = {}
        self._connected = threading.Event()
        self._rendezvous = Rendezvous(channel.send)
        self._speed = Speed(launch.speed)
        # What comes before the runner is there; under the lock, as the runner then takes over.
        self._lock = threading.Lock()
        self._runner: StageRunner | None = None
        self._incarnation = launch.incarnation

    def run(self) -> None:
        """Load, and run Steps until the process ends.

        Raises:
            DeviceError, ModelError, ConfigError: what the user can mend.
        """
        launch, place = self._launch, self._place
        self._channel.send(Bound(self._mesh.address, os.getpid()))
        options = launch.options
        spec = read_spec(Path(options.model_path))
        group = make_group(
            GroupPlace(
                kind=launch.group,
                rank=launch.rank,
                size=place.shard.num_ranks,
                fd=launch.group_fd,
                address=launch.address,
                device=options.device,
            ),
            self._rendezvous,
        )
        loaded = load_worker(
            options,
            spec,
            shard=place.shard,
            group=group,
            routes=place.routes,
            say=lambda line: None,
            progress=LoadingReport(self._channel.send),
        )
        self._channel.send(loaded.facts)
        self._connected.wait()
        if place.hops:
            route, hop = next(iter(place.hops.items()))
            warm_up(loaded.worker, route=route, num_hops=len(place.routes[route]), hop=hop)
        self._speed.govern(group)
        transport = MeshTransport(self._mesh, spec.hidden_size)
        with self._lock:
            runner = self._runner = StageRunner(
                loaded.worker,
                place,
                transport,
                self._channel.send,
                group=group,
                stretch=self._speed,
                incarnation=self._incarnation,
            )
        threading.Thread(target=transport.pump, args=(runner.post,), daemon=True).start()
        self._channel.send(Warm(self._links() if self._launch.incarnation == 0 else []))
        threading.Thread(target=self._beat, args=(runner,), daemon=True).start()
        runner.run()

    def listen(self, messages: Iterator[ToWorker]) -> None:
        """Take what the executor says; its end, however it comes, is ours."""
        try:
            for message in messages:
                self._take(message)
        except (OSError, ShoalError):
            log.exception("the executor cannot be understood any more")
        finally:
            os._exit(0)

    def _take(self, message: ToWorker) -> None:
        runner = self._runner
        match message:
            case Run(step):
                if runner is not None:
                    runner.post(step)
            case Release():
                if runner is not None:
                    runner.post(message)
            case Reset(incarnation):
                self._reset(incarnation)
            case Connect(addresses):
                self._connect(addresses)
            case Lab():
                self._speed.set(message.speed)
                for peer, link in message.links.items():
                    self._mesh.set_link(peer, link.bandwidth_bytes_per_s, link.latency_s, link.cut)
            case StoreValue(key, value):
                self._rendezvous.take(key, value)
            case LaunchWorker():
                log.error("a second LaunchWorker is ignored")

    def _reset(self, incarnation: int) -> None:
        with self._lock:
            self._incarnation = incarnation
            if self._runner is not None:
                self._runner.reset(incarnation)

    def _connect(self, addresses: dict[str, str]) -> None:
        """Also to peers that only listen to us: they are told that we are alive."""
        for peer in self._place.sends_to | self._place.hears:
            address = addresses.get(peer)
            if address is not None and address != self._addresses.get(peer):
                self._mesh.connect(peer, address)
                self._addresses[peer] = address
        self._connected.set()

    def _links(self) -> list[LinkFacts]:
        """What the links to other workers give; those that do not answer in time are left out."""
        found = []
        interface = interface_of(self._launch.address)
        for peer in sorted(self._place.sends_to - {self._launch.name}):
            try:
                link = measure(interface, partial(self._mesh.round_trip, peer))
            except WireError as error:
                log.warning("the link to %s was not measured: %s", peer, error)
                continue
            found.append(
                LinkFacts(peer, link.interface, link.latency_s, link.bandwidth_bytes_per_s)
            )
        return found

    def _beat(self, runner: StageRunner) -> None:
        while True:
            incarnation, num_steps, busy_s = runner.progress()
            heard_s = {peer: self._mesh.heard(peer) for peer in self._place.hears}
            self._channel.send(
                Beat(incarnation=incarnation, num_steps=num_steps, busy_s=busy_s, heard_s=heard_s)
            )
            time.sleep(_BEAT_EVERY_S)


def _die_with_parent() -> None:
    """Linux ends this process with the one that started it, though it be stopped."""
    parent = os.getppid()
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit("whoever started this worker is gone")


if __name__ == "__main__":
    main()
