"""A stage's fastest option by its layers, against a look at every option."""

from __future__ import annotations

import math
from random import Random

import pytest

from shoal.planner.fill import Option, StageTimes

NUM_LAYERS = 12


def options_of(rng: Random) -> tuple[Option, ...]:
    return tuple(
        Option(
            layer_s=rng.uniform(0.1, 2.0),
            fixed_s=rng.choice([0.0, rng.uniform(0.0, 3.0)]),
            most_layers=rng.randint(0, NUM_LAYERS),
            late_s=rng.uniform(0.0, 1.0),
        )
        for _ in range(rng.randint(1, 6))
    )


@pytest.mark.parametrize("seed", range(20))
def test_the_fastest_option_that_has_room_is_taken(seed: int) -> None:
    options = options_of(Random(seed))
    stage = StageTimes(options)
    for count in range(NUM_LAYERS + 2):
        times = {n: o.time_s(count) for n, o in enumerate(options) if o.most_layers >= count}
        chosen, time_s, late_s = stage.held(count)
        if not times:
            assert (chosen, time_s, late_s) == (None, math.inf, 0.0)
            continue
        assert chosen is not None and time_s == pytest.approx(min(times.values()))
        assert times[chosen] == pytest.approx(time_s)
        assert late_s == pytest.approx(count * options[chosen].late_s)


@pytest.mark.parametrize("seed", range(20))
def test_no_more_layers_than_a_time_is_enough_for(seed: int) -> None:
    rng = Random(seed)
    options = options_of(rng)
    stage = StageTimes(options)
    for limit_s in (0.0, *(rng.uniform(0.0, 20.0) for _ in range(20))):
        fits = [n for n in range(1, NUM_LAYERS + 1) if stage.time_s(n) <= limit_s]
        assert stage.within(limit_s) == max(fits, default=0)
    assert stage.within(1e9) == max(each.most_layers for each in options)
