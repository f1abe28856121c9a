"""Who has taken longer than usual for a while: a replica with its requests, an instance with Steps.

    replica    times as long as predicted, against what is usual for it: what the router learned
    instance   seconds of a Step over the usual ones of Steps as large, of the same layers

Percentiles of the last seconds; slow for long is slow by the median all the time. Weight is taken
from a slow one elsewhere (`policy/routing/learning.py`, `engine/places.py`): here is only said that
it lasts. Told the time; knows nothing of who acts on it.
"""

from __future__ import annotations

from dataclasses import dataclass

from shoal.core.step_times import InstanceStep
from shoal.policy.window import Window

LASTING_S = 10.0
_SLOW, _FINE = 1.8, 1.3
_SPAN_S, _MOST, _FEWEST = 10.0, 256, 5
_LOOK_BACK_S, _LATEST, _FEWEST_LATEST = 30.0, 16, 3
"""A replica that is slow is given few requests, so that little is seen of it."""
_FASTER_SHARE, _SLOWER_SHARE = 0.2, 0.002


@dataclass(frozen=True, slots=True)
class Slowness:
    """Times as long as usual, percentiles of the last seconds.

    Attributes:
        since_s: when it began.
    """

    p50: float
    p95: float
    since_s: float


class Straggler:
    """One replica."""

    __slots__ = ("_since_s", "_window", "is_told")

    def __init__(self) -> None:
        self._window = Window(_LATEST, _LOOK_BACK_S)
        self._since_s: float | None = None
        self.is_told = False

    def note(self, times: float, now: float) -> None:
        """It lately takes so many times as long as usual."""
        self._window.add(times, now)
        if len(self._window) < _FEWEST_LATEST:
            return
        median = self._window.quantile(0.5)
        if median >= _SLOW and self._since_s is None:
            self._since_s = now
        elif median <= _FINE:
            self._since_s, self.is_told = None, False

    @property
    def is_slow(self) -> bool:
        return self._since_s is not None

    def lasting(self, now: float) -> Slowness | None:
        """How slow it is, if it has been for long."""
        if self._since_s is None or now < self._since_s + LASTING_S or not len(self._window):
            return None
        return Slowness(self._window.quantile(0.5), self._window.quantile(0.95), self._since_s)


class InstanceTimes:
    """Of the instances of one replica, by what their Steps take."""

    def __init__(self) -> None:
        self._usual: dict[tuple[int, int, int, int, int], float] = {}
        self._windows: dict[int, Window] = {}

    def note(self, step: InstanceStep, now: float) -> None:
        taken, instance = step.taken, step.instance
        tokens = sum(num_tokens for _, num_tokens, _ in taken.rows)
        context = sum(start for start, _, _ in taken.rows)
        layers = taken.layers
        like = instance, layers.start, layers.stop, tokens.bit_length(), context.bit_length()
        usual_s = self._usual.get(like, taken.seconds)
        share = _FASTER_SHARE if taken.seconds < usual_s else _SLOWER_SHARE
        self._usual[like] = usual_s + share * (taken.seconds - usual_s)
        self._windows.setdefault(instance, Window(_MOST, _SPAN_S)).add(taken.seconds / usual_s, now)

    def slow(self, now: float) -> tuple[tuple[int, float], ...]:
        """Instances that are, lately: times as long as usual, by the median."""
        found = []
        for instance, window in self._windows.items():
            window.forget(now)
            if len(window) >= _FEWEST and window.quantile(0.5) >= _SLOW:
                found.append((instance, window.quantile(0.5)))
        return tuple(sorted(found))
