"""KV on its way between replicas: which blocks of what is lent are there, and when.

    LendKV, GrowLoan   so many blocks of a loan are ready
    PullKV             they go to the borrower one after another, each once it is ready; what comes
                       later over the same pair of replicas waits behind
    all are there      KVArrived

A loan and its pull have the number of the router's move. Knows nothing of requests, or of why KV
moves.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass, field

from shoal.core.kv import KVArrived, KVLoan, KVPull
from shoal.sim.kv_links import KVLink, KVLinks


@dataclass(slots=True)
class KVTotals:
    """What moved.

    Attributes:
        pulls: that are over; blocks: that came with them; seconds: from being asked for until they
            were there.
    """

    pulls: int = 0
    blocks: int = 0
    seconds: float = 0.0


@dataclass(slots=True)
class _Loan:
    source: str
    num_ready: int
    promised: int


@dataclass(slots=True)
class _Pull:
    """
    Attributes:
        first, count: of the loan's blocks, those that are wanted.
        num_sent: of them, those that are on their way or there.
        batches: (when it began, how many) of blocks that went one after another.
    """

    target: str
    link: KVLink
    num_hops: int
    first: int
    count: int
    asked_s: float
    num_sent: int = 0
    batches: list[tuple[float, int]] = field(default_factory=list)

    def num_there(self, now: float) -> int:
        return sum(self._there_of(begun_s, num, now) for begun_s, num in self.batches)

    def _there_of(self, begun_s: float, num: int, now: float) -> int:
        under_way_s = now - begun_s - self.link.latency_s
        if under_way_s < 0 or not self.link.block_s:
            return num if under_way_s >= 0 else 0
        return min(int(under_way_s / self.link.block_s), num)


@dataclass(frozen=True, slots=True)
class Arrival:
    """For a borrower: a pull is over."""

    replica: str
    event: KVArrived


class KVTraffic:
    """Of one simulation.

    Attributes:
        totals: of all that moved.
    """

    def __init__(self, links: KVLinks) -> None:
        self._links = links
        self._loans: dict[int, _Loan] = {}
        self._pulls: dict[int, _Pull] = {}
        self._free_s: dict[tuple[str, str], float] = {}
        self._ends: list[tuple[float, int]] = []  # when a pull is over; one that is gone counts not
        self.totals = KVTotals()

    @property
    def next_s(self) -> float:
        """When a pull is over; infinity: none will be by itself."""
        while self._ends and self._ends[0][1] not in self._pulls:
            heapq.heappop(self._ends)
        return self._ends[0][0] if self._ends else math.inf

    def due(self, now: float) -> list[Arrival]:
        """Of pulls that are over."""
        found = []
        while self.next_s <= now:
            when, pull_id = heapq.heappop(self._ends)
            found += self._end(pull_id, self._pulls[pull_id].num_sent, when)
        return found

    # --- loans ---

    def lend(self, source: str, loan: KVLoan) -> None:
        promised = len(loan.hops[0].block_ids)
        self._loans[loan.lease_id] = _Loan(source, loan.num_ready, promised)

    def grow(self, loan: KVLoan, now: float) -> None:
        """More is ready, or less will ever be."""
        known = self._loans[loan.lease_id]
        known.num_ready, known.promised = loan.num_ready, len(loan.hops[0].block_ids)
        self._send(loan.lease_id, now)

    def end_loan(self, lease_id: int, now: float) -> list[Arrival]:
        """Nobody may read it any more."""
        if self._loans.pop(lease_id, None) is None:
            return []
        return self.stop(lease_id, now)

    # --- pulls ---

    def pull(self, target: str, pull: KVPull, now: float) -> list[Arrival]:
        loan, count = self._loans.get(pull.lease_id), len(pull.hops[0].block_ids)
        link = KVLink(0.0, 0.0) if loan is None else self._links(loan.source, target)
        self._pulls[pull.pull_id] = _Pull(target, link, len(pull.hops), pull.first, count, now)
        if loan is None:  # who lent it is gone
            return self.stop(pull.pull_id, now)
        self._send(pull.pull_id, now)
        return []

    def stop(self, pull_id: int, now: float) -> list[Arrival]:
        """It has taken long enough: what is there counts."""
        pull = self._pulls.get(pull_id)
        return [] if pull is None else self._end(pull_id, pull.num_there(now), now)

    def drop(self, pull_id: int) -> None:
        self._pulls.pop(pull_id, None)

    def lost(self, replica: str, now: float) -> list[Arrival]:
        """It is gone, with what it lent and what it waited for."""
        for pull_id in [each for each, pull in self._pulls.items() if pull.target == replica]:
            self.drop(pull_id)
        lent = [each for each, loan in self._loans.items() if loan.source == replica]
        return [arrival for each in lent for arrival in self.end_loan(each, now)]

    # ---

    def _send(self, move_id: int, now: float) -> None:
        """What is ready and was not sent."""
        pull, loan = self._pulls.get(move_id), self._loans[move_id]
        if pull is None:
            return
        pull.count = min(pull.count, max(loan.promised - pull.first, 0))
        num = min(loan.num_ready - pull.first, pull.count) - pull.num_sent
        ends_s = now
        if num > 0:
            pair = loan.source, pull.target
            begins_s = max(now, self._free_s.get(pair, 0.0))
            ends_s = begins_s + pull.link.latency_s + num * pull.link.block_s
            self._free_s[pair] = begins_s + num * pull.link.block_s
            pull.batches.append((begins_s, num))
            pull.num_sent += num
        if pull.num_sent >= pull.count:
            heapq.heappush(self._ends, (ends_s, move_id))

    def _end(self, pull_id: int, num_there: int, now: float) -> list[Arrival]:
        pull = self._pulls.pop(pull_id)
        self.totals.pulls += 1
        self.totals.blocks += num_there
        self.totals.seconds += now - pull.asked_s
        return [Arrival(pull.target, KVArrived(pull_id, (num_there,) * pull.num_hops))]
