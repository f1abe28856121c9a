"""The router: which replica serves a request, and what happens when that replica is lost.

`handle(event, now)` returns effects; no I/O, no clock. A request goes to the live replica
with the fewest outstanding ones. What it has produced is remembered, so that a lost replica's
requests go on elsewhere from their last token, none lost or repeated. While no replica is
alive, requests wait, bounded in number and time. Every request gets exactly one Output with
`finish`.
"""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass, field

from shoal.core.errors import QueueFullError, RequestError, RequestTimeoutError, UnavailableError
from shoal.core.request import ErrorInfo, GenerateRequest, Output
from shoal.core.stats import EngineInfo
from shoal.router.events import (
    Abandon,
    Cancel,
    CancelAt,
    Deliver,
    Drain,
    Effect,
    Event,
    ReplicaLost,
    ReplicaOutputs,
    ReplicaReady,
    Send,
    Submit,
    Tick,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig:
    """Limits of a router.

    Attributes:
        replicas: their names.
        max_homeless: requests that may wait while no replica is alive.
        homeless_timeout_s: how long they may.
        max_attempts: replicas a request may lose before it ends in an error.
    """

    replicas: tuple[str, ...]
    max_homeless: int = 256
    homeless_timeout_s: float = 120.0
    max_attempts: int = 3


@dataclass(slots=True)
class _Replica:
    name: str
    incarnation: int = -1
    info: EngineInfo | None = None
    gone_for_good: bool = False
    outstanding: dict[str, None] = field(default_factory=dict)

    @property
    def alive(self) -> bool:
        return self.info is not None


@dataclass(slots=True)
class _Entry:
    request: GenerateRequest
    deadline: float | None
    output_ids: list[int]
    replica: str | None = None
    homeless_since: float = 0.0
    num_attempts: int = 0

    @property
    def has_begun(self) -> bool:
        """Whether tokens of it have been delivered."""
        return len(self.output_ids) > len(self.request.output_ids)


class RouterState:
    """All that a router knows of its replicas and requests.

    Args:
        rng: draws the seeds that requests don't bring.
    """

    def __init__(self, config: RouterConfig, rng: random.Random) -> None:
        self._config = config
        self._rng = rng
        self._replicas = {name: _Replica(name) for name in config.replicas}
        self._entries: dict[str, _Entry] = {}
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
                return self._outputs(event)
            case Drain():
                self._draining = True
                return []
            case Abandon():
                return self._abandon()
            case Tick():
                return self._expire(now)

    def _submit(self, request: GenerateRequest, now: float) -> list[Effect]:
        refusal = self._refusal(request)
        if refusal is not None:
            return [_failed(request.request_id, refusal)]
        if request.sampling.seed is None:
            seeded = dataclasses.replace(request.sampling, seed=self._rng.getrandbits(63))
            request = dataclasses.replace(request, sampling=seeded)
        deadline = None if request.timeout_s is None else now + request.timeout_s
        self._entries[request.request_id] = _Entry(request, deadline, list(request.output_ids))
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
        for request_id in orphans:
            entry = self._entries[request_id]
            entry.replica = None
            entry.num_attempts += 1
            if entry.num_attempts >= self._config.max_attempts:
                error = RequestError(
                    f"the replicas serving this request were lost {entry.num_attempts} times, "
                    f"last: {event.reason}",
                    code="replica_lost",
                )
                effects += self._fail(request_id, error)
            else:
                effects += self._place(request_id, now)
        if self._hopeless:
            for request_id in list(self._homeless):
                effects += self._fail(request_id, _no_replica(event.reason))
        return effects

    def _outputs(self, event: ReplicaOutputs) -> list[Effect]:
        if event.incarnation != self._replicas[event.replica].incarnation:
            return []
        outputs = []
        for output in event.outputs:
            entry = self._entries.get(output.request_id)
            if entry is None or entry.replica != event.replica:
                continue
            if output.num_cached_tokens is not None and entry.has_begun:
                # Said already, by a replica that was lost since or in an earlier output.
                output = dataclasses.replace(output, num_cached_tokens=None)
            entry.output_ids += output.token_ids
            if output.finish is not None:
                self._forget(output.request_id)
            outputs.append(output)
        return [Deliver(outputs)]

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

    def _homeless_deadline(self, entry: _Entry) -> float:
        return entry.homeless_since + self._config.homeless_timeout_s

    def _place(self, request_id: str, now: float) -> list[Effect]:
        """Send it to the live replica with the fewest outstanding requests, or let it wait."""
        entry = self._entries[request_id]
        alive = [replica for replica in self._replicas.values() if replica.alive]
        if not alive:
            entry.homeless_since = now
            self._homeless[request_id] = None
            return []
        replica = min(alive, key=lambda replica: len(replica.outstanding))
        replica.outstanding[request_id] = None
        entry.replica = replica.name
        sampling = entry.request.sampling
        if entry.has_begun:
            # They came with the first token.
            sampling = dataclasses.replace(sampling, prompt_logprobs=None)
        request = dataclasses.replace(
            entry.request,
            sampling=sampling,
            output_ids=tuple(entry.output_ids),
            timeout_s=None if entry.deadline is None else max(entry.deadline - now, 0.001),
        )
        return [Send(replica.name, request)]

    def _fail(self, request_id: str, error: RequestError) -> list[Effect]:
        return [*self._withdraw(request_id), _failed(request_id, error)]

    def _withdraw(self, request_id: str) -> list[Effect]:
        replica = self._entries[request_id].replica
        self._forget(request_id)
        return [] if replica is None else [CancelAt(replica, request_id)]

    def _forget(self, request_id: str) -> None:
        entry = self._entries.pop(request_id)
        self._homeless.pop(request_id, None)
        if entry.replica is not None:
            del self._replicas[entry.replica].outstanding[request_id]


def _no_replica(reason: str) -> UnavailableError:
    return UnavailableError(
        f"no replica of the model is available: {reason}", code="no_replica", retry_after_s=5.0
    )


def _failed(request_id: str, error: RequestError) -> Deliver:
    return Deliver([Output(request_id=request_id, finish="error", error=ErrorInfo.of(error))])
