"""Who may speak to whom: a key pair per worker, handed out at launch, and a gate that checks them.

    executor   make_keys(names) → MeshKeys for each worker, over its private control channel
    worker     sockets that listen ask the gate, sockets that connect know whom they expect

Every connection is encrypted and authenticated both ways (CURVE; ZAP, ZeroMQ RFC 26 and 27). A
message's sender is the name that belongs to its key. Knows nothing of what is said.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import zmq
from zmq.utils import z85

from shoal.core.errors import WireError

_DOMAIN = b"shoal"
_GATE = "inproc://zeromq.zap.01"
_HANDSHAKE_MS = 5000
_CONNECT_MS = 1000
_RECONNECT_MS, _RECONNECT_MAX_MS = 50, 500


@dataclass(frozen=True, slots=True)
class MeshKeys:
    """What one worker holds.

    Attributes:
        name: its own.
        secret: its own key, Z85.
        public: keys of all workers by name, its own included.
    """

    name: str
    secret: str = field(repr=False)
    public: Mapping[str, str]


def make_keys(names: Iterable[str]) -> dict[str, MeshKeys]:
    """A fresh key pair for each worker."""
    pairs = {name: zmq.curve_keypair() for name in names}
    public = {name: pair[0].decode() for name, pair in pairs.items()}
    return {name: MeshKeys(name, pair[1].decode(), public) for name, pair in pairs.items()}


def listen(socket: zmq.Socket[bytes], keys: MeshKeys, addresses: Sequence[str]) -> list[str]:
    """Bind to a port of the system's choice on each address; only who passes the gate gets in.

    Returns:
        What others connect to, for each address.

    Raises:
        WireError: no such address here.
    """
    socket.curve_server = True
    socket.curve_secretkey = keys.secret.encode()
    socket.zap_domain = _DOMAIN
    # Without it a socket whose gate is missing would let everybody in.
    socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
    socket.setsockopt(zmq.HANDSHAKE_IVL, _HANDSHAKE_MS)
    return [_bind(socket, address) for address in addresses]


def _bind(socket: zmq.Socket[bytes], address: str) -> str:
    _allow_ipv6(socket, address)
    try:
        socket.bind(f"tcp://[{address}]:*" if ":" in address else f"tcp://{address}:*")
    except zmq.ZMQError as error:
        raise WireError(
            f"cannot listen on {address}: {error}; give an address of an interface of this host"
        ) from error
    return socket.getsockopt_string(zmq.LAST_ENDPOINT)


def connect(
    context: zmq.Context[zmq.Socket[bytes]],
    keys: MeshKeys,
    peer: str,
    endpoint: str,
    max_queued: int,
) -> zmq.Socket[bytes]:
    """A socket that sends to where `peer` listens; anybody else there is refused.

    Args:
        max_queued: messages that wait here.

    Raises:
        WireError: no key for this peer, or no endpoint.
    """
    if peer not in keys.public:
        raise WireError(f"no key for {peer}; there are keys for {sorted(keys.public)}")
    socket = context.socket(zmq.PUSH)
    socket.linger = 0
    socket.sndhwm = max_queued
    socket.curve_serverkey = keys.public[peer].encode()
    socket.curve_publickey = keys.public[keys.name].encode()
    socket.curve_secretkey = keys.secret.encode()
    socket.setsockopt(zmq.HANDSHAKE_IVL, _HANDSHAKE_MS)
    socket.connect_timeout = _CONNECT_MS
    socket.reconnect_ivl, socket.reconnect_ivl_max = _RECONNECT_MS, _RECONNECT_MAX_MS
    _allow_ipv6(socket, endpoint.removeprefix("tcp://").rpartition(":")[0])
    try:
        socket.connect(endpoint)
    except zmq.ZMQError as error:
        socket.close()
        raise WireError(f"{endpoint!r} of {peer} is no endpoint: {error}") from error
    return socket


def sender(frame: zmq.Frame) -> str | None:
    """Whose key a message came with; None: it came from inside this process."""
    try:
        frame.get("Peer-Address")
    except zmq.ZMQError:
        return None
    return str(frame.get("User-Id"))


class Gate:
    """Says of each key that knocks at a context's sockets whose it is, or that it is nobody's.

    Its socket belongs to one thread, which polls it and calls `answer`.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], keys: MeshKeys) -> None:
        self._names = {z85.decode(key.encode()): name for name, key in keys.public.items()}
        self.socket = context.socket(zmq.REP)
        self.socket.linger = 0
        self.socket.bind(_GATE)
        self.num_refused = 0

    def answer(self) -> None:
        version, request, domain, _address, _identity, mechanism, *keys = (
            self.socket.recv_multipart()
        )
        name = self._names.get(keys[0]) if mechanism == b"CURVE" and domain == _DOMAIN else None
        if name is None:
            self.num_refused += 1
        status = (b"400", b"unknown key", b"") if name is None else (b"200", b"", name.encode())
        self.socket.send_multipart([version, request, *status, b""])


def _allow_ipv6(socket: zmq.Socket[bytes], address: str) -> None:
    socket.ipv6 = ":" in address
