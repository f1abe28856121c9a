"""The router: which replica serves a request, and what happens when that replica is lost.

`handle(event, now)` returns effects; no I/O, no clock. A request goes to the live replica
that the policy chooses (`router/placement.py`), and may
move to another while it runs: off a replica that is drained, from one that starts requests (role
prefill) to one that goes on with them, or to even out what each has (`router/moves.py`). If
another replica has computed much of its prompt, it waits until that is here
(`router/prefixes.py`). What it has produced is remembered, so that a lost replica's
requests go on elsewhere from their last token, none lost or repeated (`router/failovers.py`).
While no replica is alive, requests wait, bounded in number and time. Every request gets exactly one
Output with `finish`.
"""

from __future__ import annotations

import dataclasses
import random

from shoal.core.errors import RequestError
from shoal.core.request import Output
from shoal.core.stats import EngineInfo, EntranceStats, HedgeStats, Lag, Prospect
from shoal.router import refusals
from shoal.router.attempts import Attempts
from shoal.router.entrance import Entrance
from shoal.router.events import (
    Abandon,
    AttemptFailed,
    AttemptHeld,
    Cancel,
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
    ReplicaStuck,
    ResumeReplica,
    Submit,
    Tick,
)
from shoal.router.failovers import Failovers
from shoal.router.loads import Loads
from shoal.router.moves import Moves
from shoal.router.placement import Placement
from shoal.router.prefixes import Prefixes
from shoal.router.records import Entry, Replica, RouterConfig
from shoal.router.relocations import Relocations
from shoal.router.watch import Watch


