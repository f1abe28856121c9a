"""A worker process: started by an executor with one end of a socket pair, ends with it.

    python -m shoal.worker.process FD

    control   Steps in, results and signs of life out       (its end is the worker's end)
    mesh      activations and tokens, to and from other workers
    main      loads, warms up, then runs Steps

Knows nothing of requests.
"""

from __future__ import annotations

import ctypes
import itertools
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

from shoal.comm import Group
from shoal.comm.compressed import SumForm
from shoal.core.errors import ShoalError
from shoal.core.split import Range
from shoal.model.spec import read_spec
from shoal.wire.channel import Codec, ThreadChannel
from shoal.wire.loading import LoadingReport
from shoal.wire.mesh import Mesh
from shoal.wire.messages import LaunchFailed
from shoal.wire.worker_messages import (
    Beat,
    Bound,
    Connect,
    Deal,
    DropPull,
    EndLease,
    Forms,
    FromWorker,
    HoldBlocks,
    Lab,
    LaunchWorker,
    LendBlocks,
    Link,
    PaceFacts,
    PullBlocks,
    Pulled,
    Release,
    Reset,
    Run,
    StopPull,
    StoreValue,
    ToWorker,
    Warm,
)
from shoal.worker.dealing import Dealings, Meter
from shoal.worker.groups import GroupPlace, Rendezvous, make_group
from shoal.worker.launch import load_worker, warm_up
from shoal.worker.links import Links, open_mesh
from shoal.worker.mesh_transport import MeshTransport
from shoal.worker.pace import measure_pace
from shoal.worker.place import Place
from shoal.worker.runner import Worker
from shoal.worker.speed import Speed
from shoal.worker.stage import Chore, StageRunner
from shoal.worker.transfer import KVPort
from shoal.worker.turns import take_short_turns

log = logging.getLogger(__name__)

Channel = ThreadChannel[ToWorker, FromWorker]

