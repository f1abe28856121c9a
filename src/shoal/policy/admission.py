"""Who waits, in which order, and for how long about.

    order      the most urgent first; among equals the tenant that has been served least, by tokens
               (fair queueing by virtual time; VTC, OSDI 2024, sec. 4); of one tenant the oldest
    bound      a tenant may have so many waiting as `TIMES_FREE` times the places that are free:
               whoever comes alone gets most of them, and newcomers always find some
               (dynamic thresholds, Choudhury and Hahne 1998)
    how long   those ahead, over how many lately left the queue in a second
    how sure   as much later as first tokens lately came than those who waited were told

Knows nothing of replicas or of what a request is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from shoal.policy.window import Window

TIMES_FREE = 4
OUTPUT_WEIGHT = 2.0
"""A token of output costs about as much of a device as two of a prompt."""

_DEPARTURES_KEPT = 32
_FEWEST_DEPARTURES = 4
_PRIOR_DEPARTURES = 2
_SHORTEST_S = 1e-3

_PROMISES_KEPT, _FEWEST_PROMISES = 64, 16
_SURE, _BEYOND = 0.9, 1.3
_LEAST_MARGIN, _MOST_MARGIN = 1 / 0.7, 4.0


class Shares:
    """What each tenant has been served since somebody waits, in weighted tokens.

    Before that nobody's share was another one's loss: what a tenant had of a fleet with room for
    all is not held against it, but for what of it still runs.
    """

    def __init__(self) -> None:
        self._served: dict[str, float] = {}
        self._running: dict[str, float] = {}
        self._num_running: dict[str, int] = {}

    def begin(self) -> None:
        """Somebody waits, and nobody did."""
        self._served = dict(self._running)

    def came(self, tenant: str, waiting: Iterable[str]) -> None:
        """A tenant begins to wait, beside these: time that it was away earns it nothing."""
        least = min((self._served.get(each, 0.0) for each in waiting), default=0.0)
        self._served[tenant] = max(self._served.get(tenant, 0.0), least)

    def sent(self, tenant: str, tokens: float) -> None:
        """A request of it is; it is expected to take so many."""
        self._served[tenant] = self._served.get(tenant, 0.0) + tokens
        self._running[tenant] = self._running.get(tenant, 0.0) + tokens
        self._num_running[tenant] = self._num_running.get(tenant, 0) + 1

    def ended(self, tenant: str, expected: float, took: float) -> None:
        """A request of it has."""
        self._served[tenant] += took - expected
        self._running[tenant] -= expected
        self._num_running[tenant] -= 1
        if not self._num_running[tenant]:
            del self._running[tenant], self._num_running[tenant]

    def in_turn(self, tenants: Iterable[str]) -> list[str]:
        """Whose turn it is, and then whose; of equals the first."""
        return sorted(tenants, key=lambda tenant: self._served.get(tenant, 0.0))


class Departures:
    """How fast a queue is served, seen from who leaves it while others wait."""

    def __init__(self) -> None:
        self._times: deque[float] = deque(maxlen=_DEPARTURES_KEPT)
        self._since = 0.0
        self._known: float | None = None

    def begin(self, now: float) -> None:
        """Somebody waits."""
        self._times.clear()
        self._since = now

    def note(self, now: float) -> None:
        if len(self._times) == _DEPARTURES_KEPT:
            self._since = self._times[0]
        self._times.append(now)

    def end(self) -> None:
        """Nobody waits any more."""
        if len(self._times) >= _FEWEST_DEPARTURES:
            self._known = self.per_s(self._times[-1], 0.0)

    def per_s(self, now: float, expected: float) -> float:
        """Requests a second: as many as were seen to leave, and a few as fast as expected.

        Args:
            expected: until a queue has been seen.
        """
        expected = self._known or expected
        first = _PRIOR_DEPARTURES / expected if expected else 0.0
        seen = len(self._times)
        return (seen + _PRIOR_DEPARTURES) / max(first + now - self._since, _SHORTEST_S)


@dataclass(frozen=True, slots=True)
class Promise:
    """Of a first token so many seconds after `made_s`."""

    made_s: float
    ttft_s: float


class Promises:
    """How those were kept that were made to who waits."""

    def __init__(self) -> None:
        self._ratios = Window(_PROMISES_KEPT)

    def came(self, promise: Promise, now: float) -> None:
        """The first token did."""
        self._ratios.add((now - promise.made_s) / max(promise.ttft_s, _SHORTEST_S), now)

    @property
    def margin(self) -> float:
        """Times as long as it is expected to take, which nearly none takes longer than."""
        if len(self._ratios) < _FEWEST_PROMISES:
            return _LEAST_MARGIN
        late = _BEYOND * self._ratios.quantile(_SURE)
        return min(max(late, _LEAST_MARGIN), _MOST_MARGIN)
