"""Requests that wait for a replica: none is alive, or all have as much as they can begin soon.

They wait here and not at replicas, so that whoever is more urgent, or a tenant that has had less,
need not stand behind those that came before. Who would wait too long is refused at once, and told
when it is worth trying again. Knows nothing of which replica is chosen.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import islice

from shoal.core.errors import RequestError
from shoal.policy.admission import OUTPUT_WEIGHT, TIMES_FREE, Departures, Promise, Shares
from shoal.router import refusals
from shoal.router.placement import Placement
from shoal.router.records import Entry, RouterConfig

_SHORTEST_RETRY_S = 1.0
_MOST_LOOKED_AT = 8
"""Of those that wait: who has to wait longer for a fast replica holds nobody up."""


class WaitingRoom:
    """Of one router; who has been admitted before goes first."""

    def __init__(self, config: RouterConfig, placement: Placement) -> None:
        self._config, self._placement = config, placement
        self._ttft_s = None if config.slo is None else config.slo.ttft_s
        self._returned: deque[Entry] = deque()
        # By priority, then by tenant; none of them is empty.
        self._queues: dict[int, dict[str, deque[Entry]]] = {}
        self._num_waiting = 0
        self._num_of: dict[str, int] = {}
        self._shares = Shares()
        self._departures = Departures()
        self._promised: Promise | None = None  # to who comes in next, if it waits

    def __len__(self) -> int:
        return self._num_waiting + len(self._returned)

    def __iter__(self) -> Iterator[Entry]:
        yield from self._returned
        for of_tenants in self._queues.values():
            for queue in of_tenants.values():
                yield from queue

    # --- who may come in ---

    def is_passed_by(self, entry: Entry | None = None) -> bool:
        """Whether nobody waits whose turn is before, and neither does this one, or anyone."""
        is_first = not self._num_waiting and len(self._returned) == len(self.stranded())
        return is_first and self._placement.has_room(entry)

    def refusal(
        self, salt: str, priority: int, entry: Entry | None, now: float
    ) -> RequestError | None:
        """Why one more may not wait, if it has to.

        Args:
            entry: None: it is not known yet what is asked.
        """
        self._promised = None
        if self.is_passed_by(entry):
            return None
        tenant = tenant_of(salt)
        if self._is_full(tenant, priority):
            return refusals.queue_is_full(self._num_waiting, self._retry_s(now))
        if self._ttft_s is None:
            return None
        soonest_s = self._placement.soonest_s(entry)
        if soonest_s is None:
            return None
        ttft_s = self._num_ahead(tenant, priority) / self._per_s(now) + soonest_s
        late_s = ttft_s - self._ttft_s / self._placement.promises.margin
        if late_s <= 0:
            self._promised = Promise(now, ttft_s)
            return None
        return refusals.too_late(ttft_s, self._ttft_s, max(late_s, _SHORTEST_RETRY_S))

    def displaced(self, now: float) -> tuple[str, RequestError] | None:
        """Who must go as more are here than may be: the newest of the least urgent."""
        if self._num_waiting <= self._config.max_waiting:
            return None
        longest = max(self._queues[max(self._queues)].values(), key=len)
        full = refusals.queue_is_full(self._config.max_waiting, self._retry_s(now))
        return longest[-1].request.request_id, full

    def _retry_s(self, now: float) -> float:
        """Until all who wait now have been sent."""
        return max(self._num_waiting / self._per_s(now), _SHORTEST_RETRY_S)

    def _per_s(self, now: float) -> float:
        return self._departures.per_s(now, self._placement.requests_per_s())

    def longest_s(self, now: float) -> float:
        """That one of those whose turn comes next has waited."""
        heads = [each[0] for of_tenants in self._queues.values() for each in of_tenants.values()]
        return max((now - (each.waits_since_s or now) for each in heads), default=0.0)

    # --- in and out ---

    def put(self, entry: Entry, now: float) -> None:
        """A new one."""
        tenant = tenant_of(entry.request.salt)
        if not self._num_waiting:
            self._departures.begin(now)
            self._shares.begin()
        if not self._num_of.get(tenant):
            self._shares.came(tenant, self._num_of)
        entry.waits_since_s, entry.promise = now, self._promised
        of_tenants = self._queues.setdefault(entry.request.priority, {})
        of_tenants.setdefault(tenant, deque()).append(entry)
        self._num_of[tenant] = self._num_of.get(tenant, 0) + 1
        self._num_waiting += 1

    def put_back(self, entry: Entry, now: float) -> None:
        """One that has been admitted before."""
        entry.waits_since_s = now
        self._returned.append(entry)

    def take_first(self, now: float) -> Entry | None:
        """Whose turn it is among those who need not wait any more; it does not. None: all of the
        first few have to."""
        for entry in islice(self._in_turn(), _MOST_LOOKED_AT):
            if self._placement.has_room(entry):
                self._leave(entry, now)
                return entry
        return None

    def _in_turn(self) -> Iterator[Entry]:
        """Those that some replica has room for, be it in time for them or not."""
        if self._returned:
            has_room = [self._placement.has_room(has_begun=each) for each in (False, True)]
            yield from (each for each in self._returned if has_room[each.has_begun])
        if not self._placement.has_room():
            return
        for priority in sorted(self._queues):
            of_tenants = self._queues[priority]
            for tenant in self._shares.in_turn(of_tenants):
                yield from of_tenants[tenant]

    def _leave(self, entry: Entry, now: float) -> None:
        if any(each is entry for each in self._returned):
            self._returned.remove(entry)
            entry.waits_since_s = None
            return
        self._departures.note(now)
        self._take(entry)

    def remove(self, entry: Entry) -> None:
        """It is over; one that does not wait is ignored."""
        if entry.waits_since_s is None:
            return
        if any(each is entry for each in self._returned):
            self._returned.remove(entry)
            entry.waits_since_s = None
        else:
            self._take(entry)

    def sent(self, entry: Entry) -> None:
        """It goes to a replica; at its first one, what it is expected to take is charged."""
        if not entry.charged:
            output_tokens = self._placement.output_of(entry.request)
            entry.charged = len(entry.request.prompt_ids) + OUTPUT_WEIGHT * output_tokens
            self._shares.sent(tenant_of(entry.request.salt), entry.charged)

    def ended(self, entry: Entry) -> None:
        """It took what it took."""
        if entry.charged:
            took = len(entry.request.prompt_ids) + OUTPUT_WEIGHT * len(entry.output_ids)
            self._shares.ended(tenant_of(entry.request.salt), entry.charged, took)

    def overdue(self, now: float) -> list[Entry]:
        """Who has waited for a replica for too long, while none is alive."""
        limit_s = self._config.homeless_timeout_s
        return [each for each in self if now >= each.waited_until_s(limit_s)]

    def stranded(self) -> list[Entry]:
        """Who has begun, while no replica that is alive can go on with it."""
        if not self._returned or self._placement.has_anybody(has_begun=True):
            return []
        return [each for each in self._returned if each.has_begun]

    def _take(self, entry: Entry) -> None:
        tenant, priority = tenant_of(entry.request.salt), entry.request.priority
        of_tenants = self._queues[priority]
        of_tenants[tenant].remove(entry)
        if not of_tenants[tenant]:
            del of_tenants[tenant]
        if not of_tenants:
            del self._queues[priority]
        self._num_of[tenant] -= 1
        if not self._num_of[tenant]:
            del self._num_of[tenant]
        self._num_waiting -= 1
        entry.waits_since_s = None
        if not self._num_waiting:
            self._departures.end()

    def _is_full(self, tenant: str, priority: int) -> bool:
        """Whether its tenant has all that it may, or all is taken by those as urgent."""
        free = self._config.max_waiting - self._num_waiting
        if free <= 0:
            return priority >= max(self._queues, default=priority)
        return tenant != "" and self._num_of.get(tenant, 0) >= TIMES_FREE * free

    def _num_ahead(self, tenant: str, priority: int) -> int:
        """Who would be sent before it, if it came now."""
        urgent = [each for other, each in self._queues.items() if other < priority]
        ahead = sum(len(queue) for each in urgent for queue in each.values())
        equals = self._queues.get(priority, {})
        own = len(equals.get(tenant, ()))
        # Tenants take turns: of each as many as it has itself, and one.
        return ahead + sum(
            own if other == tenant else min(len(queue), own + 1) for other, queue in equals.items()
        )


def tenant_of(salt: str) -> str:
    """Who a salt is of: what stands before a slash is the key's, the rest is chosen by the user."""
    return salt.partition("/")[0]
