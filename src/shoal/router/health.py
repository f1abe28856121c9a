"""Which replicas are believed in: silence and failures against them, answers for them.

    silent    has begun requests, and says nothing for much longer than a Step should take; or has
              none that has begun, and the first token that is due first is long overdue
    failing   fails requests in a row, or is lost again and again

Who is in doubt gets no requests, then one, then more by and by (`policy/breaker.py`). A router that
slept itself doubts nobody: it has not listened. Knows nothing of what becomes of requests.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import median

from shoal.core.request import Output
from shoal.policy.breaker import RECOVERED, Breaker
from shoal.policy.hedging import LEAST_SILENCE_S, Lateness, hushed_after_s, silent_after_s
from shoal.router.loads import Loads
from shoal.router.records import Attempt, Replica

_SLEPT_S = 1.0


class Health:
    """
    Args:
        replicas, loads: the router's.
        lateness: of first tokens, as of late.

    Attributes:
        awake_s: since when the router has listened all the time.
    """

    def __init__(self, replicas: Mapping[str, Replica], loads: Loads, lateness: Lateness) -> None:
        self._replicas, self._loads, self._lateness = replicas, loads, lateness
        self._breakers = {name: Breaker() for name in replicas}
        self._heard_s = dict.fromkeys(replicas, 0.0)
        self._limited: dict[str, None] = {}  # who may not have as many requests as it takes
        self.awake_s = self._looked_s = 0.0

    def is_in_doubt(self, replica: str) -> bool:
        return self._breakers[replica].is_open

    def ends_s(self, replica: str) -> float:
        """When one in doubt may be tried again."""
        return self._breakers[replica].ends_s

    def wants_trial(self) -> str | None:
        """A replica that a new request should go to, to see whether it answers."""
        for name in self._limited:
            replica = self._loads.taking(name, has_begun=False)
            if replica is None or replica.is_stuck or replica.outstanding:
                continue
            if replica.allowance in (1, RECOVERED):
                return name
        return None

    def silence_s(self, replica: str, now: float) -> float:
        """That was listened to."""
        return now - max(self._heard_s[replica], self.awake_s)

    def has_not_spoken_since(self, replica: str, when: float) -> bool:
        return self._heard_s[replica] <= when

    # --- what happens ---

    def looked(self, now: float) -> bool:
        """Time went by; whether that took so long that nobody was listened to meanwhile."""
        has_slept = now - self._looked_s > _SLEPT_S
        if has_slept:
            self.awake_s = now
        self._looked_s = now
        return has_slept

    def heard(self, replica: str, now: float) -> None:
        self._heard_s[replica] = now

    def said(self, replica: str, outputs: Sequence[Output], now: float) -> None:
        """That a request is cancelled takes no worker."""
        if any(each.finish != "cancelled" for each in outputs):
            self.heard(replica, now)

    def look(self, replica: str) -> None:
        """Whether one in doubt has spoken since."""
        breaker = self._breakers[replica]
        has_spoken = self._heard_s[replica] > breaker.tripped_s
        if breaker.is_open and has_spoken and not self._replicas[replica].is_stuck:
            breaker.spoke()
            self._allow(replica)

    def answered(self, replica: str) -> None:
        """It said the first token of a request."""
        breaker = self._breakers[replica]
        breaker.answered()
        if breaker.allowance != self._replicas[replica].allowance:
            self._allow(replica)

    def ended(self, replica: str) -> None:
        """It said all of a request."""
        self._breakers[replica].ended()

    def failed(self, replica: str, now: float) -> bool:
        """At a request, or it was lost; whether it is in doubt for it from now on."""
        return self._changed(replica, self._breakers[replica].failed(now))

    def refused(self, replica: str, now: float) -> bool:
        """A request, as it has too much to do; whether it is left alone for it from now on."""
        return self._changed(replica, self._breakers[replica].refused(now))

    def doubt(self, replica: str, now: float) -> None:
        """It is silent."""
        self._breakers[replica].trip(now)
        self._allow(replica)

    def recovered(self, replica: str) -> None:
        """It said itself that it can go on."""
        self._breakers[replica].recovered()
        self._allow(replica)

    def believe_who_answered(self) -> None:
        """Another one is gone: those that came back since are needed, all of them."""
        for name in list(self._limited):
            if self._breakers[name].has_answered:
                self._breakers[name].close()
                self._allow(name)

    def may_be_tried(self, replica: str, now: float) -> float | None:
        """It is, unless it is too early; then, when."""
        breaker = self._breakers[replica]
        if breaker.look(now):
            self._allow(replica)
        return breaker.ends_s if breaker.is_open else None

    # --- silence ---

    def hushed_at(self, replica: str, attempts: Iterable[Attempt], step_s: float) -> float | None:
        """When it will have said nothing of its streams for longer than it should; None: it has
        none.

        Args:
            attempts, step_s: as of `silent_at`.
        """
        gaps_s = [mean_gap_s(each) for each in attempts if each.first_s is not None]
        if not gaps_s:
            return None
        heard_s = max(self._heard_s[replica], self.awake_s)
        return heard_s + hushed_after_s(median(gaps_s), step_s)

    def silent_at(self, replica: str, attempts: Iterable[Attempt], step_s: float) -> float | None:
        """When it will have been silent for too long; None: it has nothing to say.

        Args:
            attempts: that are there and tell their progress.
            step_s: of a Step there at most.
        """
        heard_s = max(self._heard_s[replica], self.awake_s)
        expected: list[float] = []
        gaps_s: list[float] = []
        for each in attempts:
            if each.first_s is None:
                due_s = each.sent_s + self._lateness.patience_s(each.predicted_s)
                expected.append(max(due_s, heard_s) + LEAST_SILENCE_S)
            else:
                gaps_s.append(mean_gap_s(each))
        if gaps_s:
            return heard_s + silent_after_s(median(gaps_s), step_s)
        return min(expected, default=None)

    def _changed(self, replica: str, has_changed: bool) -> bool:
        if has_changed:
            self._allow(replica)
        return has_changed

    def _allow(self, replica: str) -> None:
        allowance = self._breakers[replica].allowance
        self._loads.allow(replica, allowance)
        if allowance is None:
            self._limited.pop(replica, None)
        else:
            self._limited[replica] = None


def mean_gap_s(attempt: Attempt) -> float:
    """Between two tokens that it said."""
    if attempt.first_s is None or attempt.heard_s is None or attempt.num_said < 2:
        return 0.0
    return (attempt.heard_s - attempt.first_s) / (attempt.num_said - 1)
