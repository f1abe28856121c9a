"""Framed messages over a stream socket, blocking or asyncio: 4-byte length, then msgpack.

Two processes share one end each of a socket pair: nothing listens, so no stranger can
connect, and either side's death is the other's end of file. A frame over the limit or one
that does not decode is a `WireError`. Knows nothing of what the messages mean.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Iterator
from io import IOBase
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar, cast

import msgspec

from shoal.core.errors import WireError

MAX_FRAME_BYTES = 64 << 20

_HEADER = struct.Struct("<I")
_READ_BYTES = 1 << 20

Incoming = TypeVar("Incoming")
Outgoing = TypeVar("Outgoing")


class Codec(Generic[Incoming, Outgoing]):
    """Messages to frames and back; `incoming` is the union of types accepted."""

    def __init__(self, incoming: Any) -> None:
        self._decoder: msgspec.msgpack.Decoder[Incoming] = msgspec.msgpack.Decoder(incoming)
        self._encoder = msgspec.msgpack.Encoder()

    def encode(self, message: Outgoing) -> bytes:
        body = self._encoder.encode(message)
        if len(body) > MAX_FRAME_BYTES:
            raise WireError(f"a message of {len(body)} bytes; {MAX_FRAME_BYTES} is the limit")
        return _HEADER.pack(len(body)) + body

    def decode(self, body: bytes | bytearray) -> Incoming:
        try:
            return self._decoder.decode(body)
        except msgspec.DecodeError as error:
            raise WireError(f"a message that does not decode: {error}") from error


def body_length(header: bytes | bytearray) -> int:
    """Length of the body that follows; refuses one over the limit."""
    (length,) = _HEADER.unpack(header)
    if length > MAX_FRAME_BYTES:
        raise WireError(f"a frame of {length} bytes is announced; {MAX_FRAME_BYTES} is the limit")
    return int(length)


class AsyncChannel(asyncio.Protocol, Generic[Incoming, Outgoing]):
    """The end of whoever started the other, on its event loop; one task receives.

    A protocol of its own because asyncio's streams took as long as all of the router. What is
    not received yet is bounded by what the requests in flight can produce.
    """

    def __init__(self, codec: Codec[Incoming, Outgoing]) -> None:
        self._codec = codec
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.WriteTransport | None = None
        self._received = bytearray()
        self._position = 0
        self._waiter: asyncio.Future[None] | None = None
        self._ended = False

    @classmethod
    async def open(
        cls, sock: socket.socket, codec: Codec[Incoming, Outgoing]
    ) -> AsyncChannel[Incoming, Outgoing]:
        loop = asyncio.get_running_loop()
        _, channel = await loop.create_connection(lambda: cls(codec), sock=sock)
        return channel

    def send(self, message: Outgoing) -> None:
        """Queue a message; a peer that is gone is noticed by `receive`."""
        self.send_frame(self._codec.encode(message))

    def send_frame(self, frame: bytes) -> None:
        """Queue what the codec encoded before."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(frame)

    async def receive(self) -> Incoming | None:
        """The next message; None when the peer is gone."""
        while (body := self._take_frame()) is None:
            if self._ended:
                return None
            self._waiter = self._loop.create_future()
            await self._waiter
        return self._codec.decode(body)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def _take_frame(self) -> bytearray | None:
        """The body of the next frame, if all of it is here."""
        start = self._position + _HEADER.size
        if len(self._received) < start:
            return None
        end = start + body_length(self._received[self._position : start])
        if len(self._received) < end:
            return None
        body = self._received[start:end]
        self._position = end
        if end == len(self._received):
            self._received.clear()
            self._position = 0
        return body

    # --- asyncio's side ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are none of asyncio's classes.
        self._transport = cast(asyncio.WriteTransport, transport)

    def data_received(self, data: bytes) -> None:
        if self._position:
            del self._received[: self._position]
            self._position = 0
        self._received += data
        self._wake()

    def connection_lost(self, error: Exception | None) -> None:
        self._ended = True
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class ThreadChannel(Generic[Incoming, Outgoing]):
    """The end of whoever was started: a blocking reader, and a writer's thread, so that sending
    never blocks."""

    def __init__(self, sock: socket.socket, codec: Codec[Incoming, Outgoing]) -> None:
        self._socket = sock
        self._codec = codec
        self._outbox: SimpleQueue[bytes | None] = SimpleQueue()
        self._writer = threading.Thread(target=self._write, name="shoal-writer", daemon=True)
        self._writer.start()

    def send(self, message: Outgoing) -> None:
        """Queue a message; from any thread."""
        self._outbox.put(self._codec.encode(message))

    def receive(self) -> Iterator[Incoming]:
        """Messages until the peer is gone."""
        with self._socket.makefile("rb", buffering=_READ_BYTES) as stream:
            while (body := self._read_frame(stream)) is not None:
                yield self._codec.decode(body)

    def _read_frame(self, stream: IOBase) -> bytes | None:
        try:
            header: bytes = stream.read(_HEADER.size)
            if len(header) < _HEADER.size:
                return None
            length = body_length(header)
            body: bytes = stream.read(length)
        except ConnectionError:
            # A peer that dies with our messages unread resets the connection.
            return None
        return body if len(body) == length else None

    def close(self) -> None:
        """Send what is queued, then close."""
        self._outbox.put(None)
        self._writer.join()
        self._socket.close()

    def _write(self) -> None:
        while (frame := self._outbox.get()) is not None:
            frames = [frame]
            closing = False
            try:
                while len(frames) < 1024:
                    following = self._outbox.get_nowait()
                    if following is None:
                        closing = True
                        break
                    frames.append(following)
            except Empty:
                pass
            try:
                self._socket.sendall(b"".join(frames))
            except OSError:
                # The reader sees the end of file and ends the process.
                return
            if closing:
                return
