"""What an executor and the agent of one of its remote workers say to each other, over a mesh.

    executor ── (DATA, bytes of a stream) ──► agent ── socket pair ──► worker
             ── (KILL) ──►
    executor ◄── (DATA, bytes) ── agent ◄── socket pair ── worker
             ◄── (ENDED, how) ──

Every message is numbered, so that a loss is noticed: a stream that lacks bytes is over. Knows
nothing of what the bytes mean.
"""

from __future__ import annotations

import struct
from enum import IntEnum

from shoal.core.errors import WireError
from shoal.wire.mesh import Mesh, Payload

EXECUTOR = "executor"
"""Its name, as agents know it."""

SILENCE_S = 2.0
"""A peer that was not heard for so long is taken for gone: it says something every 0.25 s."""

_HEADER = struct.Struct("<BQ")


class Kind(IntEnum):
    DATA, KILL, ENDED = range(3)


class AgentLink:
    """One end. `send` may be called from any thread, the rest belongs to one.

    Args:
        mesh: connected to the peer; this object's to close.
    """

    def __init__(self, mesh: Mesh, peer: str) -> None:
        self._mesh = mesh
        self._peer = peer
        self._num_sent = 0
        self._num_received = 0

    @property
    def silent_s(self) -> float:
        """Since anything came from the peer."""
        return self._mesh.heard(self._peer)

    def send(self, kind: Kind, payload: Payload = b"") -> None:
        """From one thread at a time.

        Raises:
            WireError: it does not take its messages.
        """
        self._mesh.send(self._peer, _HEADER.pack(kind, self._num_sent), payload)
        self._num_sent += 1

    def receive(self, timeout_s: float) -> tuple[Kind, memoryview] | None:
        """The next message; None: none came in time.

        Raises:
            WireError: one was lost, or is none of ours.
        """
        arrived = self._mesh.receive(timeout_s)
        if arrived is None:
            return None
        sender, header, payload = arrived
        if sender != self._peer or len(header) != _HEADER.size:
            raise WireError(f"{sender} sent what is no message of {self._peer}")
        kind, number = _HEADER.unpack(header)
        if number != self._num_received or kind not in iter(Kind):
            raise WireError(
                f"{self._peer} sent message {number} of kind {kind}; {self._num_received} was due"
            )
        self._num_received += 1
        return Kind(kind), payload

    def close(self) -> None:
        self._mesh.close()
