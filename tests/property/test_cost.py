"""The cheapest way to get KV back onto a route, against all ways there are."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from hypothesis import given
from hypothesis import strategies as st

from shoal.policy.cost import (
    COPY_SHARE,
    STEP_TOKENS,
    OtherHop,
    Run,
    cheapest_work,
    gain_of_moving,
    hop_load,
    route_cost,
)


def hops_needed(position: int, cached: Sequence[int]) -> int:
    """The last hop that has no KV of a position, and all before it."""
    return max((hop + 1 for hop, num in enumerate(cached) if num <= position), default=0)


def all_ways(cached: Sequence[int], total: int) -> Iterator[tuple[Run, ...]]:
    """Runs that end wherever some hop's KV ends, on whatever number of hops is enough."""
    start = min(cached)
    inner = sorted({num for num in cached if start < num < total})
    for count in range(len(inner) + 1):
        for stops in itertools.combinations(inner, count):
            ends = [*stops, total]
            starts = [start, *stops]
            yield tuple(
                Run(stop, max(hops_needed(p, cached) for p in range(first, stop)))
                for first, stop in zip(starts, ends, strict=True)
            )


def cost_of(start: int, runs: tuple[Run, ...], layers: Sequence[int]) -> int:
    ends = [start, *(run.stop for run in runs)]
    return sum(
        (run.stop - first + STEP_TOKENS) * sum(layers[: run.num_hops])
        for first, run in zip(ends, runs, strict=False)
    )


hops = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 12)), min_size=1, max_size=4)


@given(hops=hops, more=st.integers(1, 60))
def test_it_is_the_cheapest_of_all_ways(hops: list[tuple[int, int]], more: int) -> None:
    cached, layers = [16 * num for num, _ in hops], [count for _, count in hops]
    total = max(cached) + more
    work = cheapest_work(cached, layers, total)
    assert work.start == min(cached)
    assert work.runs[-1] == Run(total, len(layers))
    assert work.cost == cost_of(work.start, work.runs, layers)
    assert work.cost == min(cost_of(work.start, runs, layers) for runs in all_ways(cached, total))


@given(hops=hops, more=st.integers(1, 60))
def test_every_position_gets_onto_every_hop(hops: list[tuple[int, int]], more: int) -> None:
    cached, layers = [16 * num for num, _ in hops], [count for _, count in hops]
    work = cheapest_work(cached, layers, max(cached) + more)
    first = work.start
    for run in work.runs:
        assert run.stop > first
        assert all(run.num_hops >= hops_needed(p, cached) for p in range(first, run.stop))
        first = run.stop


def test_a_lost_middle_spares_what_follows_if_that_is_worth_a_step() -> None:
    long = cheapest_work([160, 0, 160], [10, 10, 10], 170)
    assert long.runs == (Run(160, 2), Run(170, 3))
    short = cheapest_work([16, 0, 16], [10, 10, 10], 20)
    assert short.runs == (Run(20, 3),)


def test_nothing_cached_is_one_run() -> None:
    work = cheapest_work([0, 0], [4, 17], 100)
    assert (work.start, work.runs) == (0, (Run(100, 2),))
    assert work.cost == (100 + STEP_TOKENS) * 21


def test_load_counts_by_layers_and_by_capacity() -> None:
    work = cheapest_work([0, 0], [10, 20], 50)
    idle = route_cost(work, [10, 20], [0, 0], [1.0, 1.0])
    assert idle == work.cost
    assert route_cost(work, [10, 20], [100, 30], [1.0, 0.5]) == idle + 10 * 100 + 20 * 30 / 0.5


def test_moving_pays_if_enough_others_are_left_behind() -> None:
    def gain(here: int, there: int, num_copied: int = 96) -> float:
        less = hop_load(10, here, 1.0) - hop_load(10, there, 1.0)
        hops = [OtherHop(20, 100), OtherHop(10, num_copied, num_copied, less)]
        return gain_of_moving(hops, 101)

    assert gain(400, 0) > 0
    assert gain(400, 0) == gain(1400, 1000)
    assert gain(400, 340) < 0, "it costs more than it gains"
    assert gain(0, 0) == -(96 * 10 * COPY_SHARE) - (5 + STEP_TOKENS) * 30
    # What is copied need not be computed again.
    assert gain(400, 0) - gain(400, 0, 0) == 96 * 30 - 96 * 10 * COPY_SHARE


@given(less=st.integers(-1000, 1000), total=st.integers(2, 200))
def test_a_route_that_differs_in_load_alone_gains_no_more_than_that(less: int, total: int) -> None:
    full = (total - 1) // 16 * 16
    hops = [OtherHop(3, total - 1), OtherHop(5, full, full, less)]
    assert gain_of_moving(hops, total) < less
