"""One worker, as the executor follows it: what it has said of itself, and how it is reached.

Knows nothing of where it runs (`launcher.py`), of Steps, or of what is done about one that dies.
"""

from __future__ import annotations

import asyncio

from shoal.core.errors import DeviceError
from shoal.executor.launcher import Running, Spot, WorkerCodec
from shoal.wire.worker_messages import FromWorker, LaunchWorker, Loaded, ToWorker, Warm


class WorkerProcess:
    """A worker that was started; what it says is for `receive` to read.

    Attributes:
        pid: of the process that computes, on its own machine; known better once it is bound.
        kv_address: where it answers who wants KV; empty: it does not.
        bound: its sockets' address.
        loaded: what it said of itself.
        warm: what it measured, when it is ready.
    """

    def __init__(self, launch: LaunchWorker, codec: WorkerCodec) -> None:
        loop = asyncio.get_running_loop()
        self.name, self.instance, self.rank = launch.name, launch.instance, launch.rank
        self.speed = launch.speed
        self.pid = 0
        self.kv_address = ""
        self.bound: asyncio.Future[tuple[str, ...]] = loop.create_future()
        self.loaded: asyncio.Future[Loaded] = loop.create_future()
        self.warm: asyncio.Future[Warm] = loop.create_future()
        self._launch = launch
        self._codec = codec
        self._running: Running | None = None

    @property
    def is_bound(self) -> bool:
        return self.bound.done() and self.bound.exception() is None

    @property
    def is_warm(self) -> bool:
        return self.warm.done() and self.warm.exception() is None

    async def start(self, spot: Spot) -> None:
        """Start it there, and tell it what to load."""
        self._running = await spot.start(self._launch, self._codec)
        self.pid = self._running.pid

    async def receive(self) -> FromWorker | None:
        """The next message; None when the worker is gone."""
        assert self._running is not None
        return await self._running.receive()

    def send(self, message: ToWorker) -> None:
        self.send_frame(self._codec.encode(message))

    def send_frame(self, frame: bytes) -> None:
        """Send what `WorkerCodec.encode` gave; to several workers at the cost of one."""
        if self._running is not None:
            self._running.send_frame(frame)

    def fail(self, reason: str) -> None:
        """Whoever waits for it to become ready hears why it does not."""
        for future in (self.bound, self.loaded, self.warm):
            if not future.done():
                future.set_exception(DeviceError(reason))
                future.exception()  # it may be that nobody waits

    def kill(self) -> None:
        """End it at once, stopped or not."""
        if self._running is not None:
            self._running.kill(self.pid)

    def wait(self) -> str:
        """How it ended; waits until it has."""
        return self._running.wait() if self._running is not None else "was not started"
