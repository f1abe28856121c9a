"""How requests come into a router: refused, joined to one that is computed, waiting, or placed.

Also ends those whose time is up. Knows nothing of replicas but whether there are any.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Mapping

from shoal.core.errors import QueueFullError, RequestError
from shoal.core.request import GenerateRequest
from shoal.core.stats import EntranceStats
from shoal.router import refusals
from shoal.router.collapsing import Collapsing
from shoal.router.events import Effect
from shoal.router.placement import Placement
from shoal.router.records import Entry, Replica, RouterConfig
from shoal.router.waiting_room import WaitingRoom

Place = Callable[[Entry, float], list[Effect]]
"""It is sent to a replica, or waits."""
Fail = Callable[[str, RequestError], list[Effect]]
"""A request ends in an error."""


class Entrance:
    """
    Args:
        rng: draws the seeds that requests don't bring.
        replicas, entries, placement: the router's.
        place, fail: what it does to a request.

    Attributes:
        is_shut: nobody comes in any more.
    """

    def __init__(
        self,
        config: RouterConfig,
        rng: random.Random,
        replicas: Mapping[str, Replica],
        entries: dict[str, Entry],
        placement: Placement,
        place: Place,
        fail: Fail,
    ) -> None:
        self._rng, self._replicas, self._entries = rng, replicas, entries
        self._stranded_timeout_s = config.stranded_timeout_s
        self._ttft_s = None if config.slo is None else config.slo.ttft_s
        self._placement, self._place, self._fail = placement, place, fail
        self.room = WaitingRoom(config, placement)
        self.collapsing = Collapsing(is_on=config.collapse)
        # Those that time alone may end.
        self._timed: dict[str, Entry] = {}
        self.is_shut = False
        self._num_refused = 0

    @property
    def stats(self) -> EntranceStats:
        return EntranceStats(
            num_waiting=len(self.room),
            num_refused=self._num_refused,
            num_collapsed=self.collapsing.num_collapsed,
        )

    @property
    def is_hopeless(self) -> bool:
        """No replica will ever come back."""
        return all(replica.gone_for_good for replica in self._replicas.values())

    def check_integrity(self) -> None:
        """For tests."""
        waiting = {each for each, entry in self._entries.items() if entry.lead is None}
        assert {each.request.request_id for each in self.room} == waiting
        assert len(self.room) == len(waiting)
        timed = (each for each, entry in self._entries.items() if entry.deadline is not None)
        assert self._timed.keys() == set(timed)
        self.collapsing.check_integrity()

    def submit(self, request: GenerateRequest, now: float) -> list[Effect]:
        if request.request_id in self._entries or request.request_id in self.collapsing:
            return [refusals.failed(request.request_id, refusals.id_in_use(request.request_id))]
        closed = self._closed()
        self._placement.waited(self.room.longest_s(now))
        if closed is not None:
            return [refusals.failed(request.request_id, closed)]
        if self.collapsing.join(request, now):
            return []
        entry = self._entry(request, now)
        refusal = self.room.refusal(request.salt, request.priority, entry, now)
        if refusal is not None:
            self._num_refused += 1
            return [refusals.failed(request.request_id, refusal)]
        self._enter(entry, request, now)
        if self.room.is_passed_by(entry):
            return self._place(entry, now)
        self.room.put(entry, now)
        displaced = self.room.displaced(now)
        return [] if displaced is None else self._fail(*displaced)

    def refusal(self, salt: str, priority: int, now: float) -> RequestError | None:
        """Why a request of that tenant would not be let in now, whatever it asks."""
        full = self._closed() or self.room.refusal(salt, priority, None, now)
        self._num_refused += isinstance(full, QueueFullError)
        return full

    def serve(self, now: float) -> list[Effect]:
        """Those that wait, as long as somebody has room for them."""
        effects: list[Effect] = []
        self._placement.waited(self.room.longest_s(now))
        while (entry := self.room.take_first(now)) is not None:
            effects += self._place(entry, now)
            assert entry.lead is not None, "somebody has room for it"
        return effects

    def expire(self, now: float) -> list[Effect]:
        effects: list[Effect] = []
        for request_id, entry in list(self._timed.items()):
            if entry.deadline is not None and now >= entry.deadline:
                effects += self._fail(request_id, refusals.out_of_time(entry.request))
        for request_id, request in self.collapsing.overdue(now):
            effects += self._fail(request_id, refusals.out_of_time(request))
        for entry in self._stranded(now):
            error = refusals.cannot_go_on("it did not come back in time")
            effects += self._fail(entry.request.request_id, error)
        if any(each.alive for each in self._replicas.values()):
            return effects
        for entry in self.room.overdue(now):
            error = refusals.no_replica("none became ready in time")
            effects += self._fail(entry.request.request_id, error)
        return effects

    def _stranded(self, now: float) -> list[Entry]:
        """Those that have begun, and are not to wait any longer for somebody who can go on."""
        stranded, replicas = self.room.stranded(), self._replicas.values()
        if not any(each.may_go_on for each in replicas):
            return stranded
        if not any(each.alive for each in replicas):
            return []  # asking again would not help either
        return [each for each in stranded if now >= each.waited_until_s(self._stranded_timeout_s)]

    def forget(self, entry: Entry) -> None:
        """It is over."""
        self.room.remove(entry)
        self.room.ended(entry)
        self._timed.pop(entry.request.request_id, None)

    def _entry(self, given: GenerateRequest, now: float) -> Entry:
        """Of a request that has not come in yet."""
        can_share = self.collapsing.can_share(given)
        sampling, timeout_s = given.sampling, None if can_share else given.timeout_s
        if sampling.seed is None:
            sampling = dataclasses.replace(sampling, seed=self._rng.getrandbits(63))
        request = given
        if sampling is not given.sampling or timeout_s != given.timeout_s:
            request = dataclasses.replace(given, sampling=sampling, timeout_s=timeout_s)
        deadline = None if timeout_s is None else now + timeout_s
        due_s = None if self._ttft_s is None else now + self._ttft_s
        return Entry(request, deadline, list(request.output_ids), due_s=due_s)

    def _enter(self, entry: Entry, given: GenerateRequest, now: float) -> None:
        request_id = entry.request.request_id
        self._entries[request_id] = entry
        if entry.deadline is not None:
            self._timed[request_id] = entry
        if self.collapsing.can_share(given):
            self.collapsing.open(entry, given, now)

    def _closed(self) -> RequestError | None:
        if self.is_shut:
            return refusals.shutting_down("draining", retry_after_s=5.0)
        if self.is_hopeless:
            return refusals.no_replica("every replica has failed for good")
        return None
