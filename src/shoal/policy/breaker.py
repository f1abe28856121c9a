"""Whether a replica is given requests: a circuit breaker that closes by and by.

    closed ── failures in a row, or a silence ─► open ── after a while ─► one request, to try it
      ▲                                            ▲                          │
      └── 2, 4, ... 32 requests at once ◄──────────┼──────── it answers ──────┤
                                                   └─ twice as long ── or not ┘

Told the time; knows nothing of replicas.
"""

from __future__ import annotations

import math

_FIRST_OPEN_S, _LONGEST_OPEN_S = 1.0, 30.0
_FAILURES = 3
_ENOUGH = 32
RECOVERED = 2
"""Requests that one may have at once which says itself that it works again."""
_CALM_S = 30.0


class Breaker:
    """
    Attributes:
        allowance: requests that it may have; 0: it is open, None: it is closed.
        tripped_s: when it opened last; ends_s: when it may be tried.
    """

    __slots__ = ("_num_failures", "_open_s", "allowance", "ends_s", "tripped_s")

    def __init__(self) -> None:
        self.allowance: int | None = None
        self.ends_s = 0.0
        self._open_s = _FIRST_OPEN_S
        self.tripped_s = -math.inf
        self._num_failures = 0

    @property
    def is_open(self) -> bool:
        return self.allowance == 0

    def failed(self, now: float) -> bool:
        """One request did; whether that opens it."""
        self._num_failures += 1
        is_tried = self.allowance is not None
        if not self.is_open and (is_tried or self._num_failures >= _FAILURES):
            self.trip(now)
            return True
        return False

    def refused(self, now: float) -> bool:
        """It has too much to do; whether that opens it: who is tried would be sent all that comes,
        one by one."""
        is_tried = self.allowance in (1, RECOVERED)
        if is_tried:
            self.trip(now)
        return is_tried

    def trip(self, now: float) -> None:
        """It opens: for longer than the last time, unless that was long ago."""
        if now - self.tripped_s > self._open_s + _CALM_S:
            self._open_s = _FIRST_OPEN_S
        else:
            self._open_s = min(2 * self._open_s, _LONGEST_OPEN_S)
        self.allowance, self.tripped_s = 0, now
        self.ends_s = now + self._open_s

    def look(self, now: float) -> bool:
        """Whether it may be tried again from now on."""
        if self.is_open and now >= self.ends_s:
            self.allowance = 1
            return True
        return False

    def spoke(self) -> None:
        """It still works on what it had."""
        if self.is_open:
            self.allowance = 1

    def recovered(self) -> None:
        """It said itself that it works again."""
        if self.is_open:
            self.allowance = RECOVERED

    @property
    def has_answered(self) -> bool:
        """It is not trusted yet, but it was tried, or said that it works."""
        return self.allowance is not None and self.allowance >= RECOVERED

    def close(self) -> None:
        """It is trusted, as if nothing had been."""
        self.allowance, self._num_failures = None, 0

    def ended(self) -> None:
        """A request got all of its tokens: one that breaks off all it begins fails all the same."""
        self._num_failures = 0

    def answered(self) -> None:
        """A request got its first token."""
        if self.allowance is not None:
            self.allowance = max(2 * self.allowance, 1)
            if self.allowance > _ENOUGH:
                self.close()
