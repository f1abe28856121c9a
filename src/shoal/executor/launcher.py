"""Where workers are started: on this machine, or where somebody else places them.

    Launcher.place(instance)     a Spot for each of its ranks
    Spot.start(launch)           a Running worker, and the channel to it

A worker of this machine is a child with one end of a socket pair: its death is our end of file, and
ours is its. A cluster's workers are `ray_launcher.py`'s. Knows nothing of Steps, or of what is done
about a worker that dies.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Protocol

from shoal.core.plan import RankPlan
from shoal.wire.channel import AsyncChannel, Codec
from shoal.wire.messages import HostNet
from shoal.wire.probe_messages import LaunchProbe
from shoal.wire.worker_messages import FromWorker, LaunchWorker, ToWorker

WorkerCodec = Codec[FromWorker, ToWorker]

Launch = LaunchWorker | LaunchProbe

SECRETS = ("SHOAL_API_KEY", "HF_TOKEN")
_LOOPBACK = "127.0.0.1"


class Running(Protocol):
    """A worker that was started, wherever that is."""

    @property
    def pid(self) -> int:
        """Of what was started, on its own machine."""

    async def receive(self) -> FromWorker | None:
        """The next message; None when the worker is gone, or cannot be heard."""

    def send_frame(self, frame: bytes) -> None:
        """Send what the codec encoded."""

    def kill(self, pid: int) -> None:
        """End it at once, stopped or not; `pid` is that of the process that computes."""

    def wait(self) -> str:
        """How it ended; waits until it has, or until nothing more will be known of it."""


class Spot(Protocol):
    """A place for one rank.

    Attributes:
        address: of the interface that its sockets are bound to.
        is_child: what is started there inherits descriptors.
        num_cpus: of its machine, if it is another one; None: it is this one.
    """

    address: str
    is_child: bool
    num_cpus: int | None

    async def start(self, launch: Launch, codec: WorkerCodec) -> Running:
        """Start a worker there, and tell it what to load or to measure.

        Raises:
            ShoalError, OSError: it cannot be started.
        """


class Launcher(Protocol):
    async def place(self, instance: int, ranks: Sequence[RankPlan]) -> Sequence[Spot]:
        """Where the ranks of an instance go now; what it had before is given up.

        Raises:
            ShoalError: there is no place for one.
        """

    def close(self) -> None:
        """Give up every place."""


class LocalLauncher:
    """Children of this process.

    Args:
        hosts: of a lab, that the plan's ranks name.
        address: of those that name none.
    """

    def __init__(self, hosts: Mapping[str, HostNet], address: str = _LOOPBACK) -> None:
        self._hosts = hosts
        self._here = HostNet((), address)

    async def place(self, instance: int, ranks: Sequence[RankPlan]) -> Sequence[Spot]:
        return [_LocalSpot(self._hosts.get(rank.host or "", self._here)) for rank in ranks]

    def close(self) -> None:
        """Places of this machine need not be given up."""


class _LocalSpot:
    is_child = True

    def __init__(self, host: HostNet) -> None:
        self.num_cpus: int | None = None
        self.address = host.address
        self._command = host.command

    async def start(self, launch: Launch, codec: WorkerCodec) -> Running:
        ours, theirs = socket.socketpair()
        with theirs:
            process = _spawn(launch, theirs.fileno(), self._command)
        ours.setblocking(False)
        channel = await AsyncChannel.open(ours, codec)
        channel.send(launch)
        return _Child(process, channel)


def _spawn(launch: Launch, fd: int, prefix: Sequence[str]) -> subprocess.Popen[bytes]:
    fds = [fd] if launch.group_fd is None else [fd, launch.group_fd]
    env = {name: value for name, value in os.environ.items() if name not in SECRETS}
    env["OMP_NUM_THREADS"] = str(launch.num_threads)
    return subprocess.Popen(
        [*prefix, sys.executable, "-m", launch.module, str(fd)],
        pass_fds=fds,
        stdin=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is the engine's to handle
        env=env,
    )


class _Child:
    """A process of this machine."""

    def __init__(
        self, process: subprocess.Popen[bytes], channel: AsyncChannel[FromWorker, ToWorker]
    ) -> None:
        self.pid = process.pid
        self._process = process
        self._channel = channel

    async def receive(self) -> FromWorker | None:
        return await self._channel.receive()

    def send_frame(self, frame: bytes) -> None:
        self._channel.send_frame(frame)

    def kill(self, pid: int) -> None:
        self._channel.close()
        if self._process.poll() is not None:
            return
        for each in {pid, self._process.pid}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(each, signal.SIGKILL)

    def wait(self) -> str:
        return how_it_ended(self._process.wait())


def how_it_ended(code: int) -> str:
    """For people: what a process's exit code says."""
    if code >= 0:
        return f"ended with status {code}; its own words stand above"
    hint = " (out of memory?)" if -code == signal.SIGKILL else ""
    return f"was ended by {signal.Signals(-code).name}{hint}"
