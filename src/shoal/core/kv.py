"""KV on its way from one set of workers to another: what is offered, and what is to be got.

    lender    KVLoan    these blocks stay as they are until the lease ends
              KVOffer   their names, and which worker has which layers and heads of them
    borrower  KVPull    from whom, and into which blocks of its own

A block's name says what is in it (tokens, weights, precision); a worker's layers and heads say
which part of it lies there. Lender and borrower may be laid out differently. Knows nothing of
requests, sockets or tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

from shoal.core.split import Range


@dataclass(frozen=True, slots=True)
class KVPlace:
    """A worker that KV can be got from.

    Attributes:
        worker: its name among the workers of all replicas.
        address: where it answers.
        instance: of its replica.
        layers, heads: of the model, whose KV it keeps.
    """

    worker: str
    address: str
    instance: int
    layers: Range
    heads: Range


@dataclass(frozen=True, slots=True)
class KVSource:
    """A worker that has some layers and KV heads of the blocks of an offer."""

    worker: str
    address: str
    layers: Range
    heads: Range


@dataclass(frozen=True, slots=True)
class KVOffer:
    """Blocks that are lent, a sequence's first ones in order.

    Attributes:
        lease_id: by which their workers know them.
        digest: of weights, precision and KV type; the names follow from it too.
    """

    lease_id: int
    digest: str
    names: tuple[bytes, ...]
    sources: tuple[KVSource, ...]


@dataclass(frozen=True, slots=True)
class KVHop:
    """Blocks of an instance, and the layers that a route runs there."""

    instance: int
    layers: Range
    block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class KVLoan:
    """Blocks that may be read until the lease ends.

    Attributes:
        num_ready: of each hop, the first ones that are written, and not again; those after them
            still are to be.
    """

    lease_id: int
    hops: tuple[KVHop, ...]
    num_ready: int


@dataclass(frozen=True, slots=True)
class KVPull:
    """Blocks to fill with what a lease has.

    Attributes:
        first: of the lease's blocks; each hop gets as many from there on as it names.
    """

    pull_id: int
    lease_id: int
    first: int
    sources: tuple[KVSource, ...]
    hops: tuple[KVHop, ...]


@dataclass(frozen=True, slots=True)
class KVArrived:
    """A pull is over: of each hop, how many of its blocks are whole, from the first on."""

    pull_id: int
    num_blocks: tuple[int, ...]
