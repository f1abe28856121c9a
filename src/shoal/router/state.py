"""The router: which replica serves a request, and what happens when that replica is lost.

`handle(event, now)` returns effects; no I/O, no clock. A request goes to the live replica
with the fewest outstanding ones (of equals, that which has most of its prompt already), and may
move to another while it runs: off a replica that is drained, from one that starts requests (role
prefill) to one that goes on with them, or to even out what each has (`router/moves.py`). If
another replica has computed much of its prompt, it waits until that is here
(`router/prefixes.py`). What it has produced is remembered, so that a lost replica's
requests go on elsewhere from their last token, none lost or repeated. While no replica is
alive, requests wait, bounded in number and time. Every request gets exactly one Output with
`finish`.
"""

from __future__ import annotations

import dataclasses
import random

from shoal.core.errors import RequestError
from shoal.core.request import GenerateRequest, Output
from shoal.core.stats import EngineInfo
from shoal.router import refusals
from shoal.router.events import (
    Abandon,
    Cancel,
    CancelAt,
    Deliver,
    Drain,
    DrainReplica,
    Effect,
    EndLeaseAt,
    Event,
    KVLent,
    KVPulled,
    PullAt,
    ReplicaLost,
    ReplicaOutputs,
    ReplicaReady,
    ResumeReplica,
    Send,
    Submit,
    Tick,
)
from shoal.router.loads import Loads
from shoal.router.moves import Moves
from shoal.router.prefixes import Prefixes
from shoal.router.records import Entry, Move, Replica, RouterConfig, Why


