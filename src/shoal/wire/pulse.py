"""Whether a peer can be heard, and how far away it is: small messages on a connection of their own.

A thread sends each peer a ping every 0.25 s, answers theirs, and opens the gate to new
connections. It needs no word from whoever computes, and a large message on the other connection
does not hold it up. Peers must be connected both ways. Knows nothing of what else is sent.
"""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue

import zmq

from shoal.core.errors import WireError
from shoal.wire.curve import Gate, MeshKeys, connect, listen, sender
from shoal.wire.throttle import Link, Throttle

MAX_PROBE_BYTES = 1 << 20

_PING_INTERVAL_S = 0.25
_SILENCE_S = 3.0
"""After it a connection of TCP may wait longer for its next try than we want to wait."""

_MAX_QUEUED = 64
_PULSE = struct.Struct("<cQ")
"""Ping or pong; when the ping was sent, by its sender's clock. What follows a ping is a probe's."""

_PING, _PONG = b"?", b"!"
_OWN = "inproc://pulse"


@dataclass(slots=True)
class _Peer:
    socket: zmq.Socket[bytes]
    heard_at: float
    was_heard: bool = False
    latency_s: float | None = None


class Pulse:
    """
    Args:
        returned: called with a peer that is heard again after more than 3 s, from this thread.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        keys: MeshKeys,
        addresses: Sequence[str],
        returned: Callable[[str], None],
    ) -> None:
        self._context, self._keys, self._returned = context, keys, returned
        self._gate = Gate(context, keys)
        self._peers: dict[str, _Peer] = {}
        self._lock = threading.Lock()  # of the peers and their sockets
        self._probes: dict[int, SimpleQueue[float]] = {}
        self._throttle: Throttle | None = None
        self._inbox = context.socket(zmq.PULL)
        self._inbox.maxmsgsize = MAX_PROBE_BYTES + 1024
        _notice_dead_connections(self._inbox)
        self._inbox.bind(_OWN)
        self.endpoints = listen(self._inbox, keys, addresses)
        self._thread = threading.Thread(target=self._run, name="shoal-pulse", daemon=True)
        self._thread.start()

    @property
    def num_refused(self) -> int:
        return self._gate.num_refused

    def connect(self, peer: str, endpoint: str) -> None:
        socket = connect(self._context, self._keys, peer, endpoint, _MAX_QUEUED)
        _notice_dead_connections(socket)
        self.disconnect(peer)
        with self._lock:
            self._peers[peer] = _Peer(socket, time.monotonic())

    def disconnect(self, peer: str) -> None:
        with self._lock:
            if (gone := self._peers.pop(peer, None)) is not None:
                gone.socket.close()

    def note(self, peer: str) -> None:
        """Something else came from this peer."""
        if (known := self._peers.get(peer)) is not None:
            known.heard_at = time.monotonic()

    def heard(self, peer: str) -> float:
        """Seconds since anything came from a peer, or since it was connected."""
        known = self._peers.get(peer)
        return time.monotonic() - known.heard_at if known is not None else float("inf")

    def latency(self, peer: str) -> float | None:
        """Seconds the last ping took, there and back; None: none has come back yet."""
        known = self._peers.get(peer)
        return known.latency_s if known is not None else None

    def round_trip(self, peer: str, num_bytes: int, timeout_s: float) -> float:
        """Seconds until `num_bytes` are there and their receipt is back, once.

        Raises:
            WireError: they did not come back in time.
        """
        sent_at, came = time.monotonic_ns(), SimpleQueue[float]()
        self._probes[sent_at] = came
        try:
            self._send(peer, _PULSE.pack(_PING, sent_at) + bytes(min(num_bytes, MAX_PROBE_BYTES)))
            return came.get(timeout=timeout_s)
        except Empty:
            raise WireError(
                f"{peer} did not say within {timeout_s} s that {num_bytes} bytes came"
            ) from None
        finally:
            del self._probes[sent_at]

    def set_link(self, peer: str, link: Link) -> None:
        with self._lock:
            if self._throttle is None:
                self._throttle = Throttle(
                    lambda key, body, _: self._push(key[0], body), _MAX_QUEUED
                )
            self._throttle.set_link((peer, "pulse"), link)

    def close(self) -> None:
        if self._throttle is not None:
            self._throttle.close()
        with self._context.socket(zmq.PUSH) as end:
            end.connect(_OWN)
            end.send(b"")
            self._thread.join()
        for peer in list(self._peers):
            self.disconnect(peer)
        self._inbox.close()
        self._gate.socket.close()

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._inbox, zmq.POLLIN)
        poller.register(self._gate.socket, zmq.POLLIN)
        next_ping = time.monotonic()
        while True:
            if time.monotonic() >= next_ping:
                next_ping = time.monotonic() + _PING_INTERVAL_S
                self._ping()
            ready = dict(poller.poll(max(0, round((next_ping - time.monotonic()) * 1000))))
            if self._gate.socket in ready:
                self._gate.answer()
            if self._inbox in ready and not self._take():
                return

    def _ping(self) -> None:
        for peer in list(self._peers):
            self._send(peer, _PULSE.pack(_PING, time.monotonic_ns()))

    def _take(self) -> bool:
        """One message; False: it says that all ends."""
        frame = self._inbox.recv(copy=False)
        name, body = sender(frame), frame.bytes
        if name is None:
            return False
        if len(body) < _PULSE.size:
            return True
        kind, sent_at = _PULSE.unpack_from(body)
        self._note_pulse(name)
        if kind == _PING:
            self._send(name, _PULSE.pack(_PONG, sent_at))
        elif (probe := self._probes.get(sent_at)) is not None:
            probe.put((time.monotonic_ns() - sent_at) / 1e9)
        elif (known := self._peers.get(name)) is not None:
            known.latency_s = (time.monotonic_ns() - sent_at) / 1e9
        return True

    def _note_pulse(self, name: str) -> None:
        if (known := self._peers.get(name)) is None:
            return
        has_returned = known.was_heard and self.heard(name) > _SILENCE_S
        known.was_heard = True
        self.note(name)
        if has_returned:
            self._returned(name)

    def _send(self, peer: str, body: bytes) -> None:
        """As long as the peer takes them: a lost one is what is to be noticed."""
        throttle = self._throttle
        if throttle is None or not throttle.paces((peer, "pulse")):
            self._push(peer, body)
            return
        try:
            throttle.send((peer, "pulse"), body, b"")
        except WireError:
            return

    def _push(self, peer: str, body: bytes) -> None:
        with self._lock:
            if (known := self._peers.get(peer)) is None:
                return
            try:
                known.socket.send(body, zmq.NOBLOCK)
            except zmq.Again:
                return


def _notice_dead_connections(socket: zmq.Socket[bytes]) -> None:
    """And connect anew at once: this connection is there to notice."""
    socket.heartbeat_ivl = 500
    socket.heartbeat_timeout = 1500
