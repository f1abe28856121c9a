"""How fast requests complete, for an honest Retry-After. Knows nothing of requests."""

from __future__ import annotations

_WEIGHT = 0.1
_UNKNOWN_S = 1.0
_LONGEST_S = 10.0


class CompletionPace:
    """A moving average of the time between two completions."""

    def __init__(self) -> None:
        self._last: float | None = None
        self._interval_s: float | None = None

    def note_completion(self, now: float) -> None:
        if self._last is not None:
            # Idle time says nothing of how fast requests complete.
            interval_s = min(now - self._last, _LONGEST_S)
            old_s = interval_s if self._interval_s is None else self._interval_s
            self._interval_s = old_s + _WEIGHT * (interval_s - old_s)
        self._last = now

    def seconds_per_completion(self) -> float:
        """Seconds until a place is likely to be free."""
        return _UNKNOWN_S if self._interval_s is None else self._interval_s
