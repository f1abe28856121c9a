"""Second attempts of requests: whether one is made, where, and what it costs.

    late, stalled   if another replica could have said the token by now, or the whole answer, and
                    the budget allows; not without hedging
    stranded        its replica is in doubt: wherever there is a seat; a stream that has begun after
                    a while, or at once as far as the budget goes; without hedging all after a while

The first attempt goes on, and wins if it says the next token first. What a replica began that
cannot be gone on with elsewhere has no rival. Also counts what retries cost. Knows nothing of time
going by.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from shoal.core.stats import HedgeStats
from shoal.policy.hedging import (
    KEPT_FOR_FAILURES,
    KEPT_FOR_HEDGES,
    Lateness,
    Patience,
    hedge_budget,
    rescue_budget,
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
        is_on: otherwise there are no rivals for speed.
        replicas, attempts, loads, placement: the router's.
        send: to the replica that an attempt is bound to.
    """

    def __init__(
        self,
        is_on: bool,
        replicas: Mapping[str, Replica],
        attempts: Attempts,
        loads: Loads,
        patience: Patience,
        placement: Placement,
        send: Callable[[Entry, Attempt, float], Send],
    ) -> None:
        self._is_on = is_on
        self._replicas, self._attempts, self._loads = replicas, attempts, loads
        self._patience, self._placement = patience, placement
        self._send = send
        self._budget, self._retries = hedge_budget(), retry_budget()
        self._rescues = rescue_budget()
        self.stats = HedgeStats()

    # --- what happens ---

    def began(self, entry: Entry, attempt: Attempt, num_cached: int | None, now: float) -> None:
        """Its first token came, or all of it."""
        if attempt.predicted_s is not None:
            self._lateness(entry).note(now - attempt.sent_s, attempt.predicted_s, now)
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
                self._lateness(entry).note(now - loser.sent_s, loser.predicted_s, now)

    def said_in_vain(self, num_tokens: int) -> None:
        """By an attempt that has ended already."""
        self.stats.extra_tokens += num_tokens
        self._budget.charge(num_tokens)

    def retry(self, *, is_free: bool, is_refusal: bool) -> bool:
        """Whether a request is sent to another replica than the one that failed at it.

        Args:
            is_refusal: which only had too much to do.
        """
        leaving = KEPT_FOR_FAILURES if is_refusal else 0.0
        may_retry = is_free or self._retries.spend(1, leaving)
        self.stats.retried += may_retry
        return may_retry

    # --- rivals ---

    def hedge(self, entry: Entry, attempt: Attempt, waited_s: float, now: float) -> list[Effect]:
        """It is late, or stalls; nothing is done if that would not help, or cost too much."""
        if not self._is_on or entry.rival is not None or not self._may_have_rival(entry):
            return []
        place = self._place(entry, attempt.replica)
        if place is None or self._expected_s(entry, place) > waited_s:
            return []
        num_tokens, leaving = entry.num_tokens, 0.0
        if not entry.request.tells_progress:
            # All of one of the two answers is for nothing, and nobody reads it meanwhile.
            num_tokens += round(self._placement.output_of(entry.request))
            leaving = KEPT_FOR_HEDGES
        if not self._budget.spend(num_tokens, leaving):
            self.stats.unpaid += 1
            return []
        self.stats.hedged += 1
        self.stats.extra_tokens += num_tokens
        return self._start(entry, place, now)

    def rescue(
        self, entry: Entry, doubted: Attempt, now: float, *, is_surely_gone: bool
    ) -> list[Effect]:
        """Its replica is in doubt; `is_surely_gone`: for so long that it does not just pause."""
        if not self._may_have_rival(entry):
            return []
        place = self._refuge(entry, doubted.replica)
        if place is None or not self._may_rescue(entry, is_surely_gone):
            return []
        self.stats.rescued += 1
        self.stats.rescued_tokens += entry.num_tokens
        effects: list[Effect] = []
        if entry.rival is not None:  # which is in doubt too
            effects += self._attempts.end(entry, entry.rival)
        return [*effects, *self._start(entry, place, now)]

    def _may_rescue(self, entry: Entry, is_surely_gone: bool) -> bool:
        """A stream whose replica may just have paused waits a little if it is dear."""
        if not self._is_on and not is_surely_gone:
            return False
        num_tokens = entry.num_tokens
        if entry.has_begun and not is_surely_gone:
            is_paid = self._rescues.has(num_tokens) and self._budget.spend(
                num_tokens, leaving=KEPT_FOR_HEDGES
            )
            return is_paid and self._rescues.spend(num_tokens)
        # Done in any case, but others may cost the less for it.
        self._budget.charge(num_tokens)
        return True

    def _may_have_rival(self, entry: Entry) -> bool:
        lead = entry.lead
        most = _MOST_RIVALS + len(entry.output_ids) // _TOKENS_PER_RIVAL
        if lead is None or entry.num_rivals >= most:
            return False
        return can_go_on(entry, self._replicas)

    def _lateness(self, entry: Entry) -> Lateness:
        return self._patience.of(tells_progress=entry.request.tells_progress)

    def _expected_s(self, entry: Entry, place: Replica) -> float:
        """Until it says something there."""
        predicted_s = self._placement.predicted_s(entry, place.name)
        if entry.request.tells_progress:
            return predicted_s
        # From whole answers no replica's speed is learned: only how all of them come.
        answers = self._patience.answers
        return answers.usually_s(predicted_s) if answers.is_known else math.inf

    def _place(self, entry: Entry, replica: str) -> Replica | None:
        """Another one that is trusted, with a seat that is free, where the token comes first."""
        taken = {replica, *entry.failed_at, *(each.replica for each in entry.attempts)}
        return self._soonest(
            entry, taken, lambda each: each.allowance is None and self._has_seat(each)
        )

    def _refuge(self, entry: Entry, replica: str) -> Replica | None:
        """The same, but one that was tried since it was in doubt is good enough."""
        taken = {replica, *(each.replica for each in entry.attempts)}
        return self._soonest(entry, taken, lambda each: each.is_sound and self._has_seat(each))

    def _soonest(
        self, entry: Entry, taken: set[str], is_fit: Callable[[Replica], bool]
    ) -> Replica | None:
        place = self._placement.soonest(entry, taken)
        if place is not None and not is_fit(place):
            taken |= {each.name for each in self._replicas.values() if not is_fit(each)}
            place = self._placement.soonest(entry, taken)
        return place

    def _has_seat(self, replica: Replica) -> bool:
        if replica.info is None or replica.is_drained:
            return False
        return self._loads.of(replica.name) < replica.info.max_num_seqs

    def _start(self, entry: Entry, place: Replica, now: float) -> list[Effect]:
        entry.num_rivals += 1
        entry.rival = self._attempts.bind(entry, place.name)
        return [self._send(entry, entry.rival, now)]

    def _earn(self, num_tokens: int) -> None:
        self.stats.computed_tokens += num_tokens
        self._budget.earn(num_tokens)
        self._rescues.earn(num_tokens)
