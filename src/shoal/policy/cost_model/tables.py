"""Between measured points: smooth curves in the logarithms of size and time.

Latency and bandwidth regimes are straight there, and what lies between them bends gently; one
straight line of time over bytes errs by 15-59 % between 128 KiB and 64 MiB. Each piece is a cubic
whose slopes at both ends are harmonic means of those of the pieces beside them (Fritsch and
Butland, 1984): it rises where the points rise, and a jump between kernels stays in its own piece.
Knows nothing of what was measured.
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
    width = math.log(b / a)
    share, rise = math.log(size_bytes / a) / width, math.log(at_b / at_a)
    first, last = _slope(points, index - 1) * width, _slope(points, index) * width
    bend = (first - rise) * (1 - share) - (last - rise) * share
    return float(at_a * math.exp(rise * share + bend * share * (1 - share)))


def between(x: float, low: tuple[float, float], high: tuple[float, float]) -> float:
    """On the straight line through two points, in logarithms."""
    share = math.log(x / low[0]) / math.log(high[0] / low[0])
    return float(low[1] * (high[1] / low[1]) ** share)


def _slope(points: Points, index: int) -> float:
    """Of the curve at a point."""
    if index in (0, len(points) - 1):
        inner = max(index - 1, 0)
        return _steepness(points[inner], points[inner + 1])
    before, at, after = points[index - 1 : index + 2]
    left, right = _steepness(before, at), _steepness(at, after)
    if left * right <= 0:
        return 0.0
    widths = math.log(at[0] / before[0]), math.log(after[0] / at[0])
    near_left, near_right = widths[0] + 2 * widths[1], 2 * widths[0] + widths[1]
    return (near_left + near_right) / (near_left / left + near_right / right)


def _steepness(low: tuple[int, float], high: tuple[int, float]) -> float:
    return math.log(high[1] / low[1]) / math.log(high[0] / low[0])


def _size(point: tuple[int, float]) -> int:
    return point[0]
