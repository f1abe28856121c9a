"""What a server of shoal adds to its model's card in /v1/models, for a router in front of it."""

from __future__ import annotations

from msgspec import Struct


class ShoalCard(Struct, frozen=True, kw_only=True):
    """
    Attributes:
        continuation: servers that say the same can go on with each other's streams.
        max_num_seqs, num_kv_blocks: of all its replicas together.
    """

    continuation: str
    max_num_seqs: int
    num_kv_blocks: int
