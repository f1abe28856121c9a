"""The live driver of `RouterState`, on one asyncio loop.

    async for output in router.generate(request): ...

Knows nothing of HTTP; replicas are reached through their clients.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import sys
from collections.abc import AsyncGenerator, Collection, Sequence
from typing import Protocol

from shoal.core.clock import Clock
from shoal.core.errors import RequestError
from shoal.core.kv import KVOffer
from shoal.core.plan import ReplicaPlan
from shoal.core.record import Recorder
from shoal.core.request import GenerateRequest, Output
from shoal.core.stats import EngineInfo, EngineStats, EntranceStats, HedgeStats, Lag, ReplicaView
from shoal.core.step_times import InstanceStep, ReplicaSteps
from shoal.router.events import (
    Abandon,
    Cancel,
    CancelAt,
    Deliver,
    Drain,
    DrainReplica,
    EndLeaseAt,
    Event,
    LendAt,
    LendPrefixAt,
    PullAt,
    ReplanNeeded,
    ReplicaLost,
    ResumeReplica,
    Send,
    Submit,
    Tick,
)
from shoal.router.inbox import Inbox, Take
from shoal.router.state import RouterState

log = logging.getLogger(__name__)

_TICK_S = 0.25
_ANY_INCARNATION = sys.maxsize


class ReplicaClient(Protocol):
    """How the router reaches a replica (`router/engine_client.py`, or a fake in tests)."""

    name: str

    @property
    def stats(self) -> EngineStats: ...

    @property
    def plan(self) -> ReplicaPlan | None: ...

    @property
    def steps_taken(self) -> Collection[InstanceStep]: ...

    def send(self, request: GenerateRequest) -> None: ...

    def cancel(self, request_id: str) -> None: ...

    def lend(self, lease_id: int, request_id: str, ttl_s: float, *, ahead: bool) -> None: ...

    def lend_prefix(self, lease_id: int, names: tuple[bytes, ...], ttl_s: float) -> None: ...

    def end_lease(self, lease_id: int) -> None: ...

    def receive(self, offer: KVOffer, ttl_s: float) -> None: ...

    def drain_instance(self, instance: int, *, is_drained: bool) -> None: ...

    async def run(self, router: Router) -> None:
        """Keep the replica alive and tell the router its news, until cancelled."""
        ...

    async def close(self) -> None: ...


class Router:
    """Serves requests from the replicas behind `clients`. Use as an async context manager.

    Args:
        recorder: told of every event and what was decided.
    """

    def __init__(
        self,
        state: RouterState,
        clients: list[ReplicaClient],
        clock: Clock,
        recorder: Recorder | None = None,
    ) -> None:
        self._state = state
        self._recorder = recorder
        self._clients = {client.name: client for client in clients}
        self._clock = clock
        self._inboxes: dict[str, Inbox] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._tasks: list[asyncio.Task[None]] = []
        self._num_sent = dict.fromkeys(self._clients, 0)
        self._last_token_s: float | None = None
        self._wake: asyncio.TimerHandle | None = None
        self._wakes_s = math.inf

    async def __aenter__(self) -> Router:
        runners = [self._run_client(client) for client in self._clients.values()]
        self._tasks = [asyncio.create_task(task) for task in [*runners, self._tick()]]
        return self

    async def __aexit__(self, *_exc: object) -> None:
        self.tell(Abandon())
        for task in self._tasks:
            task.cancel()
        if self._wake is not None:
            self._wake.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(client.close() for client in self._clients.values()))
        if self._recorder is not None:
            self._recorder.close()

    # --- for the server ---

    async def generate(
        self, request: GenerateRequest, take: Take | None = None
    ) -> AsyncGenerator[Output, None]:
        """Outputs of a request; the last one has `finish`. Leaving early cancels it.

        Whoever falls behind gets what came meanwhile as one output.

        Args:
            take: asked first about what comes while the reader waits; must not raise.
        """
        inbox = Inbox(take)
        if request.request_id in self._inboxes:
            raise ValueError(f"request id {request.request_id!r} is in use")
        self._inboxes[request.request_id] = inbox
        self._idle.clear()
        is_over = False
        try:
            self.tell(Submit(request))
            while not is_over:
                output = await inbox.get()
                is_over = output.finish is not None
                yield output
        finally:
            del self._inboxes[request.request_id]
            if not is_over:
                self.tell(Cancel(request.request_id))
            if not self._inboxes:
                self._idle.set()

    async def drain(self, timeout_s: float) -> bool:
        """Admit nothing more and wait for what runs; False if time ran out first."""
        self.tell(Drain())
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            self.tell(Abandon())
            # Let the streams see their last event.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), 1.0)
            return False
        return True

    @property
    def num_in_flight(self) -> int:
        return self._state.num_in_flight

    @property
    def info(self) -> EngineInfo | None:
        """What a request may count on; None until a replica has been ready."""
        return self._state.info

    @property
    def last_token_s(self) -> float | None:
        """When the last token came, on the router's clock."""
        return self._last_token_s

    @property
    def ready(self) -> bool:
        """Whether a replica is alive and requests are admitted."""
        return bool(self._state.alive) and not self._state.draining

    def stats(self) -> dict[str, EngineStats]:
        """What each replica last said of itself."""
        return {name: client.stats for name, client in self._clients.items()}

    def steps(self, name: str) -> ReplicaSteps:
        """What a replica's latest Steps took."""
        client = self._clients[name]
        info = self.info
        return ReplicaSteps(client.plan, info.dtype if info else "", tuple(client.steps_taken))

    @property
    def hedges(self) -> HedgeStats:
        """Counters of second attempts."""
        return self._state.hedges

    @property
    def entrance(self) -> EntranceStats:
        """What came of requests before they had a replica."""
        return self._state.entrance

    def why_full(self, salt: str, priority: int) -> RequestError | None:
        """Why a request of that tenant would be refused now; None: it depends on what it asks."""
        return self._state.refusal(salt, priority, self._clock.now())

    def replicas(self) -> dict[str, ReplicaView]:
        """How each replica stands to requests."""
        outstanding, alive = self._state.outstanding(), self._state.alive
        now = self._clock.now()
        prospects, lags = self._state.prospects(now), self._state.stragglers(now)
        return {
            name: ReplicaView(
                name in alive,
                name in self._state.drained,
                outstanding[name],
                prospects.get(name),
                lags.get(name),
                self._num_sent[name],
            )
            for name in self._clients
        }

    def drain_replica(self, name: str) -> None:
        """Move what runs there elsewhere, and send nothing more until `resume_replica`."""
        self.tell(DrainReplica(name))

    def resume_replica(self, name: str) -> None:
        self.tell(ResumeReplica(name))

    def drain_instance(self, name: str, instance: int, *, is_drained: bool) -> None:
        """Let requests of a replica leave one of its instances, or come to it again."""
        self._clients[name].drain_instance(instance, is_drained=is_drained)

    # --- for replica clients ---

    def tell(self, event: Event) -> None:
        """Handle an event and carry out what it asks for."""
        now = self._clock.now()
        effects = self._state.handle(event, now)
        if self._recorder is not None:
            self._recorder.note(now, event, effects)
        for effect in effects:
            match effect:
                case Deliver(outputs):
                    self._deliver(outputs, now)
                case Send(replica, request):
                    self._num_sent[replica] += 1
                    self._clients[replica].send(request)
                case CancelAt(replica, request_id):
                    self._clients[replica].cancel(request_id)
                case LendAt(replica, move_id, request_id, ttl_s, ahead):
                    self._clients[replica].lend(move_id, request_id, ttl_s, ahead=ahead)
                case LendPrefixAt(replica, move_id, names, ttl_s):
                    self._clients[replica].lend_prefix(move_id, names, ttl_s)
                case PullAt(replica, offer, ttl_s):
                    self._clients[replica].receive(offer, ttl_s)
                case EndLeaseAt(replica, move_id):
                    self._clients[replica].end_lease(move_id)
                case ReplanNeeded(replica, lag):
                    self._warn(replica, lag)
        wake_s = self._state.wake_s
        if wake_s is not None and wake_s < self._wakes_s:
            self._wake_at(wake_s, now)

    def _warn(self, name: str, lag: Lag) -> None:
        slow = self._clients[name].stats.slow
        instances = ", ".join(f"instance {index} {times:.1f} times" for index, times in slow)
        log.warning(
            "%s has taken %.1f times as long as usual (p95 %.1f) for %.0f s%s: re-plan needed",
            *(name, lag.p50, lag.p95, lag.lasted_s),
            f" ({instances})" if instances else "",
        )

    def _wake_at(self, when: float, now: float) -> None:
        """A `Tick` then, if nothing that is wanted sooner comes between."""
        if self._wake is not None:
            self._wake.cancel()
        self._wakes_s = when
        loop = asyncio.get_running_loop()
        self._wake = loop.call_later(max(when - now, 0.0), self._on_wake)

    def _on_wake(self) -> None:
        self._wake, self._wakes_s = None, math.inf
        self.tell(Tick())

    def _deliver(self, outputs: Sequence[Output], now: float) -> None:
        for output in outputs:
            if output.token_ids:
                self._last_token_s = now
            inbox = self._inboxes.get(output.request_id)
            if inbox is not None:
                inbox.put(output, now)

    async def _run_client(self, client: ReplicaClient) -> None:
        try:
            await client.run(self)
        except Exception:
            log.exception("%s is given up", client.name)
            reason = "its client failed; see the log"
            self.tell(ReplicaLost(client.name, _ANY_INCARNATION, reason, final=True))

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            self.tell(Tick())
