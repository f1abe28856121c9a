"""Requests on their way from one replica to another, with their KV.

    LENDING   the old replica is asked for the request's KV      LendAt    ─► KVLent
    PULLING   the new one gets it, while the old one goes on     PullAt    ─► KVPulled
    then      the old one is told to stop, the new one goes on from the last token delivered

Nothing waits for the KV: whoever gets the request computes what is not there. So a move that takes
too long is just made without it, or, if it was made for balance only, not made. Knows nothing of
what a request is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from shoal.router.events import Effect, EndLeaseAt, LendAt
from shoal.router.records import Entry, Replica, RouterConfig

_LEASE_PER_TIMEOUT = 1.5


@dataclass(frozen=True, slots=True)
class Move:
    """
    Attributes:
        is_needed: the old replica is to be rid of the request.
    """

    move_id: int
    request_id: str
    source: str
    target: str
    deadline: float
    is_needed: bool


class Moves:
    """Those that are under way, and those that are due.

    Args:
        replicas, entries: the router's, by name and by request.
    """

    def __init__(
        self, config: RouterConfig, replicas: Mapping[str, Replica], entries: Mapping[str, Entry]
    ) -> None:
        self._config = config
        self._replicas = replicas
        self._entries = entries
        self._moves: dict[int, Move] = {}
        self._of_request: dict[str, int] = {}
        self._num_begun = 0

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._of_request

    def get(self, move_id: int) -> Move | None:
        return self._moves.get(move_id)

    def with_target(self, replica: str) -> list[Move]:
        return [move for move in self._moves.values() if move.target == replica]

    def overdue(self, now: float) -> list[Move]:
        return [move for move in self._moves.values() if now >= move.deadline]

    def begin(
        self, request_id: str, source: str, target: str, now: float, *, is_needed: bool
    ) -> list[Effect]:
        self._num_begun += 1
        move_id, timeout_s = self._num_begun, self._config.move_timeout_s
        move = Move(move_id, request_id, source, target, now + timeout_s, is_needed)
        self._moves[move_id], self._of_request[request_id] = move, move_id
        sent_id = self._entries[request_id].sent_id
        return [LendAt(source, move_id, sent_id, timeout_s * _LEASE_PER_TIMEOUT)]

    def end(self, request_id: str) -> list[Effect]:
        """The request has moved, or will not."""
        move_id = self._of_request.pop(request_id, None)
        if move_id is None:
            return []
        return [EndLeaseAt(self._moves.pop(move_id).source, move_id)]

    def target_of(self, request_id: str) -> str | None:
        move_id = self._of_request.get(request_id)
        return None if move_id is None else self._moves[move_id].target

    # --- who goes where ---

    def fit(self, has_begun: bool) -> list[Replica]:
        """Replicas that a request may be sent to: those meant for it, if there are any."""
        alive = [replica for replica in self._replicas.values() if replica.alive]
        taking = [replica for replica in alive if not replica.is_drained]
        return [each for each in taking if each.is_meant_for(has_begun)] or taking or alive

    def load(self, replica: Replica) -> int:
        """Requests that it has, or is about to have."""
        coming = sum(move.target == replica.name for move in self._moves.values())
        return len(replica.outstanding) + coming

    def due(self) -> list[str]:
        """Requests that are to leave their replicas, and do not yet."""
        return [
            request_id
            for replica in self._replicas.values()
            for request_id in replica.outstanding
            if (replica.is_drained or self._is_done_at(replica, request_id))
            and request_id not in self
        ]

    def for_balance(self) -> str | None:
        """A request of who has the most, if another has that many fewer."""
        gap, fit = self._config.balance_gap, self.fit(has_begun=True)
        is_balancing = any(not move.is_needed for move in self._moves.values())
        if not gap or not self._config.moves_kv or len(fit) < 2 or is_balancing:
            return None
        fullest = max(fit, key=lambda replica: len(replica.outstanding))
        if len(fullest.outstanding) - min(map(self.load, fit)) < gap:
            return None
        begun = (each for each in reversed(fullest.outstanding) if self._entries[each].has_begun)
        return next((request_id for request_id in begun if request_id not in self), None)

    def better_place(self, request_id: str) -> str | None:
        """Where a request goes that leaves its replica; None: it stays for now."""
        entry = self._entries[request_id]
        if entry.replica is None:
            return None
        source = self._replicas[entry.replica]
        leaving = sum(move.source == source.name for move in self._moves.values())
        others = [
            each
            for each in self._replicas.values()
            if each is not source and not each.is_drained and self._has_room(each)
        ]
        targets = [each for each in others if each.is_meant_for(entry.has_begun)]
        if source.is_drained:
            targets = targets or others
        if not targets or leaving >= self._config.max_moves:
            return None
        return min(targets, key=self.load).name

    def _has_room(self, replica: Replica) -> bool:
        """Whether it would not refuse one more."""
        info = replica.info
        return info is not None and self.load(replica) < info.max_num_seqs + info.max_waiting

    def _is_done_at(self, replica: Replica, request_id: str) -> bool:
        return replica.role == "prefill" and self._entries[request_id].has_begun
