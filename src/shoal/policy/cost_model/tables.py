"""Between measured points: straight lines in the logarithms of size and time.

Latency and bandwidth regimes are straight there, and what lies between them bends gently; one
straight line of time over bytes errs by 15-59 % between 128 KiB and 64 MiB. Knows nothing of what
was measured.
"""

from __future__ import annotations

import bisect
import math

from shoal.core.cluster import Points


def time_at(points: Points, size_bytes: float) -> float:
    """Seconds of a message.

    Below the smallest point, its time (latency); above the largest, as the last two go on, but no
    better than in proportion to them.
    """
    smallest, largest = points[0], points[-1]
    if size_bytes <= smallest[0]:
        return smallest[1]
    if size_bytes >= largest[0]:
        return largest[1] * size_bytes / largest[0]
    index = bisect.bisect_right(points, size_bytes, key=_size)
    (a, at_a), (b, at_b) = points[index - 1], points[index]
    return between(size_bytes, (a, at_a), (b, at_b))


def between(x: float, low: tuple[float, float], high: tuple[float, float]) -> float:
    """On the straight line through two points, in logarithms."""
    share = math.log(x / low[0]) / math.log(high[0] / low[0])
    return float(low[1] * (high[1] / low[1]) ** share)


def _size(point: tuple[int, float]) -> int:
    return point[0]
