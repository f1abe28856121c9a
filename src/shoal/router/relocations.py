"""What becomes of requests that move, or wait for KV: when a move begins, goes on and is done.

Told of time and of what replicas say of KV; asks its router to send requests. Who goes where is
`router/moves.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from shoal.router.events import CancelAt, Effect, EndLeaseAt, KVLent, KVPulled, PullAt
from shoal.router.moves import Moves
from shoal.router.prefixes import Prefixes
from shoal.router.records import Entry, Move, Replica, RouterConfig, Why

Leave = Callable[[Entry], list[CancelAt]]
"""A request's attempt ends, without another one."""
Place = Callable[[Entry, float, str | None], list[Effect]]
"""It is sent to a replica, that one if it takes requests."""
Send = Callable[[Entry, float], list[Effect]]
"""It is sent to the replica that it is bound to."""


class Relocations:
    """
    Args:
        replicas, entries, moves, prefixes: the router's.
        leave, place, send: what it does to a request.
    """

    def __init__(
        self,
        config: RouterConfig,
        replicas: Mapping[str, Replica],
        entries: Mapping[str, Entry],
        moves: Moves,
        prefixes: Prefixes,
        leave: Leave,
        place: Place,
        send: Send,
    ) -> None:
        self._config, self._replicas, self._entries = config, replicas, entries
        self._moves, self._prefixes = moves, prefixes
        self._leave, self._place, self._send = leave, place, send

    def look(self, now: float) -> list[Effect]:
        """Moves that take too long, then those that are due."""
        effects: list[Effect] = []
        for move in self._moves.overdue(now):
            if move.why in ("needed", "prefix"):
                effects += self._conclude(move, now)
            else:
                effects += self._moves.end(move.request_id)
        for request_id in self._moves.due():
            effects += self.begin(request_id, now, "needed")
        for request_id in self._moves.due_ahead():
            effects += self.begin(request_id, now, "ahead")
        if not effects and (chosen := self._moves.for_balance()) is not None:
            effects = self.begin(chosen, now, "balance")
        return effects

    def begin(self, request_id: str, now: float, why: Why) -> list[Effect]:
        """Off its replica, to a better one; nothing happens if there is none."""
        source = self._entries[request_id].replica
        target = self._moves.better_place(request_id, ahead=why == "ahead")
        if source is None or target is None:
            return []
        if self._config.moves_kv:
            return self._moves.begin(request_id, source, target, now, why)
        return self._send_over(request_id, target, now)

    def has_begun(self, request_id: str, now: float) -> list[Effect]:
        """A request that leaves its replica when it has begun: that only starts them."""
        move = self._moves.of(request_id)
        if move is None:
            return self.begin(request_id, now, "needed")
        if move.why == "ahead":
            self._moves.is_needed_now(move, now)
        return self._conclude(move, now) if move.is_here else []

    def lost(self, replica: str, now: float) -> list[Effect]:
        """It can neither take what was on its way there nor lend what others wait for."""
        effects: list[Effect] = []
        for move in self._moves.with_target(replica):
            effects += self._moves.end(move.request_id)
        for move in self._moves.prefixes_from(replica):
            effects += self._conclude(move, now)
        return effects

    def lent(self, event: KVLent, now: float) -> list[Effect]:
        move = self._moves.get(event.offer.lease_id)
        if move is None or move.source != event.replica:
            return [EndLeaseAt(event.replica, event.offer.lease_id)]
        move.pulled_s, move.num_offered = now, len(event.offer.names)
        self._prefixes.lacks(move.source, move.names[move.num_offered :])
        if event.offer.names:
            return [PullAt(move.target, event.offer, max(move.deadline - now, 0.0))]
        return self._conclude(move, now)

    def pulled(self, event: KVPulled, now: float) -> list[Effect]:
        move = self._moves.get(event.move_id)
        if move is None or move.target != event.replica:
            return []
        if move.why != "ahead":  # that takes as long as computing it
            entry, target = self._entries[move.request_id], self._replicas[move.target]
            self._prefixes.note_got(entry, move, target, event.num_blocks, now)
        move.is_here = event.num_blocks == move.num_offered
        return self._conclude(move, now)

    def _conclude(self, move: Move, now: float) -> list[Effect]:
        """All came that will."""
        if move.why == "ahead" and move.is_here:
            return []  # until it has begun
        effects = self._moves.end(move.request_id)
        entry = self._entries[move.request_id]
        if move.why == "prefix":
            return [*effects, *self._send(entry, now)]
        if move.why == "ahead" or not self._is_worth_it(move, entry):
            return effects
        return [*effects, *self._send_over(move.request_id, move.target, now)]

    @staticmethod
    def _is_worth_it(move: Move, entry: Entry) -> bool:
        """It is still where it was to leave; for balance alone nothing is computed again."""
        if entry.replica != move.source:
            return False
        return move.why == "needed" or (move.is_here and entry.rival is None)

    def _send_over(self, request_id: str, target: str, now: float) -> list[Effect]:
        """From now on what the old replica says of it counts no more."""
        entry = self._entries[request_id]
        return [*self._leave(entry), *self._place(entry, now, target)]
