"""What is to be looked at, and when. Knows nothing of what it is."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Literal

Kind = Literal["late", "silent", "outrun", "trial"]
"""An attempt that says nothing; a replica that says nothing, one that lost a race, one that may be
tried again."""


class Alarms:
    """
    Args:
        is_wanted: whether a look is still worth it, by kind and name.
    """

    def __init__(self, is_wanted: Callable[[Kind, str], bool]) -> None:
        self._is_wanted = is_wanted
        self._heap: list[tuple[float, int, Kind, str]] = []
        self._num_set = 0

    def set(self, when: float, kind: Kind, name: str) -> None:
        self._num_set += 1
        heapq.heappush(self._heap, (when, self._num_set, kind, name))

    @property
    def next_s(self) -> float | None:
        """When there is something to look at."""
        heap = self._heap
        while heap and not self._is_wanted(heap[0][2], heap[0][3]):
            heapq.heappop(heap)
        return heap[0][0] if heap else None

    def names_due(self, now: float, *kinds: Kind) -> list[str]:
        """Of some kinds, by now."""
        found, places = [], [0]
        while places:
            place = places.pop()
            if place < len(self._heap) and self._heap[place][0] <= now:
                if self._heap[place][2] in kinds:
                    found.append(self._heap[place][3])
                places += [2 * place + 1, 2 * place + 2]
        return found

    def due(self, now: float) -> list[tuple[Kind, str]]:
        """What is to be looked at by now, in order."""
        found = []
        while self._heap and self._heap[0][0] <= now:
            _, _, kind, name = heapq.heappop(self._heap)
            if self._is_wanted(kind, name):
                found.append((kind, name))
        return found
