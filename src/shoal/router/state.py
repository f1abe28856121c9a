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
    Event,
    KVLent,
    KVPulled,
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
from shoal.router.records import Attempt, Entry, Replica, RouterConfig
from shoal.router.relocations import Relocations

_NOBODY: tuple[None, None] = (None, None)


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
        self._entries: dict[str, Entry] = {}
        self._attempts: dict[str, tuple[Entry, Attempt]] = {}  # by sent_id
        # Those that time alone may end.
        self._timed: dict[str, Entry] = {}
        self._loads = Loads(self._replicas)
        self._moves = Moves(config, self._replicas, self._entries, self._loads)
        self._prefixes = Prefixes(config.moves_kv and len(config.replicas) > 1)
        self._relocations = Relocations(
            config,
            self._replicas,
            self._entries,
            self._moves,
            self._prefixes,
            leave=self._leave,
            place=self._place,
            send=self._send,
        )
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
        attempts = [(each, entry) for entry in self._entries.values() for each in entry.attempts]
        assert placed == {(each.replica, entry.request.request_id) for each, entry in attempts}
        assert len(placed) == len(attempts), "a rival is at another replica than the lead"
        assert self._attempts.keys() == {each.sent_id for each, _ in attempts}
        homeless = {each for each, entry in self._entries.items() if entry.lead is None}
        assert self._homeless.keys() == homeless
        timed = (each for each, entry in self._entries.items() if entry.deadline is not None)
        assert self._timed.keys() == set(timed)
        assert not any(request_id in self._moves for request_id in self._homeless)

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
                return self._relocations.lent(event, now)
            case KVPulled():
                return self._relocations.pulled(event, now)
            case DrainReplica(name):
                self._loads.drain(name, True)
                return self._relocations.look(now)
            case ResumeReplica(name):
                self._loads.drain(name, False)
                return []
            case Drain():
                self._draining = True
                return []
            case Abandon():
                return self._abandon()
            case Tick():
                return [*self._expire(now), *self._relocations.look(now)]

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
        return self._place(entry, now)

    def _cancel(self, request_id: str) -> list[Effect]:
        if request_id not in self._entries:
            return []
        cancels = self._leave(self._entries[request_id])
        ended = Output(request_id=request_id, finish="cancelled")
        return [*cancels, *self._forget(self._entries[request_id]), Deliver([ended])]

    def _ready(self, event: ReplicaReady, now: float) -> list[Effect]:
        replica = self._replicas[event.replica]
        replica.incarnation, replica.info = event.incarnation, event.info
        self._loads.fleet_changed()
        self._last_info = event.info
        effects: list[Effect] = []
        for request_id in list(self._homeless):
            del self._homeless[request_id]
            effects += self._place(self._entries[request_id], now)
        return effects

    def _lost(self, event: ReplicaLost, now: float) -> list[Effect]:
        replica = self._replicas[event.replica]
        if event.incarnation < replica.incarnation:
            return []
        replica.info = None
        replica.gone_for_good = event.final
        self._prefixes.forget(event.replica)
        orphans = self._loads.empty(event.replica)
        effects = self._relocations.lost(event.replica, now)
        for request_id in orphans:
            effects += self._orphaned(self._entries[request_id], event, now)
        if self._hopeless:
            for request_id in list(self._homeless):
                effects += self._fail(request_id, refusals.no_replica(event.reason))
        return effects

    def _orphaned(self, entry: Entry, event: ReplicaLost, now: float) -> list[Effect]:
        """A replica is gone that had a request."""
        request_id = entry.request.request_id
        lost = next(each for each in entry.attempts if each.replica == event.replica)
        del self._attempts[lost.sent_id]
        if entry.rival is not None:
            entry.lead, entry.rival = entry.rival if entry.lead is lost else entry.lead, None
            return self._moves.end(request_id)
        entry.lead = None
        entry.num_lost += 1
        bound_for = self._moves.target_of(request_id)
        effects = self._moves.end(request_id)
        if entry.num_lost >= self._config.max_lost:
            error = refusals.lost_too_often(entry.num_lost, event.reason)
            return [*effects, *self._fail(request_id, error)]
        return [*effects, *self._place(entry, now, bound_for)]

    def _outputs(self, event: ReplicaOutputs, now: float) -> list[Effect]:
        replica = self._replicas[event.replica]
        if event.incarnation != replica.incarnation:
            return []
        outputs, effects = [], list[Effect]()
        for output in event.outputs:
            entry, attempt = self._attempts.get(output.request_id, _NOBODY)
            if entry is None or attempt is None or attempt.replica != event.replica:
                continue  # of somebody who left
            request_id = entry.request.request_id
            if entry.rival is not None:
                if output.finish == "error":
                    effects += self._end(entry, attempt)
                    continue  # the other one goes on
                effects += self._lead_by(entry, attempt)
            if output.request_id != request_id:
                output = dataclasses.replace(output, request_id=request_id)
            if output.num_cached_tokens is not None:
                num_cached = output.num_cached_tokens
                self._prefixes.note_computed(replica, entry, attempt, num_cached, now)
                if entry.has_begun:
                    # Said already, by a replica that was lost since or in an earlier output.
                    output = dataclasses.replace(output, num_cached_tokens=None)
            entry.output_ids += output.token_ids
            if output.finish is not None:
                if output.error is None:
                    self._prefixes.note(replica, entry)
                effects += self._forget(entry)
            elif replica.role == "prefill":
                effects += self._relocations.has_begun(request_id, now)
            outputs.append(output)
        return [Deliver(outputs), *effects]

    # --- time ---

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

    def _place(self, entry: Entry, now: float, wanted: str | None = None) -> list[Effect]:
        """Bind it to the live replica with the fewest outstanding requests, or let it wait.

        Args:
            wanted: where its KV is; taken if requests may be sent there.
        """
        has_kv = self._loads.taking(wanted, entry.has_begun)
        replica = has_kv or self._prefixes.most_held(self._loads.fewest(entry.has_begun), entry)
        if replica is None:
            entry.homeless_since = now
            self._homeless[entry.request.request_id] = None
            return []
        entry.lead = self._bind(entry, replica)
        prefix = self._prefixes.worth_getting(entry, replica, self._replicas.values())
        if prefix is not None and has_kv is None:
            return self._moves.wait_for(entry.request.request_id, prefix, replica.name, now)
        return self._send(entry, now)

    def _bind(self, entry: Entry, replica: Replica) -> Attempt:
        attempt = entry.attempt_at(replica.name)
        self._attempts[attempt.sent_id] = entry, attempt
        self._loads.put(replica.name, entry.request.request_id)
        return attempt

    def _send(self, entry: Entry, now: float) -> list[Effect]:
        """To the replica that it is bound to."""
        lead, request_id = entry.lead, entry.request.request_id
        assert lead is not None, "it has a place"
        lead.sent_s, lead.was_alone = now, len(self._replicas[lead.replica].outstanding) == 1
        effects: list[Effect] = [Send(lead.replica, entry.rest(lead, now))]
        if self._moves.is_due_ahead(request_id):
            effects += self._relocations.begin(request_id, now, "ahead")
        return effects

    def _lead_by(self, entry: Entry, winner: Attempt) -> list[CancelAt]:
        """Its tokens are delivered from now on, and the other attempt ends."""
        loser = entry.rival if winner is entry.lead else entry.lead
        return [] if loser is None else self._end(entry, loser)

    def _end(self, entry: Entry, attempt: Attempt) -> list[CancelAt]:
        """One attempt; the other one leads, if there is one."""
        del self._attempts[attempt.sent_id]
        self._loads.take(attempt.replica, entry.request.request_id)
        entry.lead, entry.rival = entry.rival if attempt is entry.lead else entry.lead, None
        return [CancelAt(attempt.replica, attempt.sent_id)]

    def _leave(self, entry: Entry) -> list[CancelAt]:
        return [cancel for each in entry.attempts for cancel in self._end(entry, each)]

    def _fail(self, request_id: str, error: RequestError) -> list[Effect]:
        cancels = self._leave(self._entries[request_id])
        forgotten = self._forget(self._entries[request_id])
        return [*cancels, *forgotten, refusals.failed(request_id, error)]

    def _forget(self, entry: Entry) -> list[Effect]:
        request_id = entry.request.request_id
        self._leave(entry)
        del self._entries[request_id]
        self._homeless.pop(request_id, None)
        self._timed.pop(request_id, None)
        return self._moves.end(request_id)
