"""What routing policies see: the fleet as arrays, a number for each replica, and the request.

A decision is then one pass over the fleet, whatever its size; a replica's numbers are worked out
when something happens to it (`standing.py`). Knows nothing of names or of events.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum, auto

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Numbers = NDArray[np.int64]

FEW = 8
"""Replicas that are looked at one by one: an array of a few costs more than its numbers."""


class Row(IntEnum):
    """Of the table: what is known of each replica. Seconds, unless it says otherwise.

    A request there gets its first token after what waits there (until FREE), FIXED, PER_TOKEN and
    PER_PAIR for what is to be computed of it, and WAIT for a seat; where the KV of its tokens does
    not fit into ROOM, PER_MISSING for each. SINCE then the oldest prompt was due, and every
    1 / DUE that went by since is as long as that should have taken. Its other tokens come every
    GAP, longer by GAP_PER_TOKEN of its own. HARM is what those that are there lose, as a sum of
    shares of their targets: in any case, by a token of the request's, by a second that computing
    its prompt takes, and by the square of that, of those that will come meanwhile. A PROBE is worth
    while from then on. So far, all follows from how a replica stands (`Standing.column`).

    NUM requests are there or are about to be; SENT were, since the fleet changed. WEIGHT says how
    many requests a second it takes, about.
    """

    FREE = 0
    FIXED = auto()
    PER_TOKEN = auto()
    PER_PAIR = auto()
    WAIT = auto()
    ROOM = auto()
    PER_MISSING = auto()
    SINCE = auto()
    DUE = auto()
    GAP = auto()
    GAP_PER_TOKEN = auto()
    HARM = auto()
    HARM_PER_TOKEN = auto()
    HARM_PER_SECOND = auto()
    HARM_PER_SQUARE = auto()
    PROBE = auto()
    NUM = auto()
    SENT = auto()
    WEIGHT = auto()


@dataclass(frozen=True, slots=True)
class Ask:
    """A request to be placed.

    Attributes:
        num_tokens: known of it: all are computed, but for those that are `cached`: of each replica,
            how many it has; None: nobody has any.
        output_tokens: expected, still to come.
    """

    num_tokens: int
    output_tokens: float
    cached: Floats | None = None


@dataclass(slots=True)
class Fleet:
    """
    Attributes:
        table: a `Row` for each fact, a column for each replica; `rows`: the same, one by one.
        target_ttft_s, target_tpot_s: latencies to keep.
        num_decided: requests that were placed; `num_at_probe`: when one was last sent to who looked
            bad.
    """

    num_replicas: int
    target_ttft_s: float = 1.0
    target_tpot_s: float = 0.1
    num_decided: int = 0
    num_at_probe: int = 0
    table: Floats = field(init=False)
    rows: list[Floats] = field(init=False)

    def __post_init__(self) -> None:
        self.table = np.zeros((len(Row), self.num_replicas))
        self.table[Row.PROBE] = np.inf
        self.table[Row.WEIGHT] = 1.0
        self.rows = list(self.table)
