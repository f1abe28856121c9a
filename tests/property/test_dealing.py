"""Experts dealt and dealt anew: every part of each once, in the room there is, near the best."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.core.errors import ConfigError
from shoal.core.split import WHOLE_SHARE, Dealing, ExpertShare, share_phase
from shoal.policy.cost import STEP_TOKENS
from shoal.policy.dealing import (
    best_single_moves,
    deal,
    dealing_of,
    layer_time,
    parts_of,
    redeal,
    share_cost,
)


@st.composite
def layers(draw: st.DrawFn) -> tuple[Dealing, list[float], list[float], list[int]]:
    """A dealing with replicas, loads, speeds, and slots."""
    num_ranks = draw(st.integers(2, 4))
    num_experts = draw(st.integers(1, 6))
    parts = []
    for _ in range(num_experts):
        cuts = draw(st.lists(st.integers(0, WHOLE_SHARE), min_size=1, max_size=1))
        one, other = draw(st.integers(0, num_ranks - 1)), draw(st.integers(0, num_ranks - 1))
        each = [0] * num_ranks
        each[one] += cuts[0]
        each[other] += WHOLE_SHARE - cuts[0]
        parts.append(each)
    loads = draw(st.lists(st.floats(0, 200), min_size=num_experts, max_size=num_experts))
    speeds = draw(st.lists(st.floats(0.1, 4), min_size=num_ranks, max_size=num_ranks))
    slots = draw(st.lists(st.integers(0, num_experts), min_size=num_ranks, max_size=num_ranks))
    return dealing_of(parts), loads, speeds, slots


def held(dealing: Dealing) -> list[int]:
    return [len(shares) for shares in dealing]


def check_whole(dealing: Dealing, num_experts: int) -> None:
    """Each expert's shares follow each other, in the order of ranks, to the end."""
    done = [0] * num_experts
    for shares in dealing:
        assert list(shares) == sorted(shares)
        assert len({share.expert for share in shares}) == len(shares)
        for share in shares:
            assert share.start == done[share.expert] < share.stop
            done[share.expert] = share.stop
    assert done == [WHOLE_SHARE] * num_experts


@settings(deadline=None)
@given(layers())
def test_dealing_anew_keeps_every_part_and_the_room(
    layer: tuple[Dealing, list[float], list[float], list[int]],
) -> None:
    current, loads, speeds, slots = layer
    found = redeal(current, loads, speeds, slots)
    check_whole(found.dealing, len(loads))
    assert found.after_s <= found.before_s == pytest.approx(layer_time(current, loads, speeds))
    assert found.after_s == pytest.approx(layer_time(found.dealing, loads, speeds))
    room = [max(pair) for pair in zip(slots, held(current), strict=True)]
    assert all(have <= most for have, most in zip(held(found.dealing), room, strict=True))
    again = redeal(found.dealing, loads, speeds, slots)
    assert again.after_s <= found.after_s


@settings(deadline=None, max_examples=50)
@given(layers())
def test_most_of_what_single_moves_can_gain_is_gained(
    layer: tuple[Dealing, list[float], list[float], list[int]],
) -> None:
    current, loads, speeds, slots = layer
    best_s = exhaustive_single_moves(current, loads, speeds, slots)
    found = redeal(current, loads, speeds, slots)
    assert found.before_s - found.after_s >= 0.8 * (found.before_s - best_s) - 1e-9
    own = best_single_moves(current, loads, speeds, slots)
    assert layer_time(own, loads, speeds) <= found.before_s


def exhaustive_single_moves(
    current: Dealing, loads: Sequence[float], speeds: Sequence[float], slots: Sequence[int]
) -> float:
    """Layer time after moving one whole expert at a time, each time the best of all, plainly."""
    dealing, room = current, [max(pair) for pair in zip(slots, held(current), strict=True)]
    while True:
        moved = []
        for expert, source, target in itertools.product(
            range(len(loads)), range(len(speeds)), range(len(speeds))
        ):
            parts = parts_of(dealing, len(loads))
            if source != target and parts[expert][source]:
                parts[expert][target] += parts[expert][source]
                parts[expert][source] = 0
                if held(dealing_of(parts))[target] <= room[target]:
                    moved.append(dealing_of(parts))
        best = min(moved, key=lambda each: rank_times(each, loads, speeds), default=dealing)
        if not rank_times(best, loads, speeds) < rank_times(dealing, loads, speeds):
            return layer_time(dealing, loads, speeds)
        dealing = best


