"""Whether Steps stay away though all workers are alive: a message was lost, say.

    none comes                 for so long, of any route
    those of one route do not  for as many times as long as there are routes under way: they take
                               turns where they share instances

Told the time; knows nothing of workers.
"""

from __future__ import annotations

import math


class Overdue:
    """Follows Steps that were handed out.

    Args:
        limit_s: that one may take.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._submitted: dict[int, tuple[int, float]] = {}
        self._came_s: dict[int, float] = {}

    def handed_out(self, step_id: int, route: int, now: float) -> None:
        self._submitted[step_id] = route, now

    def came(self, step_id: int, now: float) -> None:
        if (found := self._submitted.pop(step_id, None)) is not None:
            self._came_s[found[0]] = now

    def forget(self) -> None:
        """None of them will come."""
        self._submitted.clear()

    def is_late(self, now: float) -> bool:
        """Whether one is not worth waiting for any more."""
        if not self._submitted:
            return False
        oldest: dict[int, float] = {}
        for route, at_s in self._submitted.values():
            oldest.setdefault(route, at_s)
        last_s = max(self._came_s.values(), default=-math.inf)
        if now - max(last_s, min(oldest.values())) > self._limit_s:
            return True
        waits = (now - max(at, self._came_s.get(route, at)) for route, at in oldest.items())
        return max(waits) > self._limit_s * len(oldest)
