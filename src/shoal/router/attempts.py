"""Stays of requests at replicas: how one begins, leads, and ends.

A request has a lead, whose tokens are delivered, and perhaps a rival that goes on from the same
last token; who says the next one leads from then on, and the other one ends. Knows nothing of why
a request is where it is.
"""

from __future__ import annotations

from collections.abc import Mapping

from shoal.router.events import CancelAt, Send
from shoal.router.loads import Loads
from shoal.router.placement import Placement
from shoal.router.records import Attempt, Entry, Replica

_NOBODY: tuple[None, None] = (None, None)


class Attempts:
    """
    Args:
        replicas, loads, placement: the router's.
    """

    def __init__(self, replicas: Mapping[str, Replica], loads: Loads, placement: Placement) -> None:
        self._replicas, self._loads, self._placement = replicas, loads, placement
        self._by_sent_id: dict[str, tuple[Entry, Attempt]] = {}

    def of(self, sent_id: str) -> tuple[Entry, Attempt] | tuple[None, None]:
        """Nobody, if it has left."""
        return self._by_sent_id.get(sent_id, _NOBODY)

    def bind(self, entry: Entry, replica: str) -> Attempt:
        """One that neither leads nor is a rival yet, and is not sent."""
        attempt = entry.attempt_at(replica)
        self._by_sent_id[attempt.sent_id] = entry, attempt
        self._placement.put(entry, attempt)
        self._loads.put(replica, entry.request.request_id)
        return attempt

    def send(self, entry: Entry, attempt: Attempt, now: float) -> Send:
        """To the replica that it is bound to."""
        attempt.sent_s = now
        replica = self._replicas[attempt.replica]
        attempt.was_alone, attempt.restarts = len(replica.outstanding) == 1, replica.restarts
        return Send(attempt.replica, entry.rest(attempt, now))

    def lead_by(self, entry: Entry, winner: Attempt) -> list[CancelAt]:
        """Its tokens are delivered from now on, and the other attempt ends."""
        loser = entry.rival if winner is entry.lead else entry.lead
        return [] if loser is None else self.end(entry, loser)

    def end(self, entry: Entry, attempt: Attempt) -> list[CancelAt]:
        """One attempt; the other one leads, if there is one."""
        self._loads.take(attempt.replica, entry.request.request_id)
        self._placement.left(attempt)
        self.lost(entry, attempt)
        return [CancelAt(attempt.replica, attempt.sent_id)]

    def lost(self, entry: Entry, attempt: Attempt) -> None:
        """With its replica, whose requests are not counted any more."""
        del self._by_sent_id[attempt.sent_id]
        entry.lead, entry.rival = entry.rival if attempt is entry.lead else entry.lead, None

    def leave(self, entry: Entry) -> list[CancelAt]:
        """It is nowhere then."""
        return [cancel for each in entry.attempts for cancel in self.end(entry, each)]

    def check_integrity(self, entries: Mapping[str, Entry], placed: set[tuple[str, str]]) -> None:
        """For tests.

        Args:
            placed: replicas and requests, as they are counted.
        """
        attempts = [(each, entry) for entry in entries.values() for each in entry.attempts]
        assert placed == {(each.replica, entry.request.request_id) for each, entry in attempts}
        assert len(placed) == len(attempts), "a rival is at another replica than the lead"
        assert self._by_sent_id.keys() == {each.sent_id for each, _ in attempts}
        self._placement.check_integrity(self._by_sent_id)
