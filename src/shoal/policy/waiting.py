"""Whether KV that lies elsewhere is worth waiting for, or is sooner computed.

    computing   blocks x 16 tokens x seconds a token of a prompt takes
    getting     a round trip + blocks x bytes / bandwidth

It is waited for if getting takes half as long at most (what is known of both is rough), and never
longer than computing would take. Knows nothing of who has it.
"""

from __future__ import annotations

from dataclasses import dataclass

from shoal.core.step import BLOCK_SIZE

FIRST_BANDWIDTH_BYTES_PER_S = 125e6
"""Of a link that nothing was seen on: 1 Gbit/s, what most networks have at least."""

_ROUND_TRIP_S = 0.01
_MARGIN = 2.0
_NEWEST_SHARE = 0.3
_SHORT_S = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """
    Attributes:
        num_blocks: that are elsewhere, and not where they are wanted.
        block_bytes: of each.
        bandwidth_bytes_per_s: from there to here.
        token_s: that computing a token of a prompt takes here.
    """

    num_blocks: int
    block_bytes: int
    bandwidth_bytes_per_s: float
    token_s: float

    @property
    def computing_s(self) -> float:
        return self.num_blocks * BLOCK_SIZE * self.token_s

    @property
    def getting_s(self) -> float:
        return _ROUND_TRIP_S + self.num_blocks * self.block_bytes / self.bandwidth_bytes_per_s

    @property
    def pays(self) -> bool:
        return self.getting_s * _MARGIN <= self.computing_s


def updated(known: float | None, seen: float) -> float:
    """An average in which what was seen last counts most."""
    return seen if known is None else known + _NEWEST_SHARE * (seen - known)


def bandwidth(num_bytes: int, seconds: float) -> float:
    """Bytes per second that a transfer had, its round trip left out."""
    return num_bytes / max(seconds - _ROUND_TRIP_S, _SHORT_S)
