"""Ranks of a group as threads of the test."""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from shoal.comm import Group
from shoal.comm.in_process import in_process_groups
from shoal.core.split import Range

Result = TypeVar("Result")


def on_ranks(size: int, work: Callable[[int, Group], Result]) -> list[Result]:
    """What `work(rank, group)` gives on each rank; the first error, if one fails."""
    groups = in_process_groups(size, deadline_s=60)

    def guarded(rank: int) -> Result:
        try:
            return work(rank, groups[rank])
        except BaseException:
            groups[rank].abort()  # the others would wait for it
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(guarded, rank) for rank in range(size)]
    errors = [error for future in futures if (error := future.exception()) is not None]
    if errors:
        raise min(errors, key=lambda error: type(error).__name__ == "CommError")
    return [future.result() for future in futures]


def random_cut(total: int, size: int, rng: random.Random) -> tuple[Range, ...]:
    """[0, total) in ranges of any lengths, 0 among them."""
    edges = [0, *sorted(rng.choice([0, total, rng.randrange(total + 1)]) for _ in range(size - 1))]
    return tuple(Range(start, stop) for start, stop in zip(edges, [*edges[1:], total], strict=True))
