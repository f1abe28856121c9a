"""Routes over layers that were placed by somebody else: all that can serve do, however many."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from random import Random

import pytest

from shoal.core.errors import ConfigError
from shoal.core.plan import Hop, Route
from shoal.core.split import Range
from shoal.planner.placement import Paths, routes_of
from shoal.planner.program import pack


def every_chain(ranges: Sequence[Range], start: int, num_layers: int) -> Iterator[Route]:
    if start == num_layers:
        yield ()
    for number, own in enumerate(ranges):
        if own.start <= start < own.stop and (start == 0 or own.start > 0):
            for rest in every_chain(ranges, own.stop, num_layers):
                yield (Hop(number, Range(start, own.stop)), *rest)


def layers_on(route: Route, num_instances: int) -> list[int]:
    used = [0] * num_instances
    for hop in route:
        used[hop.instance] = len(hop.layers)
    return used


@pytest.mark.parametrize(("stages", "machines"), [(5, 8), (10, 6), (2, 30)])
def test_all_machines_of_many_chains_serve(stages: int, machines: int) -> None:
    ranges = [Range(n * 4, n * 4 + 4) for n in range(stages) for _ in range(machines)]
    routes = routes_of(ranges, [1.0] * len(ranges), 4 * stages)
    assert {hop.instance for route in routes for hop in route} == set(range(len(ranges)))
    assert all(route[-1].layers.stop == 4 * stages for route in routes)
    assert len(routes) <= 2 * machines


def test_routes_carry_as_much_as_all_chains_together() -> None:
    rng, compared = Random(5), 0
    for _ in range(60):
        num_layers = rng.randint(4, 10)
        ranges = []
        for _ in range(rng.randint(3, 9)):
            start = rng.choice([0, *range(num_layers)])
            ranges.append(Range(start, rng.randint(start + 1, num_layers)))
        rates = [rng.uniform(0.5, 4.0) for _ in ranges]
        chains = list(every_chain(ranges, 0, num_layers))
        if not chains:
            with pytest.raises(ConfigError, match=f"covers layers 0-{num_layers}"):
                routes_of(ranges, rates, num_layers)
            continue
        routes = routes_of(ranges, rates, num_layers)
        assert set(routes) <= set(chains) and len(set(routes)) == len(routes)
        carried = [
            pack([1.0] * len(some), [layers_on(each, len(ranges)) for each in some], rates).bound
            for some in (chains, routes)
        ]
        # Routes of less than a twentieth are left out, and each hop costs a thousandth.
        assert carried[1] >= carried[0] * 0.88
        compared += 1
    assert compared > 20


def test_the_cheapest_chain_through_each_instance() -> None:
    ranges = [Range(0, 4), Range(0, 2), Range(2, 6), Range(4, 8), Range(5, 8), Range(6, 8)]
    prices = [0.3, 0.1, 0.5, 0.2, 0.9, 0.4]

    def price(route: Route) -> float:
        return sum(prices[hop.instance] * len(hop.layers) + 1e-3 for hop in route)

    chains = list(every_chain(ranges, 0, 8))
    found = list(Paths(ranges, 8).through_each(prices))
    for number in range(len(ranges)):
        through = [each for each in chains if any(hop.instance == number for hop in each)]
        own = [each for each in found if any(hop.instance == number for hop in each)]
        assert min(map(price, own)) == pytest.approx(min(map(price, through)))


@pytest.mark.parametrize(
    ("ranges", "said"),
    [
        ([Range(0, 4), Range(6, 8)], "nobody has 4-6"),
        ([Range(2, 8)], "nobody has 0-2"),
        ([Range(0, 4), Range(0, 6), Range(7, 8)], "nobody has 6-7"),
        ([Range(0, 8 - 1), Range(0, 8 - 1)], "nobody has 7-8"),
    ],
)
def test_layers_that_nobody_has_are_named(ranges: list[Range], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        routes_of(ranges, [1.0] * len(ranges), 8)


def test_dead_ends_are_seen_at_once() -> None:
    """Eight stages of six machines, and one layer that only machines with layer 0 have."""
    ranges = [Range(n * 2, n * 2 + 2) for n, _ in itertools.product(range(8), range(6))]
    whole = Range(0, 17)  # has the last layer, and may only come first: that does for all
    assert routes_of([*ranges, whole], [1.0] * 49, 17) == [(Hop(48, whole),)]
    with pytest.raises(ConfigError, match="nobody has 16-17"):
        routes_of(ranges, [1.0] * 48, 17)
