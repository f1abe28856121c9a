"""Messages by which a worker gets KV from another, over authenticated sockets (`wire/mesh.py`).

    borrower → lender   Want      a layer's heads of some blocks of a lease
    lender → borrower   Piece     their bytes, and a checksum of them
                        Lacking   there is no such lease (any more)
                        Later     they are still to be computed; said from time to time
    lender → itself     Look      something was lent: it may be what somebody waits for

Each `Want` has one `Piece` or `Lacking`, so the borrower sets the pace. Knows nothing of what is
in the bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import msgspec

from shoal.core.plan import ReplicaPlan
from shoal.wire.curve import MeshKeys, make_keys


class KVKeys(msgspec.Struct, frozen=True):
    """What the workers of one replica hold to exchange KV with those of all.

    Attributes:
        replica: its name; its workers are called `REPLICA/WORKER`.
        of_worker: by the name within the replica.
    """

    replica: str
    of_worker: dict[str, MeshKeys]


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """Heads `head_start` to `head_stop` of one layer, of blocks `first` to `stop` of a lease."""

    layer: int
    head_start: int
    head_stop: int
    first: int
    stop: int

    def checksum(self, payload: bytes | memoryview) -> bytes:
        """Of the bytes, and of which they are.

        BLAKE2b (RFC 7693), as in block names: 16 bytes, where a CRC misses one damaged piece in
        2**32.
        """
        found = hashlib.blake2b(msgspec.msgpack.encode(self), digest_size=16)
        found.update(payload)
        return found.digest()


class Want(msgspec.Struct, tag=True, frozen=True):
    """`address`: where the answer goes."""

    pull_id: int
    lease_id: int
    part: Part
    address: str


class Piece(msgspec.Struct, tag=True, frozen=True):
    """Goes before the bytes."""

    pull_id: int
    part: Part
    checksum: bytes


class Lacking(msgspec.Struct, tag=True, frozen=True):
    """`first`: of the blocks that were asked for."""

    pull_id: int
    first: int


class Later(msgspec.Struct, tag=True, frozen=True):
    pull_id: int


class Look(msgspec.Struct, tag=True, frozen=True):
    pass


KVMessage = Want | Piece | Lacking | Later | Look


def make_kv_keys(replicas: Mapping[str, ReplicaPlan | None]) -> dict[str, KVKeys]:
    """Fresh keys for all workers of these replicas; None: a replica of one worker."""
    workers = {name: list(_worker_names(plan)) for name, plan in replicas.items()}
    keys = make_keys(f"{name}/{each}" for name, mine in workers.items() for each in mine)
    return {
        name: KVKeys(name, {each: keys[f"{name}/{each}"] for each in mine})
        for name, mine in workers.items()
    }


ONLY_WORKER = "s0.i0.r0"
"""The worker of a replica that runs on one device; named as in a plan."""


def _worker_names(plan: ReplicaPlan | None) -> Iterable[str]:
    if plan is None:
        return (ONLY_WORKER,)
    return (name for i in range(len(plan.instances)) for name in plan.worker_names(i))
