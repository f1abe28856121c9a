"""How many requests each replica has or is about to have, for its speed, and which take more.

Counted as they come and go: a fleet of a thousand is asked with every request. Knows nothing of
what a request is, or of KV.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping

import numpy as np

from shoal.policy.breaker import RECOVERED
from shoal.policy.routing.fleet import Floats, Numbers
from shoal.router.records import Replica


class Loads:
    """
    Args:
        replicas: by name; their order decides between equals.
    """

    def __init__(self, replicas: Mapping[str, Replica]) -> None:
        self._replicas = tuple(replicas.values())
        self._numbers = {each.name: number for number, each in enumerate(self._replicas)}
        self.counts: Floats = np.zeros(len(self._replicas))
        self.num_changes = 0  # of counts
        # How fast each is beside the fastest, about; those that are nearly as fast count as equal.
        self.weights: Floats = np.ones(len(self._replicas))
        # Numbers of those that a request may be sent to, by whether it has begun; as asked for.
        self._fit: dict[bool, Numbers] = {}
        # Of those that may not have as many as they take.
        self._limited: set[int] = set()
        # Those that requests leave: what is drained, or only starts them; in order.
        self.left: list[Replica] = self._find_left()

    def add(self, replica: str, change: int) -> None:
        """It is about to have so many more."""
        self.counts[self._numbers[replica]] += change
        self.num_changes += 1

    def of(self, replica: str) -> int:
        return int(self.counts[self._numbers[replica]])

    def crowd(self, replica: str) -> float:
        """The same for its speed: as many of the fastest would make as slow."""
        number = self._numbers[replica]
        return float(self.counts[number] / self.weights[number])

    def put(self, replica: str, request_id: str) -> None:
        self._replicas[self._numbers[replica]].outstanding[request_id] = None
        self.add(replica, 1)

    def take(self, replica: str, request_id: str) -> None:
        del self._replicas[self._numbers[replica]].outstanding[request_id]
        self.add(replica, -1)

    def empty(self, replica: str) -> list[str]:
        """It is gone, and these have lost their place."""
        lost = self._replicas[self._numbers[replica]]
        orphans, lost.outstanding = list(lost.outstanding), {}
        self.add(replica, -len(orphans))
        self.fleet_changed()
        return orphans

    def drain(self, replica: str, is_drained: bool) -> None:
        self._replicas[self._numbers[replica]].is_drained = is_drained
        self.left = self._find_left()
        self.fleet_changed()

    def allow(self, replica: str, most: int | None) -> None:
        """It may have so many requests for now; None: as many as it takes."""
        number = self._numbers[replica]
        self._replicas[number].allowance = most
        self._limited.discard(number) if most is None else self._limited.add(number)

    def fleet_changed(self) -> None:
        """Some replica came or went."""
        self._fit.clear()

    def fit(self, has_begun: bool) -> list[Replica]:
        """Replicas that a request may be sent to: those meant for it, if there are any."""
        return [self._replicas[number] for number in self.fitting(has_begun)]

    def fitting(self, has_begun: bool, but_not: Collection[str] = ()) -> Numbers:
        """Numbers of the same, without some; of those that may have more, if there are any, or else
        that answered since they were in doubt."""
        if has_begun not in self._fit:
            self._fit[has_begun] = self._work_out(has_begun)
        fit = self._fit[has_begun]
        if but_not:
            fit = self._without([self._numbers[name] for name in but_not], fit)
        full = [number for number in self._limited if self._is_at_limit(number)]
        if not full:
            return fit
        free = self._without(full, fit)
        if len(free):
            return free
        known = self._without([number for number in full if not self._has_answered(number)], fit)
        return known if len(known) else fit

    def taking(self, replica: str | None, has_begun: bool) -> Replica | None:
        """The replica of that name, if a request may be sent there."""
        number = self._numbers.get(replica, -1) if replica is not None else -1
        if number < 0 or number not in self.fitting(has_begun):
            return None
        return self._replicas[number]

    def fewest(self, has_begun: bool) -> Iterator[Replica]:
        """Those of them with the fewest requests for their speed, in order."""
        fitting = self.fitting(has_begun)
        counts = self.counts[fitting] / self.weights[fitting]
        if len(counts):
            yield from (self._replicas[number] for number in fitting[counts == counts.min()])

    def check_integrity(self, num_coming: Callable[[str], int]) -> set[tuple[str, str]]:
        """Whether they were counted right, and which requests are where; for tests."""
        for replica in self._replicas:
            assert replica.alive or not replica.outstanding
            assert self.of(replica.name) == len(replica.outstanding) + num_coming(replica.name)
        return {(each.name, request) for each in self._replicas for request in each.outstanding}

    def _without(self, some: list[int], fit: Numbers) -> Numbers:
        is_other = np.ones(len(self._replicas), dtype=bool)
        is_other[some] = False
        others: Numbers = fit[is_other[fit]]
        return others

    def _find_left(self) -> list[Replica]:
        return [each for each in self._replicas if each.is_drained or each.role == "prefill"]

    def _is_at_limit(self, number: int) -> bool:
        most = self._replicas[number].allowance
        return most is not None and self.counts[number] >= most

    def _has_answered(self, number: int) -> bool:
        most = self._replicas[number].allowance
        return most is None or most >= RECOVERED

    def _work_out(self, has_begun: bool) -> Numbers:
        alive = [
            number
            for number, each in enumerate(self._replicas)
            if each.alive and not (has_begun and each.restarts)
        ]
        taking = [n for n in alive if not self._replicas[n].is_drained]
        meant = [n for n in taking if self._replicas[n].is_meant_for(has_begun)]
        return np.array(meant or taking or alive, dtype=int)
