"""Messages among the workers of a replica, over authenticated sockets (`wire/mesh.py`).

Knows nothing of sockets.
"""

from __future__ import annotations

import msgspec

from shoal.core.options import LinkFormat


class Activations(msgspec.Struct, tag=True, frozen=True):
    """Goes before the bytes of a Step's hidden states [num_tokens, hidden size].

    Attributes:
        dtype: as they were computed.
        form: as they are sent.
    """

    incarnation: int
    step_id: int
    num_tokens: int
    dtype: str
    form: LinkFormat = "exact"


class Tokens(msgspec.Struct, tag=True, frozen=True):
    """What a Step sampled, row by row; -1: that row did not."""

    incarnation: int
    step_id: int
    token_ids: tuple[int, ...]


class Go(msgspec.Struct, tag=True, frozen=True):
    """The Step that the ranks of an instance run next."""

    incarnation: int
    step_id: int


PeerMessage = Activations | Tokens | Go
