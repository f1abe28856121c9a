"""Requests that move from one simulated replica to another, with their KV.

    router     LendAt, PullAt, ...  ─► Lend, Receive, ...    to a replica's engine
    engines    LendKV, PullKV, ...  ─► KVTraffic, and KVLent, KVPulled to the router

Knows nothing of which requests move, or why.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from shoal.core.kv import KVOffer
from shoal.engine.events import (
    DropKV,
    EndLease,
    EndLoan,
    GrowLoan,
    KVEffect,
    Lend,
    LendKV,
    LendPrefix,
    PullKV,
    Receive,
    StopKV,
    TellPulled,
)
from shoal.engine.events import Event as EngineEvent
from shoal.router.events import (
    EndLeaseAt,
    KVLent,
    KVPulled,
    LendAt,
    LendPrefixAt,
    PullAt,
)
from shoal.sim.kv_links import KVLinks
from shoal.sim.kv_traffic import Arrival, KVTotals, KVTraffic

Asked = LendAt | LendPrefixAt | PullAt | EndLeaseAt
"""Of replicas, by a router."""


class Handovers:
    """
    Args:
        tell_replica: an event to the engine of that name, at the present time.
        catch_up: let a replica do and say what is due.
        tell_router: what a replica said.
        come_back: call `arrive` at that time, or at once if it has passed.
    """

    def __init__(
        self,
        links: KVLinks,
        *,
        tell_replica: Callable[[str, EngineEvent], None],
        catch_up: Callable[[str], None],
        tell_router: Callable[[KVLent | KVPulled], None],
        come_back: Callable[[float], None],
    ) -> None:
        self._traffic = KVTraffic(links)
        self._tell_replica, self._catch_up = tell_replica, catch_up
        self._tell_router, self._come_back = tell_router, come_back
        self._sources: dict[int, str] = {}  # of what was asked for, by move
        self._over: list[Arrival] = []  # of pulls, for who asked
        self._next_s = math.inf

    @property
    def totals(self) -> KVTotals:
        return self._traffic.totals

    def ask(self, effect: Asked) -> None:
        """What a router wants done."""
        match effect:
            case LendAt(name, move_id, request_id, ttl_s, ahead):
                self._sources[move_id] = name
                self._tell_replica(name, Lend(move_id, request_id, ttl_s, ahead))
            case LendPrefixAt(name, move_id, names, ttl_s):
                self._sources[move_id] = name
                self._tell_replica(name, LendPrefix(move_id, names, ttl_s))
            case PullAt(name, offer, ttl_s):
                self._tell_replica(name, Receive(offer, ttl_s))
            case EndLeaseAt(name, move_id):
                self._sources.pop(move_id, None)
                self._tell_replica(name, EndLease(move_id))

    def heard(
        self, replica: str, incarnation: int, digest: str, effect: KVEffect, now: float
    ) -> None:
        """What a replica's engine wants done."""
        match effect:
            case LendKV(loan, names):
                if names:
                    self._traffic.lend(replica, loan)
                offer = KVOffer(loan.lease_id, digest, names, ())
                self._tell_router(KVLent(replica, incarnation, offer))
            case GrowLoan(loan):
                self._traffic.grow(loan, now)
            case EndLoan(lease_id):
                self._over += self._traffic.end_loan(lease_id, now)
            case PullKV(pull):
                self._over += self._traffic.pull(replica, pull, now)
            case StopKV(pull_id):
                self._over += self._traffic.stop(pull_id, now)
            case DropKV(pull_id):
                self._traffic.drop(pull_id)
            case TellPulled(pull_id, num_blocks):
                # The request leaves its replica then: nothing that it said there may be missing.
                if (source := self._sources.get(pull_id)) is not None:
                    self._catch_up(source)
                self._tell_router(KVPulled(replica, incarnation, pull_id, num_blocks))
            case _:
                raise AssertionError(f"nobody asked for {type(effect).__name__}")
        self._plan()

    def arrive(self, now: float) -> None:
        """What is there by now."""
        self._next_s = math.inf
        arrivals, self._over = [*self._over, *self._traffic.due(now)], []
        for each in arrivals:
            self._tell_replica(each.replica, each.event)
        self._plan()

    def lost(self, replica: str, now: float) -> None:
        """It is gone, with what it lent and what it waited for."""
        self._over = [each for each in self._over if each.replica != replica]
        self._over += self._traffic.lost(replica, now)
        self._plan()

    def _plan(self) -> None:
        """Replicas are told when they are done with what they do now."""
        next_s = -math.inf if self._over else self._traffic.next_s
        if next_s < self._next_s:
            self._next_s = next_s
            self._come_back(next_s)
