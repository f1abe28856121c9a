"""Requests on their way from one replica to another, with their KV; and KV on its way to a request.

    LENDING   one replica is asked for KV              LendAt, LendPrefixAt  ─► KVLent
    PULLING   another one gets it                      PullAt                ─► KVPulled
    then      of a move: the old replica is told to stop, the new one goes on from the last token
              delivered; of a prefix: the request is sent, and finds its beginning computed

A move may begin ahead, before there is a token: KV of a prompt then goes to who will go on with it
while it is computed. Nothing depends on KV: whoever gets the request computes what is not there.
So what takes too long is just done without it, or, if it was for balance only, not done. Knows
nothing of what a request is.
"""

from __future__ import annotations

from collections.abc import Mapping

from shoal.core.step import BLOCK_SIZE
from shoal.router.events import Effect, EndLeaseAt, LendAt, LendPrefixAt
from shoal.router.loads import Loads
from shoal.router.prefixes import Prefix
from shoal.router.records import Entry, Move, Replica, RouterConfig, Why, can_go_on

_LEASE_PER_TIMEOUT = 1.5
_GRACE_S = 0.1
_MOST_GROWTH = 128
"""Tokens of an answer that room is kept for: most that could be long are not."""


class Moves:
    """Those that are under way, and those that are due.

    Args:
        replicas, entries, loads: the router's; by name and by request.
    """

    def __init__(
        self,
        config: RouterConfig,
        replicas: Mapping[str, Replica],
        entries: Mapping[str, Entry],
        loads: Loads,
    ) -> None:
        self._config = config
        self._loads = loads
        self._replicas = replicas
        self._entries = entries
        self._moves: dict[int, Move] = {}
        self._of_request: dict[str, int] = {}
        self._num_begun = 0

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._of_request

    def get(self, move_id: int) -> Move | None:
        return self._moves.get(move_id)

    def of(self, request_id: str) -> Move | None:
        move_id = self._of_request.get(request_id)
        return None if move_id is None else self._moves[move_id]

    def target_of(self, request_id: str) -> str | None:
        move = self.of(request_id)
        return None if move is None else move.target

    def with_target(self, replica: str) -> list[Move]:
        return [move for move in self._moves.values() if move.target == replica]

    def prefixes_from(self, replica: str) -> list[Move]:
        """Requests that wait for what a replica has."""
        return [m for m in self._moves.values() if m.source == replica and m.why == "prefix"]

    def overdue(self, now: float) -> list[Move]:
        """Of who waits for a prefix: whose replica does not say itself that its time is up."""
        return [
            move
            for move in self._moves.values()
            if now >= move.deadline + (_GRACE_S if move.why == "prefix" and move.pulled_s else 0.0)
        ]

    def begin(
        self, request_id: str, source: str, target: str, now: float, why: Why
    ) -> list[Effect]:
        is_ahead = why == "ahead"
        timeout_s = self._config.push_timeout_s if is_ahead else self._config.move_timeout_s
        move = self._add(request_id, source, target, now + timeout_s, why)
        lead = self._entries[request_id].lead
        assert lead is not None, "what has no place does not move"
        lead.was_pushed |= is_ahead
        ttl_s = timeout_s * _LEASE_PER_TIMEOUT
        return [LendAt(source, move.move_id, lead.sent_id, ttl_s, is_ahead)]

    def wait_for(self, request_id: str, prefix: Prefix, target: str, now: float) -> list[Effect]:
        """A request is sent to `target` when it has what `prefix.source` has."""
        patience_s = prefix.patience_s
        move = self._add(request_id, prefix.source, target, now + patience_s, "prefix")
        move.names = prefix.names
        ttl_s = patience_s * _LEASE_PER_TIMEOUT
        return [LendPrefixAt(prefix.source, move.move_id, prefix.names, ttl_s)]

    def is_needed_now(self, move: Move, now: float) -> None:
        """A request that is moved ahead has begun."""
        move.why, move.deadline = "needed", now + self._config.move_timeout_s

    def end(self, request_id: str) -> list[Effect]:
        """The request has moved, or will not; or has what it waited for, or waits no more."""
        move_id = self._of_request.pop(request_id, None)
        if move_id is None:
            return []
        move = self._moves.pop(move_id)
        if move.why != "prefix":
            self._loads.add(move.target, -1)
        return [EndLeaseAt(move.source, move_id)]

    def _add(self, request_id: str, source: str, target: str, deadline: float, why: Why) -> Move:
        self._num_begun += 1
        move = Move(self._num_begun, request_id, source, target, deadline, why)
        self._moves[move.move_id], self._of_request[request_id] = move, move.move_id
        if why != "prefix":  # whose request is there already
            self._loads.add(target, 1)
        return move

    # --- who goes where ---

    def num_coming(self, replica: str) -> int:
        """Requests that it is about to have; for tests."""
        return sum(m.target == replica and m.why != "prefix" for m in self._moves.values())

    def due(self) -> list[str]:
        """Requests that are to leave their replicas, and do not yet."""
        return [
            request_id
            for replica in self._loads.left
            for request_id in replica.outstanding
            if (replica.is_drained or self._is_done_at(replica, request_id))
            and request_id not in self
        ]

    def due_ahead(self) -> list[str]:
        """Requests that will leave their replicas once they have begun, as many as may."""
        return [
            request_id
            for replica in self._loads.left
            if replica.role == "prefill"
            for request_id in replica.outstanding
            if self.is_due_ahead(request_id)
        ]

    def is_due_ahead(self, request_id: str) -> bool:
        entry = self._entries[request_id]
        lead = entry.lead
        if not self._config.moves_kv or not self._config.push_timeout_s or lead is None:
            return False
        replica = self._replicas[lead.replica]
        is_due = replica.role == "prefill" and not replica.is_drained and not entry.has_begun
        return is_due and not lead.was_pushed and request_id not in self

    def for_balance(self) -> str | None:
        """A request of who has the most for its speed, if another has that many fewer."""
        gap = self._config.balance_gap
        is_balancing = any(move.why == "balance" for move in self._moves.values())
        if not gap or not self._config.moves_kv or is_balancing:
            return None
        fit = [each for each in self._loads.fit(has_begun=True) if each.is_sound]
        if len(fit) < 2:
            return None
        fullest = max(fit, key=lambda replica: self._loads.crowd(replica.name))
        crowd = self._loads.crowd(fullest.name)
        if crowd - min(self._loads.crowd(each.name) for each in fit) < gap:
            return None
        there = (each for each in reversed(fullest.outstanding) if each not in self)
        return next((each for each in there if self._is_settled(self._entries[each])), None)

    @staticmethod
    def _is_settled(entry: Entry) -> bool:
        """It has one place, which has computed all of it."""
        return entry.rival is None and entry.lead is not None and entry.lead.first_s is not None

    def better_place(self, request_id: str, *, ahead: bool = False) -> str | None:
        """Where a request goes that leaves its replica; None: it stays for now.

        Args:
            ahead: where it will go once it has begun.
        """
        entry = self._entries[request_id]
        if entry.replica is None or not can_go_on(entry, self._replicas):
            return None
        source = self._replicas[entry.replica]
        if self._num_leaving(source, ahead) >= self._config.max_moves:
            return None
        has_begun = entry.has_begun or ahead
        for each in self._loads.fewest(has_begun):
            if each.is_meant_for(has_begun) and self._may_take(each, source, entry, has_begun):
                return each.name
        others = [
            each
            for each in self._replicas.values()
            if self._may_take(each, source, entry, has_begun)
        ]
        targets = [each for each in others if each.is_meant_for(has_begun)]
        if source.is_drained:
            targets = targets or others
        best = min(targets, key=lambda each: self._loads.crowd(each.name), default=None)
        return None if best is None else best.name

    def _may_take(self, replica: Replica, source: Replica, entry: Entry, has_begun: bool) -> bool:
        can_take = not (has_begun and replica.restarts) and not replica.is_drained
        is_another = replica is not source and replica.is_sound
        return can_take and is_another and self._has_room(replica, entry)

    def _num_leaving(self, source: Replica, ahead: bool) -> int:
        kinds = ("ahead",) if ahead else ("needed", "balance")
        return sum(m.source == source.name and m.why in kinds for m in self._moves.values())

    def _has_room(self, replica: Replica, entry: Entry) -> bool:
        """Whether it would not refuse one more, nor compute again what has no room there."""
        info = replica.info
        if info is None or self._loads.of(replica.name) >= info.max_num_seqs + info.max_waiting:
            return False
        if not self._config.moves_kv or not info.kv_block_bytes:
            return True
        there = [*replica.outstanding, *(m.request_id for m in self.with_target(replica.name))]
        if not there:
            return True
        # Not by tokens said so far: how soon these are known depends on how they are told.
        kept = sum(_kept_tokens(self._entries[each]) for each in there) + _kept_tokens(entry)
        return kept <= info.num_kv_blocks * BLOCK_SIZE

    def _is_done_at(self, replica: Replica, request_id: str) -> bool:
        return replica.role == "prefill" and self._entries[request_id].has_begun


def _kept_tokens(entry: Entry) -> int:
    """Of KV that a request has, about, in the middle of its answer."""
    wanted = entry.request.sampling.max_tokens
    output = _MOST_GROWTH if wanted is None else min(wanted // 2, _MOST_GROWTH)
    return len(entry.request.prompt_ids) + output + BLOCK_SIZE
