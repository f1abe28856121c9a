"""What a worker lends of its KV, and who waits for what of it.

    Want of blocks that are ready     answered at once
            of blocks still to come   stands here: sent the moment they are computed
            of a lease not known yet  stands for a moment: its order comes by another way
            of anything else          Lacking

So a borrower that asks ahead has KV pushed to it, as fast as it takes it: what it asked for is its
credit. Answers are given by one thread; leases come and go from others. Knows nothing of where
requests are.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from shoal.wire.kv_messages import KVMessage, Lacking, Later, Piece, Want
from shoal.wire.worker_messages import LendBlocks
from shoal.worker.kv_bytes import KVBytes

_MAX_PIECE_BYTES = 16 << 20
_MAX_STANDING = 4096
_EARLY_S = 0.5
_SAY_LATER_EVERY_S = 0.5

Send = Callable[[str, str, KVMessage, bytes], None]
"""To a peer, at an address: a message, and the bytes that go with it."""


@dataclass(slots=True)
class _Standing:
    """
    Attributes:
        until: then it is answered, if its lease is not known by then.
        said_s: when its borrower was last told something.
    """

    sender: str
    want: Want
    until: float
    said_s: float


class Lender:
    """One worker's."""

    def __init__(self, kv: KVBytes, send: Send) -> None:
        self._kv = kv
        self._send = send
        self._lock = threading.Lock()  # of all below
        self._leases: dict[int, LendBlocks] = {}
        self._standing: list[_Standing] = []

    def lend(self, order: LendBlocks) -> bool:
        """Let blocks be read from now on; from any thread. Whether somebody waits for some."""
        with self._lock:
            self._leases[order.lease_id] = order
            return bool(self._standing)

    def end(self, lease_id: int) -> None:
        # Whoever reads holds the lock: after this nobody does.
        with self._lock:
            self._leases.pop(lease_id, None)

    def answer(self, sender: str, want: Want, now: float) -> None:
        """At once, or as soon as there is an answer."""
        self._try(_Standing(sender, want, now + _EARLY_S, now), now)

    def look(self, now: float) -> None:
        """Answer what waited for what is there now."""
        with self._lock:
            standing, self._standing = self._standing, []
        waiting: dict[tuple[str, int], Want] = {}
        for each in standing:
            if not self._try(each, now) and now - each.said_s >= _SAY_LATER_EVERY_S:
                each.said_s = now
                waiting[each.sender, each.want.pull_id] = each.want
        for (sender, pull_id), want in waiting.items():
            self._send(sender, want.address, Later(pull_id), b"")

    def _try(self, each: _Standing, now: float) -> bool:
        """Answer it, or let it stand; whether it is answered."""
        want, payload = each.want, b""
        with self._lock:
            state = self._state(want)
            if state == "unknown" and now >= each.until:
                state = "lacking"
            if state in ("unknown", "coming"):
                if len(self._standing) < _MAX_STANDING:
                    self._standing.append(each)
                    return False
                state = "lacking"
            if state == "ready":
                part = want.part
                blocks = self._leases[want.lease_id].block_ids[part.first : part.stop]
                payload = self._kv.read(part, blocks)
        if state == "lacking":
            self._send(each.sender, want.address, Lacking(want.pull_id, want.part.first), b"")
        else:
            piece = Piece(want.pull_id, want.part, want.part.checksum(payload))
            self._send(each.sender, want.address, piece, payload)
        return True

    def _state(self, want: Want) -> Literal["ready", "coming", "unknown", "lacking"]:
        part, lease = want.part, self._leases.get(want.lease_id)
        if lease is None:
            return "unknown"
        is_lent = 0 <= part.first < part.stop <= len(lease.block_ids) and self._kv.has(part)
        if not is_lent:
            return "lacking"
        if part.stop - part.first > 1 and self._kv.size(part) > _MAX_PIECE_BYTES:
            return "lacking"
        return "ready" if part.stop <= lease.num_ready else "coming"
