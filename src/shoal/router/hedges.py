"""Second attempts of requests: whether one is made, where, and what it costs.

    late, stalled   if another replica could have said the token by now, and the budget allows
    stranded        its replica is in doubt: wherever there is a seat; a stream that has begun after
                    a while, or at once as far as the budget goes

The first attempt goes on, and wins if it says the next token first. What a replica began that
cannot be gone on with elsewhere has no rival. Knows nothing of time going by.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from shoal.core.stats import HedgeStats
from shoal.policy.hedging import (
    KEPT_FOR_HEDGES,
    SURELY_SILENT_S,
    Lateness,
    hedge_budget,
    retry_budget,
)
from shoal.router.attempts import Attempts
from shoal.router.events import Effect, Send
from shoal.router.loads import Loads
from shoal.router.placement import Placement
from shoal.router.records import Attempt, Entry, Replica, can_go_on

_MOST_RIVALS, _TOKENS_PER_RIVAL = 8, 16
"""Of a request: a long stream may have more."""


class Hedges:
    """
    Args:
        is_on: otherwise there are no rivals.
        replicas, attempts, loads, placement: the router's.
        send: to the replica that an attempt is bound to.
    """

    def __init__(
        self,
        is_on: bool,
        replicas: Mapping[str, Replica],
        attempts: Attempts,
        loads: Loads,
        lateness: Lateness,
        placement: Placement,
        send: Callable[[Entry, Attempt, float], Send],
    ) -> None:
        self._is_on = is_on
        self._replicas, self._attempts, self._loads = replicas, attempts, loads
        self._lateness, self._placement = lateness, placement
        self._send = send
        self._budget, self._retries = hedge_budget(), retry_budget()
        self.stats = HedgeStats()

    # --- what happens ---

    def began(self, entry: Entry, attempt: Attempt, num_cached: int | None, now: float) -> None:
        """Its first token came."""
        if attempt.predicted_s is not None:
            self._lateness.note(now - attempt.sent_s, attempt.predicted_s, now)
        if not entry.has_begun:
            self._earn(entry.num_tokens - (num_cached or 0))
            self._retries.earn(1)

    def ended(self, entry: Entry) -> None:
        """It has all its tokens."""
        self._earn(len(entry.output_ids) - len(entry.request.output_ids))

    def won(self, entry: Entry, winner: Attempt, now: float) -> None:
        """One of two attempts said the next token."""
        if winner is entry.rival:
            self.stats.won += 1
            loser = entry.lead
            assert loser is not None, "there is no rival without a lead"
            if loser.first_s is None and loser.predicted_s is not None:
                self._lateness.note(now - loser.sent_s, loser.predicted_s, now)

    def said_in_vain(self, num_tokens: int) -> None:
        """By an attempt that has ended already."""
        self.stats.extra_tokens += num_tokens
        self._budget.charge(num_tokens)

    # --- rivals ---

    def hedge(self, entry: Entry, attempt: Attempt, waited_s: float, now: float) -> list[Effect]:
        """It is late, or stalls; nothing is done if that would not help, or cost too much."""
        if entry.rival is not None or not self._may_have_rival(entry):
            return []
        place = self._place(entry, attempt.replica)
        if place is None or self._placement.predicted_s(entry, place.name) > waited_s:
            return []
        if not self._budget.spend(entry.num_tokens):
            self.stats.unpaid += 1
            return []
        self.stats.hedged += 1
        self.stats.extra_tokens += entry.num_tokens
        return self._start(entry, place, now)

    def rescue(self, entry: Entry, doubted: Attempt, silent_s: float, now: float) -> list[Effect]:
        """Its replica is in doubt, and has been silent for so long."""
        if not self._may_have_rival(entry):
            return []
        place = self._refuge(entry, doubted.replica)
        if place is None or not self._may_rescue(entry, silent_s):
            return []
        self.stats.rescued += 1
        self.stats.rescued_tokens += entry.num_tokens
        effects: list[Effect] = []
        if entry.rival is not None:  # which is in doubt too
            effects += self._attempts.end(entry, entry.rival)
        return [*effects, *self._start(entry, place, now)]

    def _may_rescue(self, entry: Entry, silent_s: float) -> bool:
        """A stream whose replica may just have paused waits a little if it is dear."""
        if entry.has_begun and silent_s < SURELY_SILENT_S:
            return self._budget.spend(entry.num_tokens, leaving=KEPT_FOR_HEDGES)
        # Done in any case, but others may cost the less for it.
        self._budget.charge(entry.num_tokens)
        return True

    def _may_have_rival(self, entry: Entry) -> bool:
        lead = entry.lead
        most = _MOST_RIVALS + len(entry.output_ids) // _TOKENS_PER_RIVAL
        if not self._is_on or lead is None or entry.num_rivals >= most:
            return False
        return self.can_go_on(entry)

    def can_go_on(self, entry: Entry) -> bool:
        """Whether another replica could: what some began nobody can go on with."""
        return can_go_on(entry, self._replicas)

    def may_retry(self, entry: Entry, num_most: int) -> bool:
        """A replica failed at it."""
        if not self.can_go_on(entry) or entry.num_lost + 1 >= num_most:
            return False
        if not self._retries.spend(1):
            return False
        self.stats.retried += 1
        return True

    def _place(self, entry: Entry, replica: str) -> Replica | None:
        """Another one with a seat that is free."""
        taken = {replica, *entry.failed_at, *(each.replica for each in entry.attempts)}
        place = self._placement.choose(entry, taken)
        if place is None or place.info is None or place.is_drained or place.allowance is not None:
            return None
        return place if self._loads.of(place.name) < place.info.max_num_seqs else None

    def _refuge(self, entry: Entry, replica: str) -> Replica | None:
        """The same, but one that was tried since it was in doubt is good enough."""
        taken = {replica, *(each.replica for each in entry.attempts)}
        place = self._placement.choose(entry, taken)
        if place is not None and not place.is_sound:
            taken |= {each.name for each in self._replicas.values() if not each.is_sound}
            place = self._placement.choose(entry, taken)
        if place is None or place.info is None or place.is_drained:
            return None
        return place if self._loads.of(place.name) < place.info.max_num_seqs else None

    def _start(self, entry: Entry, place: Replica, now: float) -> list[Effect]:
        entry.num_rivals += 1
        entry.rival = self._attempts.bind(entry, place.name)
        return [self._send(entry, entry.rival, now)]

    def _earn(self, num_tokens: int) -> None:
        self.stats.computed_tokens += num_tokens
        self._budget.earn(num_tokens)