class RouterState:
    """All that a router knows of its replicas and requests.

    Args:
        rng: draws the seeds that requests don't bring.
    """

    def __init__(self, config: RouterConfig, rng: random.Random) -> None:
        self._config = config
        self._replicas = {
            name: Replica(name, config.roles.get(name, "any")) for name in config.replicas
        }
        self._entries: dict[str, Entry] = {}
        self._loads = Loads(self._replicas)
        self._placement = Placement(config, self._replicas, self._loads, rng)
        self._attempts = Attempts(self._replicas, self._loads, self._placement)
        self._moves = Moves(config, self._replicas, self._entries, self._loads)
        self._watch = Watch(
            config,
            self._replicas,
            self._entries,
            self._attempts,
            self._loads,
            self._moves,
            self._placement,
        )
        self._prefixes = Prefixes(config.moves_kv and len(config.replicas) > 1)
        self._relocations = Relocations(
            config,
            self._replicas,
            self._entries,
            self._moves,
            self._prefixes,
            leave=self._attempts.leave,
            place=self._place,
            send=self._send,
        )
        self._entrance = Entrance(
            config,
            rng,
            self._replicas,
            self._entries,
            self._placement,
            place=self._place,
            fail=self._fail,
        )
        self._failovers = Failovers(
            config,
            self._replicas,
            self._attempts,
            self._moves,
            self._placement,
            self._watch,
            place=self._place,
            fail=self._fail,
        )
        self._last_info: EngineInfo | None = None

    # --- seen from outside ---

    @property
    def wake_s(self) -> float | None:
        """When it next wants a `Tick`, whatever else happens."""
        return self._watch.wake_s

    def doubted(self, now: float) -> list[str]:
        """Replicas whose silence the next `Tick` looks at."""
        return self._watch.doubted(now)

    @property
    def hedges(self) -> HedgeStats:
        return self._watch.stats

    @property
    def num_in_flight(self) -> int:
        return len(self._entries) + self._entrance.collapsing.num_beside

    @property
    def draining(self) -> bool:
        return self._entrance.is_shut

    @property
    def info(self) -> EngineInfo | None:
        """What any request may count on: the least of the live replicas, or what was last known
        while none is (requests then wait for its restart); None until one has been ready."""
        alive = [replica.info for replica in self._replicas.values() if replica.info is not None]
        return min(alive, key=lambda info: info.max_model_len, default=self._last_info)

    def outstanding(self) -> dict[str, int]:
        """Requests at each replica."""
        return {name: len(replica.outstanding) for name, replica in self._replicas.items()}

    def stragglers(self, now: float) -> dict[str, Lag]:
        """Replicas that have been slow for long."""
        return self._watch.stragglers.lasting(now)

    def prospects(self, now: float) -> dict[str, Prospect]:
        """What is expected of each replica that is alive."""
        return self._placement.prospects(now)

    @property
    def alive(self) -> frozenset[str]:
        """Replicas that run; if there is one, a request would be served now."""
        return frozenset(each.name for each in self._replicas.values() if each.alive)

    @property
    def drained(self) -> frozenset[str]:
        """Replicas that no request is sent to."""
        return frozenset(each.name for each in self._replicas.values() if each.is_drained)

    @property
    def entrance(self) -> EntranceStats:
        return self._entrance.stats

    def refusal(self, salt: str, priority: int, now: float) -> RequestError | None:
        """Why a request of that tenant would not be let in now, whatever it asks."""
        self._placement.at(now)
        return self._entrance.refusal(salt, priority, now)

    def check_integrity(self) -> None:
        """Raises AssertionError if the books don't balance; for tests."""
        placed = self._loads.check_integrity(self._moves.num_coming)
        self._attempts.check_integrity(self._entries, placed)
        self._entrance.check_integrity()
        assert not any(each.request.request_id in self._moves for each in self._entrance.room)

    # --- events ---

    def handle(self, event: Event, now: float) -> list[Effect]:
        self._placement.at(now)
        effects = self._handle(event, now)
        if self._entrance.room and _may_make_room(event):
            effects += self._entrance.serve(now)
        return self._entrance.collapsing.spread(effects)

    def _handle(self, event: Event, now: float) -> list[Effect]:
        match event:
            case Submit(request):
                return self._entrance.submit(request, now)
            case Cancel(request_id):
                return self._cancel(request_id)
            case ReplicaReady():
                return self._ready(event, now)
            case ReplicaLost():
                return self._lost(event, now)
            case ReplicaStuck(name, incarnation, is_stuck):
                is_it = self._replicas[name].incarnation == incarnation
                return self._watch.stuck(name, is_stuck, now) if is_it else []
            case ReplicaOutputs():
                return self._outputs(event, now)
            case AttemptFailed():
                return self._attempt_failed(event, now)
            case AttemptHeld(name, _, request_id, is_held):
                return self._watch.held(name, request_id, is_held, now)
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
                self._entrance.is_shut = True
                return []
            case Abandon():
                return self._abandon()
            case Tick():
                return [
                    *self._entrance.expire(now),
                    *self._watch.look(now),
                    *self._relocations.look(now),
                ]

    def _cancel(self, request_id: str) -> list[Effect]:
        entry = self._entries.get(self._entrance.collapsing.left(request_id) or "")
        if entry is None:
            return []
        left = [*self._attempts.leave(entry), *self._forget(entry)]
        return [*left, Deliver([Output(request_id=entry.request.request_id, finish="cancelled")])]

    def _ready(self, event: ReplicaReady, now: float) -> list[Effect]:
        replica = self._replicas[event.replica]
        is_news = replica.alive and event.incarnation == replica.incarnation
        replica.incarnation, replica.info = event.incarnation, event.info
        replica.restarts = event.info.restarts
        self._loads.fleet_changed()
        self._last_info = event.info
        if not is_news:
            replica.is_stuck = False
            self._placement.ready(replica)
            self._watch.ready(event.replica, now)
        return []

    def _lost(self, event: ReplicaLost, now: float) -> list[Effect]:
        replica = self._replicas[event.replica]
        if event.incarnation < replica.incarnation:
            return []
        if replica.alive:
            self._watch.failed(event.replica, now)
        self._watch.stragglers.lost(event.replica)
        replica.info, replica.is_stuck = None, False
        replica.gone_for_good = event.final
        self._prefixes.forget(event.replica)
        self._placement.lost(event.replica)
        orphans = self._loads.empty(event.replica)
        effects = self._relocations.lost(event.replica, now)
        for request_id in orphans:
            effects += self._failovers.lost(self._entries[request_id], event, now)
        if self._entrance.is_hopeless:
            for entry in list(self._entrance.room):
                gone = refusals.no_replica(event.reason)
                effects += self._fail(entry.request.request_id, gone)
        return effects

    def _outputs(self, event: ReplicaOutputs, now: float) -> list[Effect]:
        replica = self._replicas[event.replica]
        if event.incarnation != replica.incarnation:
            return []
        outputs, effects = [], list[Effect]()
        self._placement.listen(event.replica, event.computed)
        self._watch.health.said(event.replica, event.outputs, now)
        for output in event.outputs:
            entry, attempt = self._attempts.of(output.request_id)
            if entry is None or attempt is None or attempt.replica != event.replica:
                self._watch.hedges.said_in_vain(len(output.token_ids))
                continue  # of somebody who left
            request_id = entry.request.request_id
            if output.error is not None:
                may_go_on = output.error.status in refusals.WORTH_RETRYING
                elsewhere = self._failovers.failed(
                    entry, attempt, output.error, now, may_go_on=may_go_on
                )
                if elsewhere is not None:
                    effects += elsewhere
                    continue
            if entry.rival is not None:
                self._watch.outrun(entry, attempt, now)
                effects += self._attempts.lead_by(entry, attempt)
            if output.request_id != request_id:
                output = dataclasses.replace(output, request_id=request_id)
            if output.num_cached_tokens is not None:
                num_cached = output.num_cached_tokens
                self._prefixes.note_computed(replica, entry, attempt, num_cached, now)
                if entry.has_begun:
                    # Said already, by a replica that was lost since or in an earlier output.
                    output = dataclasses.replace(output, num_cached_tokens=None)
            self._watch.said(entry, attempt, output, now)
            entry.output_ids += output.token_ids
            self._placement.said(entry, attempt, output)
            if output.finish is not None:
                if output.error is None:
                    self._prefixes.note(replica, entry)
                    self._watch.ended(entry, attempt)
                effects += self._forget(entry)
            elif replica.role == "prefill":
                effects += self._relocations.has_begun(request_id, now)
            outputs.append(output)
        self._placement.learn()
        return [Deliver(outputs), *effects]

    def _attempt_failed(self, event: AttemptFailed, now: float) -> list[Effect]:
        entry, attempt = self._attempts.of(event.request_id)
        if entry is None or attempt is None or attempt.replica != event.replica:
            return []
        elsewhere = self._failovers.failed(entry, attempt, event.error, now, may_go_on=True)
        if elsewhere is not None:
            return elsewhere
        ended = Output(request_id=entry.request.request_id, finish="error", error=event.error)
        return [*self._forget(entry), Deliver([ended])]

    def _abandon(self) -> list[Effect]:
        error = refusals.shutting_down("shutting_down")
        return [effect for each in list(self._entries) for effect in self._fail(each, error)]

    # --- one request ---

    def _place(self, entry: Entry, now: float, wanted: str | None = None) -> list[Effect]:
        """Bind it to the replica that the policy chooses, or let it wait.

        Args:
            wanted: where its KV is; taken if requests may be sent there.
        """
        if wanted is None and not entry.has_begun:
            wanted = self._watch.health.wants_trial()
        has_kv = self._loads.taking(wanted, entry.has_begun)
        replica = has_kv or self._placement.choose(entry, entry.failed_at)
        replica = replica or self._placement.choose(entry)
        if replica is None:
            self._entrance.room.put_back(entry, now)
            return []
        self._entrance.room.sent(entry)
        entry.lead = self._attempts.bind(entry, replica.name)
        prefix = self._prefixes.worth_getting(entry, replica, self._replicas.values())
        if prefix is not None and has_kv is None:
            return self._moves.wait_for(entry.request.request_id, prefix, replica.name, now)
        return self._send(entry, now)

    def _send(self, entry: Entry, now: float) -> list[Effect]:
        """To the replica that it is bound to."""
        lead, request_id = entry.lead, entry.request.request_id
        assert lead is not None, "it has a place"
        effects: list[Effect] = [self._watch.send(entry, lead, now)]
        if self._moves.is_due_ahead(request_id):
            effects += self._relocations.begin(request_id, now, "ahead")
        return effects

    def _fail(self, request_id: str, error: RequestError) -> list[Effect]:
        entry, failed = self._entries[request_id], refusals.failed(request_id, error)
        return [*self._attempts.leave(entry), *self._forget(entry), failed]

    def _forget(self, entry: Entry) -> list[Effect]:
        request_id = entry.request.request_id
        self._attempts.leave(entry)
        del self._entries[request_id]
        self._entrance.forget(entry)
        return self._moves.end(request_id)


def _may_make_room(event: Event) -> bool:
    """Tokens between the first and the last one of a request change nothing for who waits."""
    return not isinstance(event, ReplicaOutputs) or any(
        each.finish is not None or each.num_cached_tokens is not None for each in event.outputs
    )
