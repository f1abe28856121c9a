"""The latest values of something, in order of size: for percentiles that slide.

Knows nothing of what they are.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque


class Window:
    """
    Args:
        most: values that are kept.
        span_s: for how long; None: as long as there is room.
    """

    __slots__ = ("_most", "_ordered", "_span_s", "_values")

    def __init__(self, most: int, span_s: float | None = None) -> None:
        self._most, self._span_s = most, span_s
        self._values: deque[tuple[float, float]] = deque()
        self._ordered: list[float] = []

    def __len__(self) -> int:
        return len(self._values)

    def add(self, value: float, now: float) -> None:
        self._values.append((now, value))
        insort(self._ordered, value)
        if len(self._values) > self._most:
            self._drop()
        self.forget(now)

    def forget(self, now: float) -> None:
        """What is too old."""
        if self._span_s is not None:
            while self._values and self._values[0][0] < now - self._span_s:
                self._drop()

    def clear(self) -> None:
        self._values.clear()
        self._ordered.clear()

    def quantile(self, share: float) -> float:
        """Of what is there, which must be something: the value that so many do not exceed."""
        return self._ordered[min(int(share * len(self._ordered)), len(self._ordered) - 1)]

    def _drop(self) -> None:
        _, value = self._values.popleft()
        del self._ordered[bisect_left(self._ordered, value)]
