"""Which replicas have computed how much of a prompt, as far as can be told from what was routed.

    token     0    64   128  ...  512       768      1024
    granule   └ g0 ┴ g1 ┴    ...   ┴   g8    ┴   g9   ┴      each named by all up to its end

One index of all replicas: a granule's name tells who has it, as bits, so that a fleet of a
thousand costs as much as one of three. Short granules first, where prompts are alike most often.
It is a guess: who is asked for KV answers by blocks (`router/prefixes.py`). Each replica is
remembered with as much as it has room for, the latest; what was found again stays for longer.
Knows nothing of loads or of time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from shoal.policy.routing.fleet import Floats

Granules = list[tuple[int, int]]
"""Name and end of each, from the first on."""

_SHORT, _LONG, _FIRST_LONG = 64, 256, 512
_MOST_GRANULES = 1 << 18
"""Of all replicas together; about 60 MB."""
_FEWEST_GRANULES = 64
_MOST_LEVELS = 8
"""Different lengths that are told apart among those that have some."""


@dataclass(slots=True)
class _Kept:
    """Of a replica: its granules, the oldest first, and those found again since they came."""

    room: int = _FEWEST_GRANULES
    names: deque[int] = field(default_factory=deque)
    again: set[int] = field(default_factory=set)


class PrefixIndex:
    """Of so many replicas, known by number."""

    def __init__(self, num_replicas: int) -> None:
        self._num_replicas = num_replicas
        self._num_bytes = -(-num_replicas // 8)
        self._most = max(_MOST_GRANULES // max(num_replicas, 1), _FEWEST_GRANULES)
        self._holders: dict[int, int] = {}
        self._kept = [_Kept() for _ in range(num_replicas)]

    def make_room(self, replica: int, num_tokens: int) -> None:
        """It remembers so many tokens."""
        self._kept[replica].room = min(max(num_tokens // _SHORT, 1), self._most)

    def cached(
        self, tokens: Sequence[int], salt: str, known: Granules | None = None
    ) -> Floats | None:
        """Of each replica, how many tokens of a prompt's beginning it has; None: nobody has any.

        Args:
            known: granules of these tokens that were named before; those named now are added.
        """
        if not self._holders:
            return None
        found: Floats | None = None
        holders, num_levels, length = -1, 0, 0
        for name, end in _granules(tokens, salt, known):
            still = holders & self._holders.get(name, 0)
            if still != holders:
                if length:
                    found = self._noted(found, holders, length)
                    num_levels += 1
                holders = still
            if not holders or num_levels == _MOST_LEVELS:
                return found
            length = end
        return self._noted(found, holders, length) if length else found

    def note(
        self, replica: int, tokens: Sequence[int], salt: str, known: Granules | None = None
    ) -> None:
        """A replica will have computed these; `known` as in `cached`."""
        kept, bit = self._kept[replica], 1 << replica
        for name, _ in _granules(tokens, salt, known):
            holders = self._holders.get(name, 0)
            if holders & bit:
                kept.again.add(name)
            else:
                self._holders[name] = holders | bit
                kept.names.append(name)
        while len(kept.names) > kept.room:
            self._drop_oldest(kept, bit)

    def forget(self, replica: int) -> None:
        """It is gone, with all it had."""
        kept = self._kept[replica]
        for name in kept.names:
            self._take_from(name, 1 << replica)
        kept.names.clear()
        kept.again.clear()

    def _drop_oldest(self, kept: _Kept, bit: int) -> None:
        name = kept.names.popleft()
        if name in kept.again:
            kept.again.remove(name)
            kept.names.append(name)
        else:
            self._take_from(name, bit)

    def _take_from(self, name: int, bit: int) -> None:
        holders = self._holders[name] & ~bit
        if holders:
            self._holders[name] = holders
        else:
            del self._holders[name]

    def _noted(self, found: Floats | None, holders: int, length: int) -> Floats:
        found = np.zeros(self._num_replicas) if found is None else found
        packed = np.frombuffer(holders.to_bytes(self._num_bytes, "little"), dtype=np.uint8)
        bits = np.unpackbits(packed, count=self._num_replicas, bitorder="little")
        found[bits.view(bool)] = length
        return found


def _granules(
    tokens: Sequence[int], salt: str, known: Granules | None
) -> Iterator[tuple[int, int]]:
    """Name and end of each, as asked for: most prompts are like no other from the first on."""
    known = [] if known is None else known
    yield from known
    # Python's own: of integers as good as any, and a few times faster than named blocks. That of
    # a text differs from process to process, so nobody can make tenants' prompts seem alike.
    name, start = known[-1] if known else (hash(salt), 0)
    while (end := start + (_SHORT if start < _FIRST_LONG else _LONG)) <= len(tokens):
        name = hash((name, tuple(tokens[start:end])))
        known.append((name, end))
        yield name, end
        start = end