def rank_times(dealing: Dealing, loads: Sequence[float], speeds: Sequence[float]) -> list[float]:
    """Largest first, rounded so that nothing hangs on how a sum was made."""
    times = [
        sum(share_cost(loads[share.expert], share.stop - share.start) for share in shares) / speed
        for shares, speed in zip(dealing, speeds, strict=True)
    ]
    return sorted((round(each, 9) for each in times), reverse=True)


@settings(deadline=None)
@given(st.lists(st.floats(0.5, 50), min_size=3, max_size=7), st.data())
def test_a_dealing_from_nothing_is_near_the_best_of_all(
    loads: list[float], data: st.DataObject
) -> None:
    speeds = data.draw(st.lists(st.floats(0.2, 2), min_size=2, max_size=3))
    dealing = deal(loads, speeds, [len(loads)] * len(speeds))
    check_whole(dealing, len(loads))
    ranks = range(len(speeds))
    best_s = min(
        max(
            sum(
                share_cost(load, WHOLE_SHARE)
                for load, at in zip(loads, where, strict=True)
                if at == rank
            )
            / speeds[rank]
            for rank in ranks
        )
        for where in itertools.product(ranks, repeat=len(loads))
    )
    assert layer_time(dealing, loads, speeds) <= 1.2 * best_s


def test_speed_and_room_decide() -> None:
    loads = [8.0] * 7
    dealing = deal(loads, [1.0, 0.5, 0.25], [7, 7, 7])
    assert held(dealing)[:2] == [4, 2]
    assert held(deal(loads, [1.0, 1.0], [2, 5])) == [2, 5]
    with pytest.raises(ConfigError, match="7 experts are to be dealt, and ranks have room for"):
        deal(loads, [1.0, 1.0], [3, 3])
    with pytest.raises(ConfigError, match="give them more memory"):
        deal(loads, [0.0, 1.0], [9, 3])


def test_a_hot_expert_is_shared_where_it_pays() -> None:
    hot = [400.0, 1.0, 1.0, 1.0]
    shared = deal(hot, [1.0, 1.0], [4, 4])
    assert all(any(share.expert == 0 for share in shares) for shares in shared)
    # Reading it twice costs more than its few tokens, and there must be room for it.
    assert sum(held(deal([1.0] * 4, [1.0, 1.0], [4, 4]))) == 4
    assert sum(held(deal(hot, [1.0, 1.0], [1, 3]))) == 4


def test_few_moves_are_made() -> None:
    """One expert too many on a rank of 16: that one moves, not all of them."""
    rng = random.Random(1)
    loads = [rng.uniform(20, 24) for _ in range(32)]
    ranks = [*range(17)], [*range(17, 32)]
    current: Dealing = tuple(tuple(ExpertShare(each) for each in rank) for rank in ranks)
    found = redeal(current, loads, [1.0, 1.0], [32, 32])
    assert found.after_s < found.before_s
    assert found.num_loads <= 2
    even = redeal(found.dealing, loads, [1.0, 1.0], [32, 32])
    assert even.before_s - even.after_s < 0.03 * even.before_s


@given(st.floats(0.01, 100), st.integers(1, WHOLE_SHARE))
def test_the_cost_of_a_share_is_what_steps_show(load: float, part: int) -> None:
    whole, own = share_cost(load, WHOLE_SHARE), share_cost(load, part)
    assert own <= whole + 1e-9
    share = part / WHOLE_SHARE
    assert share * load / STEP_TOKENS <= own <= 1 + share * load / STEP_TOKENS + 1e-9
    # No share costs less than its part, and two of them together no less than the whole.
    assert own + share_cost(load, WHOLE_SHARE - part) >= whole - 1e-9


def test_chances_agree_with_the_lines_that_ranks_draw() -> None:
    """Poisson tokens, cut as `ExpertShare.of` cuts them."""
    rng = random.Random(7)
    load, share = 2.5, ExpertShare(0, WHOLE_SHARE // 4, WHOLE_SHARE // 4 + WHOLE_SHARE * 3 // 10)
    active, tokens, steps = 0, 0, 20_000
    for step in range(steps):
        count, waited = 0, rng.expovariate(1.0)
        while waited < load:
            count, waited = count + 1, waited + rng.expovariate(1.0)
        own = len(share.of(count, share_phase(step * 16, 3)))
        active, tokens = active + (own > 0), tokens + own
    seen = active / steps + tokens / steps / STEP_TOKENS
    assert share_cost(load, share.stop - share.start) == pytest.approx(seen, rel=0.03)