class RouterState:
    """All that a router knows of its replicas and requests.

    Args:
        rng: draws the seeds that requests don't bring.
    """

    def __init__(self, config: RouterConfig, rng: random.Random) -> None:
        self._config = config
        self._rng = rng
        self._replicas = {
            name: Replica(name, config.roles.get(name, "any")) for name in config.replicas
        }
        self._sent: dict[str, str] = {}  # sent_id → request_id, of those that moved
        self._entries: dict[str, Entry] = {}
        # Those that time alone may end.
        self._timed: dict[str, Entry] = {}
        self._loads = Loads(self._replicas)
        self._moves = Moves(config, self._replicas, self._entries, self._loads)
        self._prefixes = Prefixes(config.moves_kv and len(config.replicas) > 1)
        self._homeless: dict[str, None] = {}
        self._draining = False
        self._last_info: EngineInfo | None = None

    # --- seen from outside ---

    @property
    def num_in_flight(self) -> int:
        return len(self._entries)

    @property
    def draining(self) -> bool:
        return self._draining

    @property
    def info(self) -> EngineInfo | None:
        """What any request may count on: the least of the live replicas, or what was last known
        while none is (requests then wait for its restart); None until one has been ready."""
        alive = [replica.info for replica in self._replicas.values() if replica.info is not None]
        return min(alive, key=lambda info: info.max_model_len, default=self._last_info)

    def outstanding(self) -> dict[str, int]:
        """Requests at each replica."""
        return {name: len(replica.outstanding) for name, replica in self._replicas.items()}

    @property
    def alive(self) -> frozenset[str]:
        """Replicas that run; if there is one, a request would be served now."""
        return frozenset(each.name for each in self._replicas.values() if each.alive)

    @property
    def drained(self) -> frozenset[str]:
        """Replicas that no request is sent to."""
        return frozenset(each.name for each in self._replicas.values() if each.is_drained)

    def check_integrity(self) -> None:
        """Raises AssertionError if the books don't balance; for tests."""
        placed = self._loads.check_integrity(self._moves.num_coming)
        assert all(self._entries[each].replica == replica for each, replica in placed.items())
        assert placed.keys() | self._homeless.keys() == self._entries.keys()
        assert not placed.keys() & self._homeless.keys()
        timed = (each for each, entry in self._entries.items() if entry.deadline is not None)
        assert self._timed.keys() == set(timed)
        assert all(
            request_id in placed for request_id in self._entries if request_id in self._moves
        )
        moved = {entry.sent_id for entry in self._entries.values() if entry.num_moves}
        assert self._sent.keys() == moved

    # --- events ---

    def handle(self, event: Event, now: float) -> list[Effect]:
        match event:
            case Submit(request):
                return self._submit(request, now)
            case Cancel(request_id):
                return self._cancel(request_id)
            case ReplicaReady():
                return self._ready(event, now)
            case ReplicaLost():
                return self._lost(event, now)
            case ReplicaOutputs():
                return self._outputs(event, now)
            case KVLent():
                return self._lent(event, now)
            case KVPulled():
                return self._pulled(event, now)
            case DrainReplica(name):
                self._loads.drain(name, True)
                return self._move_on(now)
            case ResumeReplica(name):
                self._loads.drain(name, False)
                return []
            case Drain():
                self._draining = True
                return []
            case Abandon():
                return self._abandon()
            case Tick():
                return [*self._expire(now), *self._move_on(now)]

    def _submit(self, request: GenerateRequest, now: float) -> list[Effect]:
        refusal = self._refusal(request)
        if refusal is not None:
            return [refusals.failed(request.request_id, refusal)]
        if request.sampling.seed is None:
            seeded = dataclasses.replace(request.sampling, seed=self._rng.getrandbits(63))
            request = dataclasses.replace(request, sampling=seeded)
        deadline = None if request.timeout_s is None else now + request.timeout_s
        request_id, entry = request.request_id, Entry(request, deadline, list(request.output_ids))
        self._entries[request_id] = entry
        if deadline is not None:
            self._timed[request_id] = entry
        return self._place(request_id, now)

    def _cancel(self, request_id: str) -> list[Effect]:
        if request_id not in self._entries:
            return []
        return [
            *self._withdraw(request_id),
            Deliver([Output(request_id=request_id, finish="cancelled")]),
        ]

    def _ready(self, event: ReplicaReady, now: float) -> list[Effect]:
        replica = self._replicas[event.replica]
        replica.incarnation, replica.info = event.incarnation, event.info
        self._loads.fleet_changed()
        self._last_info = event.info
        effects: list[Effect] = []
        for request_id in list(self._homeless):
            del self._homeless[request_id]
            effects += self._place(request_id, now)
        return effects

    def _lost(self, event: ReplicaLost, now: float) -> list[Effect]:
        replica = self._replicas[event.replica]
        if event.incarnation < replica.incarnation:
            return []
        replica.info = None
        replica.gone_for_good = event.final
        self._prefixes.forget(event.replica)
        orphans = self._loads.empty(event.replica)
        effects: list[Effect] = []
        for move in self._moves.with_target(event.replica):
            effects += self._moves.end(move.request_id)
        for move in self._moves.prefixes_from(event.replica):
            effects += self._conclude(move, now)
        for request_id in orphans:
            entry = self._entries[request_id]
            entry.replica = None
            entry.num_attempts += 1
            bound_for = self._moves.target_of(request_id)
            effects += self._moves.end(request_id)
            if entry.num_attempts >= self._config.max_attempts:
                error = refusals.lost_too_often(entry.num_attempts, event.reason)
                effects += self._fail(request_id, error)
            else:
                effects += self._place(request_id, now, bound_for)
        if self._hopeless:
            for request_id in list(self._homeless):
                effects += self._fail(request_id, refusals.no_replica(event.reason))
        return effects

    def _outputs(self, event: ReplicaOutputs, now: float) -> list[Effect]:
        replica = self._replicas[event.replica]
        if event.incarnation != replica.incarnation:
            return []
        outputs, effects = [], list[Effect]()
        for output in event.outputs:
            request_id = self._sent.get(output.request_id, output.request_id)
            entry = self._entries.get(request_id)
            if entry is None or entry.replica != event.replica:
                continue
            if output.request_id != entry.sent_id:
                continue  # of an earlier stay there
            if entry.num_moves:
                output = dataclasses.replace(output, request_id=request_id)
            if output.num_cached_tokens is not None:
                self._prefixes.note_computed(replica, entry, output.num_cached_tokens, now)
                if entry.has_begun:
                    # Said already, by a replica that was lost since or in an earlier output.
                    output = dataclasses.replace(output, num_cached_tokens=None)
            entry.output_ids += output.token_ids
            if output.finish is not None:
                if output.error is None:
                    self._prefixes.note(replica, entry)
                effects += self._forget(request_id)
            elif replica.role == "prefill":
                effects += self._leave(request_id, now)
            outputs.append(output)
        return [Deliver(outputs), *effects]

    # --- moving ---

    def _move_on(self, now: float) -> list[Effect]:
        """Moves that take too long, then those that are due."""
        effects: list[Effect] = []
        for move in self._moves.overdue(now):
            if move.why in ("needed", "prefix"):
                effects += self._conclude(move, now)
            else:
                effects += self._moves.end(move.request_id)
        for request_id in self._moves.due():
            effects += self._begin_move(request_id, now, "needed")
        for request_id in self._moves.due_ahead():
            effects += self._begin_move(request_id, now, "ahead")
        if not effects and (chosen := self._moves.for_balance()) is not None:
            effects = self._begin_move(chosen, now, "balance")
        return effects

    def _begin_move(self, request_id: str, now: float, why: Why) -> list[Effect]:
        """Off its replica, to a better one; nothing happens if there is none."""
        source = self._entries[request_id].replica
        target = self._moves.better_place(request_id, ahead=why == "ahead")
        if source is None or target is None:
            return []
        if self._config.moves_kv:
            return self._moves.begin(request_id, source, target, now, why)
        return self._send_over(request_id, source, target, now)

    def _leave(self, request_id: str, now: float) -> list[Effect]:
        """Its replica only starts requests, and has started this one."""
        move = self._moves.of(request_id)
        if move is None:
            return self._begin_move(request_id, now, "needed")
        if move.why == "ahead":
            self._moves.is_needed_now(move, now)
        return self._conclude(move, now) if move.is_here else []

    def _lent(self, event: KVLent, now: float) -> list[Effect]:
        move = self._moves.get(event.offer.lease_id)
        if move is None or move.source != event.replica:
            return [EndLeaseAt(event.replica, event.offer.lease_id)]
        move.pulled_s, move.num_offered = now, len(event.offer.names)
        self._prefixes.lacks(move.source, move.names[move.num_offered :])
        if event.offer.names:
            return [PullAt(move.target, event.offer, max(move.deadline - now, 0.0))]
        return self._conclude(move, now)

    def _pulled(self, event: KVPulled, now: float) -> list[Effect]:
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
        if move.why == "ahead":
            return effects
        if move.why == "prefix":
            return [*effects, *self._send(move.request_id, now)]
        return [*effects, *self._send_over(move.request_id, move.source, move.target, now)]

    def _send_over(self, request_id: str, source: str, target: str, now: float) -> list[Effect]:
        """From now on what the old replica says of it counts no more."""
        entry = self._entries[request_id]
        cancel = CancelAt(source, entry.sent_id)
        self._loads.take(source, request_id)
        self._sent.pop(entry.sent_id, None)
        entry.replica = None
        entry.num_moves += 1
        self._sent[entry.sent_id] = request_id
        return [cancel, *self._place(request_id, now, target)]

    def _abandon(self) -> list[Effect]:
        error = refusals.shutting_down("shutting_down")
        return [effect for each in list(self._entries) for effect in self._fail(each, error)]

    def _expire(self, now: float) -> list[Effect]:
        effects: list[Effect] = []
        for request_id, entry in list(self._timed.items()):
            if entry.deadline is not None and now >= entry.deadline:
                effects += self._fail(request_id, refusals.out_of_time(entry.request))
        for request_id in list(self._homeless):
            since = self._entries[request_id].homeless_since
            if now >= since + self._config.homeless_timeout_s:
                effects += self._fail(request_id, refusals.no_replica("none became ready in time"))
        return effects

    # --- one request ---

    def _refusal(self, request: GenerateRequest) -> RequestError | None:
        if self._draining:
            return refusals.shutting_down("draining", retry_after_s=5.0)
        if request.request_id in self._entries:
            return refusals.id_in_use(request.request_id)
        if self._hopeless:
            return refusals.no_replica("every replica has failed for good")
        if len(self._homeless) >= self._config.max_homeless and not self.alive:
            return refusals.too_many_wait(len(self._homeless))
        return None

    @property
    def _hopeless(self) -> bool:
        return all(replica.gone_for_good for replica in self._replicas.values())

    def _place(self, request_id: str, now: float, wanted: str | None = None) -> list[Effect]:
        """Bind it to the live replica with the fewest outstanding requests, or let it wait.

        Args:
            wanted: where its KV is; taken if requests may be sent there.
        """
        entry = self._entries[request_id]
        has_kv = self._loads.taking(wanted, entry.has_begun)
        replica = has_kv or self._prefixes.most_held(self._loads.fewest(entry.has_begun), entry)
        if replica is None:
            entry.homeless_since = now
            self._homeless[request_id] = None
            return []
        self._loads.put(replica.name, request_id)
        entry.replica = replica.name
        prefix = self._prefixes.worth_getting(entry, replica, self._replicas.values())
        if prefix is not None and has_kv is None:
            return self._moves.wait_for(request_id, prefix, replica.name, now)
        return self._send(request_id, now)

    def _send(self, request_id: str, now: float) -> list[Effect]:
        """To the replica that it is bound to."""
        entry = self._entries[request_id]
        replica = self._replicas[entry.replica or ""]
        entry.sent_s, entry.was_alone = now, len(replica.outstanding) == 1
        entry.was_pushed = False
        effects: list[Effect] = [Send(replica.name, entry.rest(now))]
        if self._moves.is_due_ahead(request_id):
            effects += self._begin_move(request_id, now, "ahead")
        return effects

    def _fail(self, request_id: str, error: RequestError) -> list[Effect]:
        return [*self._withdraw(request_id), refusals.failed(request_id, error)]

    def _withdraw(self, request_id: str) -> list[Effect]:
        entry = self._entries[request_id]
        cancels = [] if entry.replica is None else [CancelAt(entry.replica, entry.sent_id)]
        return [*self._forget(request_id), *cancels]

    def _forget(self, request_id: str) -> list[Effect]:
        entry = self._entries.pop(request_id)
        self._sent.pop(entry.sent_id, None)
        self._homeless.pop(request_id, None)
        self._timed.pop(request_id, None)
        if entry.replica is not None:
            self._loads.take(entry.replica, request_id)
        return self._moves.end(request_id)
