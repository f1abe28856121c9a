"""Messages to another process, and sums among several, at several sizes.

    messages   wire/mesh.py: so many bytes there, and their receipt back
    sums       a group of comm/, as the ranks of an instance have it

What takes long is tried less often, and larger sizes are left out. Knows nothing of who the others
are.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from shoal.comm import Group
from shoal.core.cluster import Points

MESSAGE_BYTES = (1 << 10, 16 << 10, 128 << 10, 1 << 20)
SUM_BYTES = (4 << 10, 32 << 10, 256 << 10, 2 << 20)

_ROUNDS, _LEAST_ROUNDS = 15, 3
_SUM_ROUNDS = 150
_LONGEST_S = 1.0


def message_points(round_trip: Callable[[int], float]) -> Points:
    """Seconds one way, by size: half of an empty message's round trip is the receipt's.

    Args:
        round_trip: seconds until so many bytes are there and their receipt is back.
    """
    back_s = _median(lambda: round_trip(0), _ROUNDS) / 2
    points: list[tuple[int, float]] = []
    for size in MESSAGE_BYTES:
        last_s = points[-1][1] if points else 0.0
        took_s = _median(lambda size=size: round_trip(size), _rounds(last_s))  # type: ignore[misc]
        points.append((size, max(took_s - back_s, back_s, last_s * 1.0001)))
        if _takes_long(points):
            break
    return tuple(points)


def sum_points(group: Group, device: torch.device) -> Points:
    """Seconds of an all-reduce, by size; every rank calls it, and all leave out the same sizes."""
    points: list[tuple[int, float]] = []
    for size in SUM_BYTES:
        tensor = torch.ones(size // 4, device=device)
        last_s = points[-1][1] if points else 0.0
        took_s = _agreed(group, _sum_s(group, tensor, _rounds(last_s, _SUM_ROUNDS)), device)
        points.append((size, max(took_s, last_s * 1.0001)))
        if _takes_long(points):
            break
    return tuple(points)


def _sum_s(group: Group, tensor: torch.Tensor, rounds: int) -> float:
    """The median: a rank that loses its core for some milliseconds is as long as thirty sums."""

    def take_s() -> float:
        began_s = time.perf_counter()
        group.all_reduce(tensor)
        _wait(tensor)
        return time.perf_counter() - began_s

    take_s()  # first touches
    return _median(take_s, rounds)


def _agreed(group: Group, seconds: float, device: torch.device) -> float:
    """The mean of all ranks: what is left out follows from it, on every rank alike."""
    total = torch.tensor([seconds], device=device)
    group.all_reduce(total)
    return float(total) / group.size


def _wait(tensor: torch.Tensor) -> None:
    if tensor.device.type == "cuda":
        torch.cuda.synchronize(tensor.device)


def _takes_long(points: list[tuple[int, float]]) -> bool:
    """The next size would; two there are in any case, or nothing tells a rate from a latency."""
    return len(points) > 1 and points[-1][1] * 8 > _LONGEST_S


def _rounds(last_s: float, most: int = _ROUNDS) -> int:
    """As many as fit into a quarter of a second, by what the size before took."""
    return min(most, max(_LEAST_ROUNDS, int(_LONGEST_S / max(last_s * 4, 1e-6))))


def _median(take_s: Callable[[], float], rounds: int) -> float:
    return statistics.median(take_s() for _ in range(rounds))