_BEAT_EVERY_S = 0.25
_BEATS_A_LOAD = 4
_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Serve the executor at the other end until it is gone."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    die_with_parent()
    take_short_turns()
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
        self._mesh = open_mesh(launch.keys, launch.address)
        self._links = Links(self._mesh, self._place.sends_to | self._place.hears)
        self._kv_mesh = Mesh(launch.kv_keys, launch.address) if launch.kv_keys else None
        self._connected = threading.Event()
        self._held: Range | None = None
        self._rendezvous = Rendezvous(channel.send)
        self._speed = Speed(launch.speed)
        # What comes before the runner is there; under the lock, as the runner then takes over.
        self._lock = threading.Lock()
        self._runner: StageRunner | None = None
        self._transport: MeshTransport | None = None
        self._sums = SumForm()
        self._kv_port: KVPort | None = None
        self._dealings: Dealings | None = None
        self._incarnation = launch.incarnation

    def run(self) -> None:
        """Load, and run Steps until the process ends.

        Raises:
            DeviceError, ModelError, ConfigError: what the user can mend.
        """
        launch, place = self._launch, self._place
        kv_address = self._kv_mesh.address if self._kv_mesh else ""
        self._channel.send(Bound(self._mesh.addresses, os.getpid(), kv_address))
        options = launch.options
        spec = read_spec(Path(options.model_path))
        group = make_group(
            GroupPlace(
                kind=launch.group,
                rank=launch.rank,
                size=place.shard.num_ranks,
                streams=launch.replica.instances[launch.instance].split.streams,
                fd=launch.group_fd,
                address=launch.address,
                device=options.device,
                # Split by tokens, KV and what merges attention are sums too, and must stay exact.
                sums=SumForm() if place.shard.has_token_ranges else self._sums,
                hidden_size=spec.hidden_size,
            ),
            self._rendezvous.store,
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
        if self._held is not None:
            loaded.worker.hold(self._held)
        if place.hops:
            route, hop = next(iter(place.hops.items()))
            warm_up(loaded.worker, route=route, num_hops=len(place.routes[route]), hop=hop)
        pace = self._pace(loaded.worker, spec.hidden_size, group)
        self._speed.govern(group)
        if loaded.facts.expert_bytes and options.expert_redeal:
            decoder = loaded.decoder
            self._dealings = Dealings(
                launch.rank, decoder.load_experts, decoder.deal, self._channel.send
            )
        transport = MeshTransport(self._mesh, spec.hidden_size)
        with self._lock:
            self._transport = transport
            runner = self._runner = StageRunner(
                loaded.worker,
                place,
                transport,
                self._channel.send,
                group=group,
                stretch=self._speed,
                dealings=self._dealings,
                incarnation=self._incarnation,
            )
        if self._kv_mesh is not None:
            self._kv_port = KVPort(
                loaded.worker.kv,
                place.shard.layers,
                place.shard.kv_heads(spec),
                self._kv_mesh,
                heads_first=loaded.worker.kv_heads_first,
                post=lambda do: runner.post(Chore(do)),
                report=lambda pull_id, count: self._channel.send(Pulled(pull_id, count)),
            )
            self._kv_port.start()
        transport.run(runner.post)
        is_first = self._launch.incarnation == 0
        links = self._links.measure(place.sends_to - {launch.name}) if is_first else []
        self._channel.send(Warm(links, pace) if is_first else Warm())
        meter = None
        if self._dealings is not None:
            counts = loaded.decoder.expert_counts if launch.rank == 0 else None
            meter = Meter(runner.clock, counts)
        threading.Thread(target=self._beat, args=(runner, meter), daemon=True).start()
        runner.run()

    def listen(self, messages: Iterator[ToWorker]) -> None:
        """Take what the executor says; its end, however it comes, is ours."""
        try:
            for message in messages:
                self._take(message)
        except Exception:
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
            case LendBlocks():
                if self._kv_port is not None:
                    self._kv_port.lend(message)
            case EndLease() | PullBlocks() | StopPull() | DropPull():
                if runner is not None and self._kv_port is not None:
                    runner.post(Chore(partial(self._kv_port.take, message)))
            case Deal():
                if self._dealings is not None:
                    self._dealings.take(message)
            case Reset(incarnation):
                self._reset(incarnation)
            case Forms(links, sums):
                self._sums.steps = sums
                if self._transport is not None:
                    self._transport.set_forms(links)
            case HoldBlocks(blocks):
                self._held = blocks
            case Connect(addresses):
                self._links.connect(addresses)
                self._connected.set()
            case Lab():
                self._speed.set(message.speed)
                for peer, link in message.links.items():
                    self._slow(peer, link)
            case StoreValue(key, value):
                self._rendezvous.take(key, value)
            case LaunchWorker():
                log.error("a second LaunchWorker is ignored")

    def _slow(self, peer: str, link: Link) -> None:
        """Also the way that KV takes, each way for itself."""
        pace = link.bandwidth_bytes_per_s, link.latency_s, link.cut
        self._mesh.set_link(peer, *pace)
        if self._kv_mesh is not None:
            replica, _, _ = self._kv_mesh.name.rpartition("/")
            self._kv_mesh.set_link(f"{replica}/{peer}", *pace)

    def _reset(self, incarnation: int) -> None:
        with self._lock:
            self._incarnation = incarnation
            if self._runner is not None:
                self._runner.reset(incarnation)

    def _pace(self, worker: Worker, hidden_size: int, group: Group | None) -> PaceFacts | None:
        """What forms are chosen by; ranks of an instance measure together, or none does."""
        place, kind = self._place, self._launch.group
        has_network = kind in ("gloo", "nccl")
        goes_on = any(hop + 1 < len(place.routes[route]) for route, hop in place.hops.items())
        if self._launch.incarnation or not place.hops or not (has_network or goes_on):
            return None
        route, hop = next(iter(place.hops.items()))
        return measure_pace(
            worker,
            hidden_size,
            group if has_network and worker.has_stream else None,
            route=route,
            num_hops=len(place.routes[route]),
            hop=hop,
        )

    def _beat(self, runner: StageRunner, meter: Meter | None) -> None:
        for number in itertools.count():
            incarnation, num_steps, busy_s = runner.progress()
            heard_s = {peer: self._mesh.heard(peer) for peer in self._place.hears}
            self._channel.send(
                Beat(
                    incarnation=incarnation,
                    num_steps=num_steps,
                    busy_s=busy_s,
                    heard_s=heard_s,
                    taken=runner.steps.take() if self._place.rank == 0 else (),
                )
            )
            if meter is not None and number % _BEATS_A_LOAD == 0:
                load = meter.look()
                if load is not None:
                    self._channel.send(load)
            time.sleep(_BEAT_EVERY_S)


def die_with_parent() -> None:
    """Linux ends this process with the one that started it, though it be stopped."""
    parent = os.getppid()
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit("whoever started this worker is gone")


if __name__ == "__main__":
    main()
