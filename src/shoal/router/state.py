"""The router: which replica serves a request, and what happens when that replica is lost.

`handle(event, now)` returns effects; no I/O, no clock. A request goes to the live replica
with the fewest outstanding ones, and may move to another while it runs: off a replica that is
drained, from one that starts requests (role prefill) to one that goes on with them, or to even
out what each has (`router/moves.py`). What it has produced is remembered, so that a lost replica's
requests go on elsewhere from their last token, none lost or repeated. While no replica is
alive, requests wait, bounded in number and time. Every request gets exactly one Output with
`finish`.
"""

from __future__ import annotations

import dataclasses
import random

from shoal.core.errors import QueueFullError, RequestError, RequestTimeoutError, UnavailableError
from shoal.core.request import ErrorInfo, GenerateRequest, Output
from shoal.core.stats import EngineInfo
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
from shoal.router.moves import Move, Moves
from shoal.router.records import Entry, Replica, RouterConfig


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
        self._moves = Moves(config, self._replicas, self._entries)
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

    @property
    def any_alive(self) -> bool:
        """Whether a request would be served now."""
        return any(replica.alive for replica in self._replicas.values())

    def outstanding(self) -> dict[str, int]:
        """Requests at each replica."""
        return {name: len(replica.outstanding) for name, replica in self._replicas.items()}

    @property
    def alive(self) -> frozenset[str]:
        """Replicas that run."""
        return frozenset(each.name for each in self._replicas.values() if each.alive)

    @property
    def drained(self) -> frozenset[str]:
        """Replicas that no request is sent to."""
        return frozenset(each.name for each in self._replicas.values() if each.is_drained)

    def check_integrity(self) -> None:
        """Raises AssertionError if the books don't balance; for tests."""
        placed: dict[str, None] = {}
        for replica in self._replicas.values():
            assert replica.alive or not replica.outstanding
            for request_id in replica.outstanding:
                assert self._entries[request_id].replica == replica.name
                assert request_id not in placed
                placed[request_id] = None
        assert placed.keys() | self._homeless.keys() == self._entries.keys()
        assert not placed.keys() & self._homeless.keys()
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
                self._replicas[name].is_drained = True
                return self._move_on(now)
            case ResumeReplica(name):
                self._replicas[name].is_drained = False
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
            return [_failed(request.request_id, refusal)]
        if request.sampling.seed is None:
            seeded = dataclasses.replace(request.sampling, seed=self._rng.getrandbits(63))
            request = dataclasses.replace(request, sampling=seeded)
        deadline = None if request.timeout_s is None else now + request.timeout_s
        self._entries[request.request_id] = Entry(request, deadline, list(request.output_ids))
        return self._place(request.request_id, now)

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
        orphans, replica.outstanding = list(replica.outstanding), {}
        effects: list[Effect] = []
        for move in self._moves.with_target(event.replica):
            effects += self._moves.end(move.request_id)
        for request_id in orphans:
            entry = self._entries[request_id]
            entry.replica = None
            entry.num_attempts += 1
            bound_for = self._moves.target_of(request_id)
            effects += self._moves.end(request_id)
            if entry.num_attempts >= self._config.max_attempts:
                error = RequestError(
                    f"the replicas serving this request were lost {entry.num_attempts} times, "
                    f"last: {event.reason}",
                    code="replica_lost",
                )
                effects += self._fail(request_id, error)
            else:
                effects += self._place(request_id, now, bound_for)
        if self._hopeless:
            for request_id in list(self._homeless):
                effects += self._fail(request_id, _no_replica(event.reason))
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
            if output.num_cached_tokens is not None and entry.has_begun:
                # Said already, by a replica that was lost since or in an earlier output.
                output = dataclasses.replace(output, num_cached_tokens=None)
            entry.output_ids += output.token_ids
            if output.finish is not None:
                effects += self._forget(request_id)
            elif replica.role == "prefill" and request_id not in self._moves:
                effects += self._begin_move(request_id, now)
            outputs.append(output)
        return [Deliver(outputs), *effects]

    # --- moving ---

    def _move_on(self, now: float) -> list[Effect]:
        """Moves that take too long, then those that are due."""
        effects: list[Effect] = []
        for move in self._moves.overdue(now):
            if move.is_needed:
                effects += self._hand_over(move, now)
            else:
                effects += self._moves.end(move.request_id)
        for request_id in self._moves.due():
            effects += self._begin_move(request_id, now)
        if not effects and (chosen := self._moves.for_balance()) is not None:
            effects = self._begin_move(chosen, now, is_needed=False)
        return effects

    def _begin_move(self, request_id: str, now: float, *, is_needed: bool = True) -> list[Effect]:
        """Off its replica, to a better one; nothing happens if there is none."""
        source, target = self._entries[request_id].replica, self._moves.better_place(request_id)
        if source is None or target is None:
            return []
        if self._config.moves_kv:
            return self._moves.begin(request_id, source, target, now, is_needed=is_needed)
        return self._send_over(request_id, source, target, now)

    def _lent(self, event: KVLent, now: float) -> list[Effect]:
        move = self._moves.get(event.offer.lease_id)
        if move is None or move.source != event.replica:
            return [EndLeaseAt(event.replica, event.offer.lease_id)]
        if event.offer.names:
            return [PullAt(move.target, event.offer, self._config.move_timeout_s)]
        return self._hand_over(move, now)

    def _pulled(self, event: KVPulled, now: float) -> list[Effect]:
        move = self._moves.get(event.move_id)
        if move is None or move.target != event.replica:
            return []
        return self._hand_over(move, now)

    def _hand_over(self, move: Move, now: float) -> list[Effect]:
        return [
            *self._moves.end(move.request_id),
            *self._send_over(move.request_id, move.source, move.target, now),
        ]

    def _send_over(self, request_id: str, source: str, target: str, now: float) -> list[Effect]:
        """From now on what the old replica says of it counts no more."""
        entry = self._entries[request_id]
        cancel = CancelAt(source, entry.sent_id)
        del self._replicas[source].outstanding[request_id]
        self._sent.pop(entry.sent_id, None)
        entry.replica = None
        entry.num_moves += 1
        self._sent[entry.sent_id] = request_id
        return [cancel, *self._place(request_id, now, target)]

    def _abandon(self) -> list[Effect]:
        error = UnavailableError("the server is shutting down", code="shutting_down")
        effects: list[Effect] = []
        for request_id in list(self._entries):
            effects += self._fail(request_id, error)
        return effects

    def _expire(self, now: float) -> list[Effect]:
        effects: list[Effect] = []
        for request_id, entry in list(self._entries.items()):
            if entry.deadline is not None and now >= entry.deadline:
                error = RequestTimeoutError(
                    f"the request ran past its limit of {entry.request.timeout_s:g} s; raise the "
                    f"limit or lower max_tokens",
                    code="timeout",
                )
                effects += self._fail(request_id, error)
            elif request_id in self._homeless and now >= self._homeless_deadline(entry):
                effects += self._fail(request_id, _no_replica("none became ready in time"))
        return effects

    # --- one request ---

    def _refusal(self, request: GenerateRequest) -> RequestError | None:
        if self._draining:
            return UnavailableError(
                "the server is shutting down", code="draining", retry_after_s=5.0
            )
        if request.request_id in self._entries:
            return RequestError(
                f"request id {request.request_id!r} is in use", code="duplicate_request_id"
            )
        if self._hopeless:
            return _no_replica("every replica has failed for good")
        if not self.any_alive and len(self._homeless) >= self._config.max_homeless:
            return QueueFullError(
                f"no replica is ready yet and {len(self._homeless)} requests already wait",
                code="queue_full",
                retry_after_s=1.0,
            )
        return None

    @property
    def _hopeless(self) -> bool:
        return all(replica.gone_for_good for replica in self._replicas.values())

    def _homeless_deadline(self, entry: Entry) -> float:
        return entry.homeless_since + self._config.homeless_timeout_s

    def _place(self, request_id: str, now: float, wanted: str | None = None) -> list[Effect]:
        """Send it to the live replica with the fewest outstanding requests, or let it wait.

        Args:
            wanted: where its KV is; taken if requests may be sent there.
        """
        entry = self._entries[request_id]
        fit = self._moves.fit(entry.has_begun)
        if not fit:
            entry.homeless_since = now
            self._homeless[request_id] = None
            return []
        has_kv = [each for each in fit if each.name == wanted]
        replica = min(has_kv or fit, key=self._moves.load)
        replica.outstanding[request_id] = None
        entry.replica = replica.name
        sampling = entry.request.sampling
        if entry.has_begun:
            # They came with the first token.
            sampling = dataclasses.replace(sampling, prompt_logprobs=None)
        request = dataclasses.replace(
            entry.request,
            request_id=entry.sent_id,
            sampling=sampling,
            output_ids=tuple(entry.output_ids),
            timeout_s=None if entry.deadline is None else max(entry.deadline - now, 0.001),
        )
        return [Send(replica.name, request)]

    def _fail(self, request_id: str, error: RequestError) -> list[Effect]:
        return [*self._withdraw(request_id), _failed(request_id, error)]

    def _withdraw(self, request_id: str) -> list[Effect]:
        entry = self._entries[request_id]
        cancels = [] if entry.replica is None else [CancelAt(entry.replica, entry.sent_id)]
        return [*self._forget(request_id), *cancels]

    def _forget(self, request_id: str) -> list[Effect]:
        entry = self._entries.pop(request_id)
        self._sent.pop(entry.sent_id, None)
        self._homeless.pop(request_id, None)
        if entry.replica is not None:
            del self._replicas[entry.replica].outstanding[request_id]
        return self._moves.end(request_id)


def _no_replica(reason: str) -> UnavailableError:
    return UnavailableError(
        f"no replica of the model is available: {reason}", code="no_replica", retry_after_s=5.0
    )


def _failed(request_id: str, error: RequestError) -> Deliver:
    return Deliver([Output(request_id=request_id, finish="error", error=ErrorInfo.of(error))])
