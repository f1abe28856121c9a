"""How many requests each replica has or is about to have, and which of them take more.

Counted as they come and go: a fleet of a thousand is asked with every request. Knows nothing of
what a request is, or of KV.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from shoal.router.records import Replica


class Loads:
    """
    Args:
        replicas: by name; their order decides between equals.
    """

    def __init__(self, replicas: Mapping[str, Replica]) -> None:
        self._replicas = tuple(replicas.values())
        self._numbers = {each.name: number for number, each in enumerate(self._replicas)}
        self._counts = [0] * len(self._replicas)
        # Numbers of those that a request may be sent to, by whether it has begun; as asked for.
        self._fit: dict[bool, list[int]] = {}

    def add(self, replica: str, change: int) -> None:
        """It is about to have so many more."""
        self._counts[self._numbers[replica]] += change

    def of(self, replica: str) -> int:
        return self._counts[self._numbers[replica]]

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
        self.fleet_changed()

    def fleet_changed(self) -> None:
        """Some replica came or went."""
        self._fit.clear()

    def fit(self, has_begun: bool) -> list[Replica]:
        """Replicas that a request may be sent to: those meant for it, if there are any."""
        return [self._replicas[number] for number in self._fitting(has_begun)]

    def taking(self, replica: str | None, has_begun: bool) -> Replica | None:
        """The replica of that name, if a request may be sent there."""
        number = self._numbers.get(replica or "", -1)
        return self._replicas[number] if number in self._fitting(has_begun) else None

    def fewest(self, has_begun: bool) -> Iterator[Replica]:
        """Those of them with the fewest requests, in order."""
        fitting = self._fitting(has_begun)
        counts = self._counts
        if len(fitting) < len(counts):
            counts = [counts[number] for number in fitting]
        least, at = min(counts, default=0), -1
        for _ in range(counts.count(least)):
            at = counts.index(least, at + 1)
            yield self._replicas[fitting[at]]

    def check_integrity(self, num_coming: Callable[[str], int]) -> set[tuple[str, str]]:
        """Whether they were counted right, and which requests are where; for tests."""
        for replica in self._replicas:
            assert replica.alive or not replica.outstanding
            assert self.of(replica.name) == len(replica.outstanding) + num_coming(replica.name)
        return {(each.name, request) for each in self._replicas for request in each.outstanding}

    def _fitting(self, has_begun: bool) -> list[int]:
        if has_begun not in self._fit:
            alive = [n for n, each in enumerate(self._replicas) if each.alive]
            taking = [n for n in alive if not self._replicas[n].is_drained]
            meant = [n for n in taking if self._replicas[n].is_meant_for(has_begun)]
            self._fit[has_begun] = meant or taking or alive
        return self._fit[has_begun]
