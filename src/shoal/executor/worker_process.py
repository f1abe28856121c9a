"""One worker process and the channel to it, on the executor's event loop.

It gets one end of a socket pair: its death is our end of file, and ours is its. Knows nothing of
Steps or of what is done about a worker that dies.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence

from shoal.core.errors import DeviceError
from shoal.wire.channel import AsyncChannel, Codec
from shoal.wire.worker_messages import (
    FromWorker,
    LaunchWorker,
    LinkFacts,
    Loaded,
    ToWorker,
)

WorkerCodec = Codec[FromWorker, ToWorker]

_SECRETS = ("SHOAL_API_KEY", "HF_TOKEN")


class WorkerProcess:
    """A worker that was started; what it says is for `receive` to read.

    Attributes:
        pid: of the process that computes; known better once it is bound.
        bound: its sockets' address.
        loaded: what it said of itself.
        warm: what its links give, when it is ready.
    """

    def __init__(self, launch: LaunchWorker, codec: WorkerCodec) -> None:
        loop = asyncio.get_running_loop()
        self.name, self.instance, self.rank = launch.name, launch.instance, launch.rank
        self.speed = launch.speed
        self.pid = 0
        self.bound: asyncio.Future[str] = loop.create_future()
        self.loaded: asyncio.Future[Loaded] = loop.create_future()
        self.warm: asyncio.Future[list[LinkFacts]] = loop.create_future()
        self._launch = launch
        self._codec = codec
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: AsyncChannel[FromWorker, ToWorker] | None = None

    @property
    def is_bound(self) -> bool:
        return self.bound.done() and self.bound.exception() is None

    @property
    def is_warm(self) -> bool:
        return self.warm.done() and self.warm.exception() is None

    async def start(self, prefix: Sequence[str]) -> None:
        """Start the process and tell it what to load.

        Args:
            prefix: of the command line (a lab's host).
        """
        ours, theirs = socket.socketpair()
        fds = [theirs.fileno()]
        if self._launch.group_fd is not None:
            fds.append(self._launch.group_fd)
        env = {name: value for name, value in os.environ.items() if name not in _SECRETS}
        env["OMP_NUM_THREADS"] = str(self._launch.options.num_threads)
        with theirs:
            self._process = subprocess.Popen(
                [*prefix, sys.executable, "-m", "shoal.worker.process", str(theirs.fileno())],
                pass_fds=fds,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is the engine's to handle
                env=env,
            )
        self.pid = self._process.pid
        ours.setblocking(False)
        self._channel = await AsyncChannel.open(ours, self._codec)
        self._channel.send(self._launch)

    async def receive(self) -> FromWorker | None:
        """The next message; None when the worker is gone."""
        assert self._channel is not None
        return await self._channel.receive()

    def send(self, message: ToWorker) -> None:
        self.send_frame(self._codec.encode(message))

    def send_frame(self, frame: bytes) -> None:
        """Send what `WorkerCodec.encode` gave; to several workers at the cost of one."""
        if self._channel is not None:
            self._channel.send_frame(frame)

    def fail(self, reason: str) -> None:
        """Whoever waits for it to become ready hears why it does not."""
        for future in (self.bound, self.loaded, self.warm):
            if not future.done():
                future.set_exception(DeviceError(reason))
                future.exception()  # it may be that nobody waits

    def kill(self) -> None:
        """End it at once, stopped or not."""
        if self._channel is not None:
            self._channel.close()
        if self._process is None or self._process.poll() is not None:
            return
        for pid in {self.pid, self._process.pid}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def wait(self) -> str:
        """How it ended; waits until it has."""
        if self._process is None:
            return "was not started"
        code = self._process.wait()
        if code >= 0:
            return f"ended with status {code}; its own words stand above"
        hint = " (out of memory?)" if -code == signal.SIGKILL else ""
        return f"was ended by {signal.Signals(-code).name}{hint}"
