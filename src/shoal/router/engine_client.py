"""A replica that is our own engine, in a process this router started.

The process gets one end of a socket pair. Its death is our end of file; our death is its.
A process that dies after it was ready is started again, under the next incarnation; one that
could not load is not. Knows nothing of what a request means.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import subprocess
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from shoal.core.errors import WireError
from shoal.core.kv import KVOffer
from shoal.core.options import EngineOptions
from shoal.core.plan import ReplicaPlan
from shoal.core.request import GenerateRequest
from shoal.core.stats import EngineStats
from shoal.core.step_times import MAX_STEPS_KEPT, InstanceStep
from shoal.router.driver import Router
from shoal.router.events import (
    KVLent,
    KVPulled,
    ReplicaLost,
    ReplicaOutputs,
    ReplicaReady,
    ReplicaStuck,
)
from shoal.router.watchdog import Watchdog, WatchdogLimits
from shoal.wire.channel import AsyncChannel, Codec
from shoal.wire.kv_messages import KVKeys
from shoal.wire.messages import (
    Cancel,
    DrainInstance,
    EndLease,
    FromEngine,
    HostNet,
    Launch,
    LaunchFailed,
    LendKV,
    LendPrefix,
    Lent,
    Loading,
    News,
    Pulled,
    Ready,
    ReceiveKV,
    StepsTook,
    Submit,
    ToEngine,
)

log = logging.getLogger(__name__)

_STOP_GRACE_S = 3.0
_WATCH_EVERY_S = 0.5
_SECRETS = ("SHOAL_API_KEY", "HF_TOKEN")
_RESTART_PAUSE_S = 1.0
_MAX_RESTARTS_UNREADY = 3


class EngineClient:
    """One engine process and the channel to it.

    Args:
        name: of the replica.
        command: argv of the engine process; the socket's descriptor is appended.
        options: what it shall load.
        on_loading: told how far loading is.
        limits: how long it may be quiet once it is ready; then it is ended, and started again.
        replica: what it shall run on; None: on the one device that the options name.
        hosts: of a lab, that the replica's ranks name.
        kv_keys: of its workers, to exchange KV with those of other replicas.
        record: a folder for a recording of what it decides.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        options: EngineOptions,
        on_loading: Callable[[Loading], None],
        limits: WatchdogLimits | None = None,
        replica: ReplicaPlan | None = None,
        hosts: Mapping[str, HostNet] | None = None,
        kv_keys: KVKeys | None = None,
        record: str | None = None,
    ) -> None:
        self.name = name
        self.stats = EngineStats()
        self.steps_taken: deque[InstanceStep] = deque(maxlen=MAX_STEPS_KEPT)
        self.failure: str | None = None
        self._command = command
        self._options = options
        self._on_loading = on_loading
        self._limits = limits or WatchdogLimits()
        recording = None if record is None else (record, name)
        self._launch = Launch(options, replica, dict(hosts or {}), kv_keys, recording)
        self._complaint: str | None = None
        self._drained: set[int] = set()  # instances; its successors must be told
        self._incarnation = 0
        self._channel: AsyncChannel[FromEngine, ToEngine] | None = None
        self._process, self._socket = self._start()

    @property
    def plan(self) -> ReplicaPlan | None:
        """What it runs on; None: one device, of the options."""
        return self._launch.replica

    def send(self, request: GenerateRequest) -> None:
        if self._channel is not None:
            self._channel.send(Submit(request))

    def cancel(self, request_id: str) -> None:
        if self._channel is not None:
            self._channel.send(Cancel(request_id))

    def lend(self, lease_id: int, request_id: str, ttl_s: float, *, ahead: bool) -> None:
        if self._channel is not None:
            self._channel.send(LendKV(lease_id, request_id, ttl_s, ahead))

    def lend_prefix(self, lease_id: int, names: tuple[bytes, ...], ttl_s: float) -> None:
        if self._channel is not None:
            self._channel.send(LendPrefix(lease_id, names, ttl_s))

    def end_lease(self, lease_id: int) -> None:
        if self._channel is not None:
            self._channel.send(EndLease(lease_id))

    def receive(self, offer: KVOffer, ttl_s: float) -> None:
        if self._channel is not None:
            self._channel.send(ReceiveKV(offer, ttl_s))

    def drain_instance(self, instance: int, *, is_drained: bool) -> None:
        if is_drained:
            self._drained.add(instance)
        else:
            self._drained.discard(instance)
        if self._channel is not None:
            self._channel.send(DrainInstance(instance, is_drained))

    async def run(self, router: Router) -> None:
        """Follow the process and restart it when it dies, until it cannot load any more."""
        num_unready = 0
        while True:
            was_ready = await self._follow(router)
            # At once, so that others take over while we look what happened.
            router.tell(ReplicaLost(self.name, self._incarnation, "the engine process is gone"))
            reason = self.failure or await self._autopsy()
            num_unready = 0 if was_ready else num_unready + 1
            never_worked = self._incarnation == 0 and not was_ready
            if self.failure is None and (never_worked or num_unready >= _MAX_RESTARTS_UNREADY):
                self.failure = reason
            final = self.failure is not None
            router.tell(ReplicaLost(self.name, self._incarnation, reason, final=final))
            if final:
                log.error("%s: %s", self.name, reason)
                return
            log.error("%s: %s; starting it again", self.name, reason)
            await asyncio.sleep(0.0 if was_ready else _RESTART_PAUSE_S)
            self._incarnation += 1
            try:
                self._process, self._socket = self._start()
            except OSError as error:
                self.failure = f"the engine process could not be started again: {error}"
                router.tell(ReplicaLost(self.name, self._incarnation, self.failure, final=True))
                return

    async def close(self) -> None:
        """Let the process see our end, then make it leave."""
        if self._channel is not None:
            self._channel.close()
        self._socket.close()
        await asyncio.to_thread(_end, self._process)

    def kill(self) -> None:
        """End the process at once."""
        self._process.kill()

    async def _follow(self, router: Router) -> bool:
        """Pass on the process's news until it is gone; whether it ever was ready."""
        codec: Codec[FromEngine, ToEngine] = Codec(FromEngine)
        channel = self._channel = await AsyncChannel.open(self._socket, codec)
        time_s = asyncio.get_running_loop().time
        watchdog = Watchdog(self._limits, time_s())
        watching: asyncio.Task[None] | None = None
        try:
            while (message := await channel.receive()) is not None:
                match message:
                    case News(outputs, stats):
                        was_stuck, self.stats = self.stats.is_stuck, stats
                        watchdog.heard(stats, time_s())
                        if outputs:
                            said = (self.name, self._incarnation, outputs, stats.computed)
                            router.tell(ReplicaOutputs(*said))
                        if stats.is_stuck != was_stuck:
                            stuck = ReplicaStuck(self.name, self._incarnation, stats.is_stuck)
                            router.tell(stuck)
                    case Lent(offer):
                        router.tell(KVLent(self.name, self._incarnation, offer))
                    case Pulled(lease_id, num):
                        router.tell(KVPulled(self.name, self._incarnation, lease_id, num))
                    case StepsTook(steps):
                        self.steps_taken.extend(steps)
                    case Loading():
                        self._on_loading(message)
                    case Ready(info):
                        watchdog = Watchdog(self._limits, time_s())
                        watching = asyncio.create_task(self._watch(watchdog))
                        for instance in self._drained:
                            channel.send(DrainInstance(instance, True))
                        router.tell(ReplicaReady(self.name, self._incarnation, info))
                    case LaunchFailed(reason):
                        self.failure = reason
        except WireError as error:
            log.error("%s: %s", self.name, error)
        finally:
            if watching is not None:
                watching.cancel()
            self._channel = None
            channel.close()
        return watching is not None

    async def _watch(self, watchdog: Watchdog) -> None:
        """End the process when it has been quiet for too long."""
        loop = asyncio.get_running_loop()
        self._complaint = None
        while self._complaint is None:
            await asyncio.sleep(_WATCH_EVERY_S)
            if watchdog.complaint(loop.time(), self._is_stopped) is not None:
                # If it was this process that slept, what came meanwhile is read first.
                await asyncio.sleep(self._limits.grace_s)
                self._complaint = watchdog.complaint(loop.time(), self._is_stopped)
        self._process.kill()

    def _is_stopped(self) -> bool:
        """By a signal, as far as the system says (`man 5 proc`, state); not by a debugger."""
        try:
            stat = Path(f"/proc/{self._process.pid}/stat").read_bytes()
        except OSError:
            return False
        # The name in brackets may hold any character.
        return stat.rpartition(b")")[2].split()[0] == b"T"

    async def _autopsy(self) -> str:
        """Make sure that the process is gone, and say how it went."""
        code = await asyncio.to_thread(_end, self._process)
        complaint, self._complaint = self._complaint, None
        if complaint is not None:
            return f"{complaint} and was ended"
        if code < 0:
            name = signal.Signals(-code).name
            hint = " (out of memory?)" if -code == signal.SIGKILL else ""
            return f"the engine process was ended by {name}{hint}"
        return f"the engine process ended by itself with status {code}"

    def _start(self) -> tuple[subprocess.Popen[bytes], socket.socket]:
        ours, theirs = socket.socketpair()
        with theirs:
            threads = self._options.num_threads
            env = {name: value for name, value in os.environ.items() if name not in _SECRETS}
            if threads is not None:
                env["OMP_NUM_THREADS"] = str(threads)
            process = subprocess.Popen(
                [*self._command, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                # Ctrl-C is ours to handle: the engine leaves when we do.
                start_new_session=True,
                env=env,
            )
        # Now, not when the event loop comes to it: the engine loads while we still import.
        launch: Codec[FromEngine, ToEngine] = Codec(FromEngine)
        ours.sendall(launch.encode(self._launch))
        ours.setblocking(False)
        return process, ours


def _end(process: subprocess.Popen[bytes]) -> int:
    try:
        return process.wait(_STOP_GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()
