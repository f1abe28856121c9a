"""A workload through a router and its replicas, event by event, with faults.

    arrivals ─► RouterState ─► EngineState and pipeline of a replica
                    └──► records   ◄── outputs ──┘

At one time come results first, then KV from elsewhere, faults, arrivals, and what only looks. Two
runs of the same are the same. Not simulated: HTTP, tokenizers. Knows nothing of files or of what a
device is.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from random import Random

from shoal.core.errors import InvalidRequestError, RequestError
from shoal.core.latency import Slo
from shoal.core.request import ErrorInfo, GenerateRequest, Output
from shoal.core.stats import Computed, EngineStats, HedgeStats
from shoal.core.workload import Workload
from shoal.engine.events import Cancel as CancelRequest
from shoal.engine.events import Event as EngineEvent
from shoal.engine.events import KVEffect
from shoal.engine.events import Submit as SubmitRequest
from shoal.router.events import (
    CancelAt,
    Deliver,
    DrainReplica,
    EndLeaseAt,
    Event,
    LendAt,
    LendPrefixAt,
    PullAt,
    ReplanNeeded,
    ReplicaLost,
    ReplicaOutputs,
    ReplicaReady,
    ResumeReplica,
    Send,
    Submit,
    Tick,
)
from shoal.router.records import RouterConfig
from shoal.router.state import RouterState
from shoal.sim.faults import Fault, Faults, RequestStall, drains
from shoal.sim.handovers import Handovers
from shoal.sim.kv_links import KVLinks
from shoal.sim.kv_traffic import KVTotals
from shoal.sim.past import Past
from shoal.sim.prompts import Prompts
from shoal.sim.records import Records, Replan, RequestRecord, Sample
from shoal.sim.replica import SimulatedReplica
from shoal.sim.setup import ReplicaSetup, info_of
from shoal.sim.speeds import speeds_of
from shoal.sim.uncollected import uncollected

_TICK_S = 0.25
"""As the live router's."""
_MOST_IDLE_TICKS = 1000
"""With nothing to come: those that still wait then, wait for ever."""
_RESULT, _KV, _FAULT, _ARRIVAL, _WAKE, _TICK, _SAMPLE = range(7)


