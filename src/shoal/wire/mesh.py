"""Messages from worker to worker: every worker listens once, and sends to each peer by its name.

    send(peer, header, payload)  →  PUSH ══ CURVE, TCP ══▶ PULL  →  (sender, header, payload)
    pings                        →  PUSH ══════════════════▶ PULL     wire/pulse.py

Sending never waits: a queue per peer is bounded, and a message that does not fit is an error. A
message to a worker's own name is received like any other, so one loop can wait for everything.
Messages of one sender to one peer stay in order. They are lost where a peer ends, is connected
anew, or is silent for more than 3 s; who sends must be able to begin anew.

Threads: `receive` and `close` belong to one thread; the rest may be called from any. Knows
nothing of what the messages mean.
"""

from __future__ import annotations

import contextlib
import math
import threading

import zmq

from shoal.core.errors import WireError
from shoal.wire.curve import MeshKeys, connect, listen, sender
from shoal.wire.pulse import Pulse
from shoal.wire.throttle import Key, Link, Throttle

MAX_HEADER_BYTES = 1 << 20
MAX_PAYLOAD_BYTES = 256 << 20

_MAX_QUEUED = 256
_OWN = "inproc://mesh"

Payload = bytes | bytearray | memoryview


class Mesh:
    """One worker's end.

    Args:
        keys: its name, and whom it knows.
        interface_addresses: of the interfaces to listen on; ports are the system's choice.

    Raises:
        WireError: no such address here.
    """

    def __init__(self, keys: MeshKeys, *interface_addresses: str) -> None:
        interface_addresses = interface_addresses or ("127.0.0.1",)
        self._keys = keys
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._lock = threading.Lock()  # of the sockets below, but not the inbox
        self._peers: dict[str, zmq.Socket[bytes]] = {}
        self._endpoints: dict[str, str] = {}
        self._throttle: Throttle | None = None
        try:
            self._inbox = self._new_inbox(interface_addresses)
            self._pulse = Pulse(self._context, keys, interface_addresses, self._connect_data)
        except WireError:
            self._context.destroy(linger=0)
            raise
        self._own = self._context.socket(zmq.PUSH)
        self._own.connect(_OWN)

    @property
    def name(self) -> str:
        return self._keys.name

    @property
    def address(self) -> str:
        """What peers connect to, over the first interface."""
        return self.addresses[0]

    @property
    def addresses(self) -> tuple[str, ...]:
        """What peers connect to, over each interface."""
        pairs = zip(self._listens_at, self._pulse.endpoints, strict=True)
        return tuple(f"{data} {pulse}" for data, pulse in pairs)

    @property
    def num_refused(self) -> int:
        """Strangers, whose key nobody handed out."""
        return self._pulse.num_refused

    def connect(self, peer: str, address: str) -> None:
        """Connect to a peer, or to where it is now; what the old connection held is lost.

        Raises:
            WireError: no key for this peer, or an address that is none.
        """
        data, _, pulse = address.partition(" ")
        self._pulse.connect(peer, pulse)
        with self._lock:
            self._endpoints[peer] = data
        self._connect_data(peer)

    def disconnect(self, peer: str) -> None:
        self._pulse.disconnect(peer)
        with self._lock:
            self._endpoints.pop(peer, None)
            if (gone := self._peers.pop(peer, None)) is not None:
                gone.close()
            if self._throttle is not None:
                self._throttle.forget((peer, "data"))

    def send(self, peer: str, header: bytes, payload: Payload = b"") -> None:
        """Queue a message; the payload may be reused at once.

        Raises:
            WireError: the peer is not connected, does not take its messages, or they are too large.
        """
        size = payload.nbytes if isinstance(payload, memoryview) else len(payload)
        if len(header) > MAX_HEADER_BYTES or size > MAX_PAYLOAD_BYTES:
            raise WireError(
                f"a message with a header of {len(header)} and a payload of {size} bytes; the "
                f"limits are {MAX_HEADER_BYTES} and {MAX_PAYLOAD_BYTES}"
            )
        throttle = self._throttle
        if throttle is not None and throttle.paces((peer, "data")):
            throttle.send((peer, "data"), header, bytes(payload))
        elif not self._push(peer, header, payload):
            raise WireError(
                f"{_MAX_QUEUED} messages to {peer} wait, the last of {size} bytes: it takes none"
            )

    def receive(self, timeout_s: float | None) -> tuple[str, bytes, memoryview] | None:
        """The next message: its sender, whose key it came with, header and payload.

        Returns:
            None: nothing came in time; a timeout of None waits for ever.

        Raises:
            WireError: a message that is not made like one.
        """
        try:
            frames = self._inbox.recv_multipart(zmq.NOBLOCK, copy=False)
        except zmq.Again:
            if not self._inbox.poll(None if timeout_s is None else math.ceil(timeout_s * 1000)):
                return None
            frames = self._inbox.recv_multipart(copy=False)
        name = sender(frames[0])
        if name is None:
            name = self.name
        else:
            self._pulse.note(name)
        if len(frames) != 2 or len(frames[0]) > MAX_HEADER_BYTES:
            raise WireError(f"{name} sent {len(frames)} parts, or a header over the limit")
        return name, frames[0].bytes, frames[1].buffer

    def heard(self, peer: str) -> float:
        """Seconds since anything came from a peer; infinite, if it is not connected."""
        return self._pulse.heard(peer)

    def latency(self, peer: str) -> float | None:
        """Seconds the last ping took, there and back; None: none has come back yet."""
        return self._pulse.latency(peer)

    def round_trip(self, peer: str, num_bytes: int, timeout_s: float = 5.0) -> float:
        """Seconds until up to 1 MiB is there and its receipt back, beside everything else.

        Raises:
            WireError: no receipt came in time.
        """
        return self._pulse.round_trip(peer, num_bytes, timeout_s)

    def set_link(
        self,
        peer: str,
        bandwidth_bytes_per_s: float | None = None,
        latency_s: float = 0.0,
        cut: bool = False,
    ) -> None:
        """Make the link to a peer slower than it is, for the lab; one way."""
        link = Link(bandwidth_bytes_per_s=bandwidth_bytes_per_s, latency_s=latency_s, cut=cut)
        with self._lock:
            if self._throttle is None:
                self._throttle = Throttle(self._push_late, _MAX_QUEUED)
            self._throttle.set_link((peer, "data"), link)
        self._pulse.set_link(peer, link)

    def close(self) -> None:
        """What is not sent yet is dropped."""
        if self._throttle is not None:
            self._throttle.close()
        self._pulse.close()
        for socket in (*self._peers.values(), self._own, self._inbox):
            socket.close()
        self._context.term()

    def _new_inbox(self, addresses: tuple[str, ...]) -> zmq.Socket[bytes]:
        inbox = self._context.socket(zmq.PULL)
        inbox.rcvhwm = _MAX_QUEUED
        inbox.linger = 0
        inbox.maxmsgsize = MAX_PAYLOAD_BYTES + 1024  # CURVE adds a little
        inbox.bind(_OWN)
        self._listens_at = listen(inbox, self._keys, addresses)
        return inbox

    def _connect_data(self, peer: str) -> None:
        """Also for a peer that was silent: the old connection may be long in noticing."""
        with self._lock:
            if (endpoint := self._endpoints.get(peer)) is None:
                return
            socket = connect(self._context, self._keys, peer, endpoint, _MAX_QUEUED)
            if (old := self._peers.get(peer)) is not None:
                old.close()
            self._peers[peer] = socket

    def _push_late(self, key: Key, header: bytes, payload: bytes) -> None:
        with contextlib.suppress(WireError):  # the peer went while the message was on its way
            self._push(key[0], header, payload)

    def _push(self, peer: str, header: bytes, payload: Payload) -> bool:
        """False: the queue is full."""
        with self._lock:
            socket = self._own if peer == self.name else self._peers.get(peer)
            if socket is None:
                raise WireError(f"{peer} is not connected; connected are {sorted(self._peers)}")
            try:
                socket.send_multipart((header, payload), zmq.NOBLOCK)
            except zmq.Again:
                return False
        return True
