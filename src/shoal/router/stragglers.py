"""Replicas that have been slow for long: told once each, with what was seen.

Knows nothing of what a plan is, or of who makes another one.
"""

from __future__ import annotations

from collections.abc import Mapping

from shoal.core.stats import Lag
from shoal.policy.straggler import Straggler
from shoal.router.events import ReplanNeeded
from shoal.router.records import Replica


class Stragglers:
    """
    Args:
        replicas: the router's.
    """

    def __init__(self, replicas: Mapping[str, Replica]) -> None:
        self._stragglers = {name: Straggler() for name in replicas}
        self._slow: dict[str, None] = {}

    def note(self, replica: str, times: float, now: float) -> None:
        """It lately takes so many times as long as is usual for it."""
        straggler = self._stragglers[replica]
        straggler.note(times, now)
        if straggler.is_slow:
            self._slow[replica] = None
        else:
            self._slow.pop(replica, None)

    def lost(self, replica: str) -> None:
        """What comes in its place is another one."""
        self._stragglers[replica] = Straggler()
        self._slow.pop(replica, None)

    def lasting(self, now: float) -> dict[str, Lag]:
        """Those that are slow, and have been for long."""
        found = {}
        for name in self._slow:
            slowness = self._stragglers[name].lasting(now)
            if slowness is not None:
                found[name] = Lag(slowness.p50, slowness.p95, now - slowness.since_s)
        return found

    def news(self, now: float) -> list[ReplanNeeded]:
        """Those that nobody was told of."""
        found = []
        for name, lag in self.lasting(now).items():
            if not self._stragglers[name].is_told:
                self._stragglers[name].is_told = True
                found.append(ReplanNeeded(name, lag))
        return found