class Simulation:
    """
    Args:
        rng: the router's.
        max_waiting: requests that wait at the router; None: as many as at all engines.
        num_samples: looks at how replicas stand, about.
        runs: take runs of decode Steps at once; the results are the same.
        request_s: from a request's arrival until the router has it.
        policy, slo, hedging, collapse: the router's; requests of a trace only seem to be the same
            where it says that they begin alike, and who joins one gets what runs have told so far.
        knows_speeds: the router knows what Steps cost; otherwise it learns that.
        kv_links: over which KV gets from one replica to another, if any request leaves its replica
            (roles, drains); None: requests move without it.

    Raises:
        ConfigError: faults of what there is not; prompts without a length.
    """

    def __init__(
        self,
        workload: Workload,
        replicas: Sequence[ReplicaSetup],
        rng: Random,
        *,
        faults: Sequence[Fault | RequestStall] = (),
        max_waiting: int | None = None,
        num_samples: int = 120,
        runs: bool = True,
        request_s: float = 0.0,
        policy: str = "predicted",
        slo: Slo | None = None,
        knows_speeds: bool = True,
        hedging: bool = True,
        collapse: bool = False,
        kv_links: KVLinks | None = None,
    ) -> None:
        self._faults = Faults(faults, replicas, len(workload.arrivals))
        self._setups = {each.name: each for each in replicas}
        self._names = tuple(self._setups)
        self._numbers = {name: number for number, name in enumerate(self._names)}
        longest = max((each.config.max_model_len for each in replicas), default=0)
        self._prompts = Prompts(workload, most_tokens=longest + 1)
        self._runs = runs
        self._request_s = request_s
        self._may_move = any(each.role != "any" for each in replicas) or drains(faults)
        self._handovers = self._linked(kv_links) if self._may_move and kv_links else None
        config = RouterConfig(
            replicas=tuple(self._setups),
            max_waiting=max_waiting or sum(each.config.max_waiting for each in replicas),
            roles={each.name: each.role for each in replicas},
            moves_kv=self._handovers is not None,
            policy=policy,
            speeds=speeds_of(replicas) if knows_speeds else {},
            slo=slo,
            hedging=hedging,
            collapse=collapse,
        )
        self._router = RouterState(config, rng)
        self._replicas: dict[str, SimulatedReplica] = {}
        self._incarnations = dict.fromkeys(self._setups, -1)
        self._past = {each.name: Past(len(each.config.instance_blocks)) for each in replicas}
        self._context_tokens: int | None = None  # as the router knows it; None: to be asked
        # (when, kind, number); a replica that has something else to do by then is passed over.
        self._agenda: list[tuple[float, int, int]] = []
        self._news: deque[tuple[Event, Sequence[float]]] = deque()
        arrivals = workload.arrivals
        self._records = Records([RequestRecord(a.arrival_s, a.prompt_tokens) for a in arrivals])
        self._num_open = len(arrivals)
        self._now = 0.0
        self._wakes_s = math.inf
        self._num_idle_ticks = 0
        self._most_samples = 2 * num_samples
        self._sample_every_s = max(workload.duration_s, 1.0) / num_samples

    @uncollected()
    def run(self, until_s: float = math.inf) -> Records:
        """Until every request has ended, nothing more can happen, or that time has come."""
        for name in self._setups:
            if not self._faults.joins_later(name):
                self._join(name, 0.0)
        self._hear()
        for index, fault in enumerate(self._faults.timed):
            self._push(fault.at_s, _FAULT, index)
        self._push(0.0, _TICK, 0)
        self._push(0.0, _SAMPLE, 0)
        if self._num_open:
            self._push(self._records.requests[0].arrival_s + self._request_s, _ARRIVAL, 0)
        while self._num_open and self._num_idle_ticks < _MOST_IDLE_TICKS:
            if self._agenda[0][0] > until_s:
                self._now = until_s
                break
            self._now, kind, number = heapq.heappop(self._agenda)
            self._happen(self._now, kind, number)
        for name in self._replicas:
            self._catch_up(name)
        self._hear()
        self._records.end_s = self._now
        self._sample(self._now)
        return self._records

    def stats(self) -> dict[str, EngineStats]:
        """Of each replica, counters of all its incarnations together."""
        return {name: past.stats(self._replicas.get(name)) for name, past in self._past.items()}

    @property
    def hedges(self) -> HedgeStats:
        return self._router.hedges

    @property
    def kv_moved(self) -> KVTotals:
        """Between replicas."""
        return KVTotals() if self._handovers is None else self._handovers.totals

    def check_integrity(self) -> None:
        """For tests."""
        self._router.check_integrity()
        for replica in self._replicas.values():
            replica.check_integrity()

    # --- the agenda ---

    def _push(self, when: float, kind: int, number: int) -> None:
        heapq.heappush(self._agenda, (when, kind, number))

    def _happen(self, now: float, kind: int, number: int) -> None:
        """One thing of the agenda, and what follows from it at once."""
        if kind == _RESULT:
            self._wake(self._names[number], now)
        elif kind == _KV:
            assert self._handovers is not None, "nothing else comes back for KV"
            self._handovers.arrive(now)
        elif kind == _FAULT:
            self._strike(self._faults.timed[number], now)
        elif kind == _ARRIVAL:
            self._arrive(number, now)
        elif kind == _WAKE:
            if now != self._wakes_s:
                return  # an earlier one came, and has asked for those that follow
            self._wakes_s = math.inf
            self._look(now)
        elif kind == _TICK:
            self._tick(now)
        else:
            self._sample(now)
            self._push(now + self._sample_every_s, _SAMPLE, 0)
        self._hear()
        wake_s = self._router.wake_s
        if wake_s is not None and wake_s < self._wakes_s:
            self._wakes_s = max(wake_s, now)
            self._push(self._wakes_s, _WAKE, 0)

    def _wake(self, name: str, now: float) -> None:
        if (replica := self._replicas.get(name)) is not None and replica.next_s == now:
            replica.advance(now)
            self._settle(name)

    def _arrive(self, number: int, now: float) -> None:
        if (error := self._too_long(number)) is not None:
            refused = Output(request_id=str(number), finish="error", error=ErrorInfo.of(error))
            self._deliver([refused], (now,))
        else:
            self._tell_router(Submit(self._prompts.request(number)), now)
        if number + 1 < len(self._records.requests):
            arrival_s = self._records.requests[number + 1].arrival_s + self._request_s
            self._push(arrival_s, _ARRIVAL, number + 1)

    def _too_long(self, number: int) -> RequestError | None:
        """Why a server would not hand it to its router."""
        if self._context_tokens is None and (info := self._router.info) is not None:
            self._context_tokens = info.max_model_len
        wanted, most = self._prompts.num_tokens(number), self._context_tokens
        if most is None or wanted <= most:
            return None
        return InvalidRequestError(
            f"prompt and output have {wanted} tokens; the context is {most} tokens",
            code="context_length_exceeded",
        )

    def _tick(self, now: float) -> None:
        is_idle = all(kind >= _WAKE for _, kind, _ in self._agenda)
        self._num_idle_ticks = self._num_idle_ticks + 1 if is_idle else 0
        self._look(now)
        self._push(now + _TICK_S, _TICK, 0)

    def _look(self, now: float) -> None:
        """The router does, once it has been told what those said who seem silent to it."""
        for name in self._names if self._may_move else self._router.doubted(now):
            self._catch_up(name)
        self._tell_router(Tick(), now)

    def _sample(self, now: float) -> None:
        """How all replicas stand; every other look is forgotten when there are too many."""
        samples = self._records.samples
        looks = (past.sample(self._replicas.get(name), now) for name, past in self._past.items())
        samples.append(Sample(now, tuple(looks)))
        if len(samples) > self._most_samples:
            del samples[1::2]
            self._sample_every_s *= 2

    # --- replicas ---

    def _catch_up(self, name: str) -> None:
        """With what is due by now, so that the router knows of it."""
        if (replica := self._replicas.get(name)) is not None:
            replica.catch_up(self._now)
            self._settle(name)

    def _settle(self, name: str) -> None:
        """Come back when the replica has something to do."""
        if (when := self._replicas[name].next_s) is not None:
            self._push(when, _RESULT, self._numbers[name])

    def _join(self, name: str, now: float) -> None:
        if name in self._replicas:
            return
        self._incarnations[name] += 1
        incarnation, setup = self._incarnations[name], self._setups[name]
        config = replace(setup.config, vocab_size=self._prompts.vocab_size, eos_token_ids=())

        def report(outputs: Sequence[Output], times: Sequence[float], computed: Computed) -> None:
            self._news.append((ReplicaOutputs(name, incarnation, outputs, computed), times))

        def hand_over(effect: KVEffect, when: float) -> None:
            assert self._handovers is not None, "the router asks for none"
            self._handovers.heard(name, incarnation, config.model_digest, effect, when)

        self._replicas[name] = SimulatedReplica(
            config,
            setup.cost,
            report,
            self._records.note_started,
            hand_over,
            # A replica for prompts hands each request on as soon as its first token is out.
            runs=self._runs and setup.role != "prefill",
            tells_late=not self._may_move,
        )
        self._context_tokens = None
        self._tell_router(ReplicaReady(name, incarnation, info_of(setup)), now)

    def _lose(self, name: str, now: float) -> None:
        replica = self._replicas.get(name)
        if replica is None:
            return
        replica.catch_up(now)
        self._past[name].add(self._replicas.pop(name))
        self._context_tokens = None
        if self._handovers is not None:
            self._handovers.lost(name, now)
        self._tell_router(ReplicaLost(name, self._incarnations[name], "simulated"), now)

    def _strike(self, fault: Fault, now: float) -> None:
        name, instance = fault.replica, fault.instance
        if instance is None and fault.kind in ("join", "lose"):
            self._join(name, now) if fault.kind == "join" else self._lose(name, now)
            return
        if fault.kind in ("drain", "resume"):
            self._catch_up(name)
            event = DrainReplica(name) if fault.kind == "drain" else ResumeReplica(name)
            self._tell_router(event, now)
            return
        replica = self._replicas.get(name)
        if replica is None:
            return
        if fault.kind == "slow":
            replica.slow_down(instance, fault.speed, now)
        elif fault.kind == "stall":
            replica.stall(fault.seconds, now)
        elif fault.kind == "lose":
            replica.fail(instance or 0, now)
        else:
            replica.restore(instance or 0, now)
        self._settle(name)

    # --- the router ---

    def _tell_router(self, event: Event, now: float) -> None:
        self._news.append((event, (now,)))

    def _hear(self) -> None:
        """Tell the router its news in order; what follows may make replicas say more."""
        while self._news:
            event, times = self._news.popleft()
            for effect in self._router.handle(event, times[-1]):
                match effect:
                    case Deliver(outputs):
                        self._deliver(outputs, times)
                    case Send(name, request):
                        self._send(name, request)
                    case LendAt() | LendPrefixAt() | PullAt() | EndLeaseAt() if self._handovers:
                        self._handovers.ask(effect)
                    case CancelAt(name, request_id):
                        self._tell_replica(name, CancelRequest(request_id))
                    case ReplanNeeded(name, lag):
                        self._records.replans.append(Replan(times[-1], name, lag))
                    case _:
                        raise AssertionError(f"nobody asked for {type(effect).__name__}")

    def _linked(self, links: KVLinks) -> Handovers:
        return Handovers(
            links,
            tell_replica=self._tell_replica,
            catch_up=self._catch_up,
            tell_router=lambda event: self._tell_router(event, self._now),
            come_back=lambda when: self._push(max(when, self._now), _KV, 0),
        )

    def _send(self, name: str, request: GenerateRequest) -> None:
        """If it is elsewhere too, whoever says the next token first goes on with it."""
        is_first = request.request_id == str(request.sampling.seed)
        for other, replica in {} if is_first else self._replicas.items():
            if replica.race(request.sampling.seed, self._now):
                self._settle(other)
        stall_s = self._faults.stall_s(request.request_id)
        if stall_s and name in self._replicas:
            self._replicas[name].stall(stall_s, self._now)
        self._tell_replica(name, SubmitRequest(request))

    def _tell_replica(self, name: str, event: EngineEvent) -> None:
        # One that was lost since takes nothing; the router hears of that next.
        if name in self._replicas:
            self._replicas[name].tell(event, self._now)
            self._settle(name)

    def _deliver(self, outputs: Sequence[Output], times: Sequence[float]) -> None:
        if len(times) > 1:
            self._records.gaps.add_run(len(outputs), times)
        for output in outputs:
            self._records.note(int(output.request_id), output, times)
            self._num_open -= output.finish is not None
