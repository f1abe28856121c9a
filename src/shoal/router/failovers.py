"""What becomes of a request whose replica is gone or failed at it: another one, or an error.

    one of two attempts   the other one goes on, and is looked after again
    gone                  it goes on elsewhere, or waits for a replica
    failed                it goes on elsewhere if somebody is there who has not failed at it. That
                          comes out of a budget, unless its replica is given up and the other one
                          is well: nothing that a dead replica had is lost for there being much

Each request may lose so many replicas without getting on. Knows nothing of why one is given up
(`router/health.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from shoal.core.errors import RequestError
from shoal.core.request import ErrorInfo
from shoal.router import refusals
from shoal.router.attempts import Attempts
from shoal.router.events import Effect, ReplicaLost
from shoal.router.moves import Moves
from shoal.router.placement import Placement
from shoal.router.records import Attempt, Entry, Replica, RouterConfig, can_go_on
from shoal.router.watch import Watch

Place = Callable[[Entry, float, str | None], list[Effect]]
"""It is sent to a replica, that one if it takes requests; or waits."""
Fail = Callable[[str, RequestError], list[Effect]]
"""A request ends in an error."""


class Failovers:
    """
    Args:
        replicas, attempts, moves, placement, watch: the router's.
        place, fail: what it does to a request.
    """

    def __init__(
        self,
        config: RouterConfig,
        replicas: Mapping[str, Replica],
        attempts: Attempts,
        moves: Moves,
        placement: Placement,
        watch: Watch,
        place: Place,
        fail: Fail,
    ) -> None:
        self._max_lost, self._replicas = config.max_lost, replicas
        self._attempts, self._moves = attempts, moves
        self._placement, self._watch = placement, watch
        self._place, self._fail = place, fail

    def lost(self, entry: Entry, event: ReplicaLost, now: float) -> list[Effect]:
        """A replica is gone that had it."""
        request_id = entry.request.request_id
        lost = next(each for each in entry.attempts if each.replica == event.replica)
        may_go_on = can_go_on(entry, self._replicas)
        self._attempts.lost(entry, lost)
        if entry.lead is not None:
            self._watch.left_alone(entry.lead, now)
            return self._moves.end(request_id)
        entry.note_lost()
        bound_for = self._moves.target_of(request_id)
        effects = self._moves.end(request_id)
        if entry.num_lost >= self._max_lost:
            error = refusals.lost_too_often(entry.num_lost, event.reason)
            return [*effects, *self._fail(request_id, error)]
        if not may_go_on:
            return [*effects, *self._fail(request_id, refusals.cannot_go_on(event.reason))]
        return [*effects, *self._place(entry, now, bound_for)]

    def failed(
        self, entry: Entry, attempt: Attempt, error: ErrorInfo, now: float, *, may_go_on: bool
    ) -> list[Effect] | None:
        """A replica failed at it; None: it is over.

        Args:
            may_go_on: another one would not fail for the same reason.
        """
        self._note(attempt, error, now)
        entry.note_failed(attempt.replica)
        if entry.rival is not None:
            moved = self._moves.end(entry.request.request_id) if attempt is entry.lead else []
            left = self._attempts.end(entry, attempt)
            assert entry.lead is not None, "the other one leads"
            self._watch.left_alone(entry.lead, now)
            return [*left, *moved]
        place = self._another(entry, attempt, error) if may_go_on else None
        if place is None:
            return None
        ended = [*self._attempts.end(entry, attempt), *self._moves.end(entry.request.request_id)]
        return [*ended, *self._place(entry, now, place.name)]

    def _note(self, attempt: Attempt, error: ErrorInfo, now: float) -> None:
        if error.status in refusals.OF_REPLICAS:
            self._watch.failed(attempt.replica, now)
        elif error.status in refusals.BUSY:
            self._watch.refused(attempt.replica, now)
        if refusals.is_refusal(error):
            self._placement.refused(attempt)

    def _another(self, entry: Entry, failed: Attempt, error: ErrorInfo) -> Replica | None:
        """That takes it; None: it has been tried enough."""
        entry.note_lost()
        if entry.num_lost >= self._max_lost or not can_go_on(entry, self._replicas):
            return None
        place = self._placement.choose(entry, entry.failed_at)
        if place is None:
            return None
        is_given_up = self._watch.health.is_in_doubt(failed.replica)
        may_retry = self._watch.hedges.retry(
            is_free=is_given_up and place.is_sound, is_refusal=error.status in refusals.BUSY
        )
        return place if may_retry else None
