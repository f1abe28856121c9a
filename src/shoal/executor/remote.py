"""A worker on another machine, as the executor reaches it: through its agent.

    executor's event loop ◄─ bytes ─ thread ◄═ CURVE, TCP ═► agent ── worker

Knows nothing of who placed the agent there.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable

from shoal.core.errors import WireError
from shoal.executor.launcher import WorkerCodec, how_it_ended
from shoal.wire.agent_link import SILENCE_S, AgentLink, Kind
from shoal.wire.channel import AsyncChannel
from shoal.wire.worker_messages import FromWorker, ToWorker

_LOOK_EVERY_S = 0.25
_QUIET_S = 1.0


class RemoteWorker:
    """
    Args:
        link: to its agent, which has started it.
        pid: of the worker, on its machine.
        where: for people.
        give_up: called once, from some thread, when it is to be no more; told whether its
            machine was not heard.
    """

    def __init__(
        self,
        link: AgentLink,
        codec: WorkerCodec,
        pid: int,
        where: str,
        give_up: Callable[[bool], None],
    ) -> None:
        self.pid = pid
        self._link = link
        self._where = where
        self._give_up = give_up
        self._loop = asyncio.get_running_loop()
        self._channel: AsyncChannel[FromWorker, ToWorker] = AsyncChannel(codec)
        self._channel.connection_made(_Sender(self._send))
        self._ending = threading.Event()
        self._how = ""
        self._is_lost = False
        self._thread = threading.Thread(target=self._listen, name="shoal-remote", daemon=True)
        self._thread.start()

    async def receive(self) -> FromWorker | None:
        return await self._channel.receive()

    def send_frame(self, frame: bytes) -> None:
        self._channel.send_frame(frame)

    def kill(self, pid: int) -> None:
        if not self._ending.is_set():
            self._is_lost = self._link.silent_s > _QUIET_S
            with contextlib.suppress(WireError):
                self._link.send(Kind.KILL)
            self._ending.set()

    def wait(self) -> str:
        self._thread.join()
        return self._how

    def _send(self, frame: bytes) -> None:
        if self._ending.is_set():
            return
        try:
            self._link.send(Kind.DATA, frame)
        except WireError as error:
            self._end(str(error))

    def _end(self, how: str) -> None:
        self._how = self._how or how
        self._ending.set()

    def _listen(self) -> None:
        try:
            while not self._ending.is_set():
                self._take(self._link.receive(_LOOK_EVERY_S))
        except WireError as error:
            self._end(f"cannot be followed any more: {error}")
        finally:
            self._how = self._how or f"was ended on {self._where}"
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._channel.connection_lost, None)
            threading.Event().wait(_LOOK_EVERY_S)  # for a KILL to leave
            self._link.close()
            self._give_up(self._is_lost)

    def _take(self, arrived: tuple[Kind, memoryview] | None) -> None:
        if arrived is None:
            if self._link.silent_s > SILENCE_S:
                self._is_lost = True
                self._end(f"is not heard any more from {self._where}")
            return
        kind, payload = arrived
        if kind is Kind.DATA:
            self._loop.call_soon_threadsafe(self._channel.data_received, bytes(payload))
        elif kind is Kind.ENDED:
            code = bytes(payload).decode("ascii", errors="replace")
            known = code.lstrip("-").isdigit() and len(code) < 5
            self._end(f"on {self._where} {how_it_ended(int(code)) if known else 'ended'}")


class _Sender(asyncio.WriteTransport):
    """What an `AsyncChannel` writes to."""

    def __init__(self, send: Callable[[bytes], None]) -> None:
        super().__init__()
        self._send = send

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self._send(bytes(data))

    def is_closing(self) -> bool:
        return False

    def close(self) -> None:
        """The agent's link is closed by who listens to it."""
