"""Routing policies, what they learn of replicas, and what is remembered of prompts."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest

from shoal.core.errors import ConfigError
from shoal.core.request import GenerateRequest, SamplingParams
from shoal.core.speed import Speed
from shoal.core.stats import Computed
from shoal.policy.routing import POLICIES, policy_named
from shoal.policy.routing.fleet import Ask, Fleet, Row
from shoal.policy.routing.learning import Correction
from shoal.policy.routing.standing import Standing, Stay
from shoal.policy.routing.typical import Typical
from shoal.router.prefix_index import PrefixIndex

GPU = Speed(step_s=0.01, token_s=1e-4, row_s=1e-4, context_s=1e-8)
TARGETS = (1.0, 0.1)


def stay(tokens: int, output: float = 100.0) -> Stay:
    return Stay(tokens=tokens, pairs=tokens * tokens / 2, prompt=tokens, output=output)


def standing(speed: Speed = GPU, seats: int = 64, room: int = 100_000) -> Standing:
    return Standing(speed, Correction(is_known=True), seats=seats, room=room, chunk=2048)


def fleet_of(*standings: Standing, now: float = 0.0) -> Fleet:
    fleet = Fleet(len(standings))
    fleet.target_ttft_s, fleet.target_tpot_s = TARGETS
    for number, each in enumerate(standings):
        fleet.table[: Row.NUM, number] = each.column(now, *TARGETS)
        fleet.table[Row.NUM, number] = each.num
    return fleet


def chosen(policy: str, fleet: Fleet, ask: Ask, now: float = 0.0, rng: Random | None = None) -> int:
    fit = np.arange(fleet.num_replicas)
    return POLICIES[policy](fleet, fit, ask, now, rng or Random(0))


ASK = Ask(500, 100.0)


# --- policies that count ---


def test_round_robin_takes_turns_among_those_it_may() -> None:
    fleet, fit, found = Fleet(4), np.array([0, 2, 3]), []
    for fleet.num_decided in range(6):
        found.append(POLICIES["round-robin"](fleet, fit, ASK, 0.0, Random(0)))
    assert found == [0, 2, 3, 0, 2, 3]


def test_weighted_shares_out_as_weights_are() -> None:
    fleet = Fleet(3)
    fleet.table[Row.WEIGHT] = [1, 2, 5]
    for _ in range(80):
        fleet.table[Row.SENT, chosen("weighted", fleet, ASK)] += 1
    assert fleet.table[Row.SENT].tolist() == [10, 20, 50]


def test_least_outstanding_takes_turns_among_equals() -> None:
    fleet = Fleet(3)
    fleet.table[Row.NUM] = [4, 2, 2]
    fleet.table[Row.SENT] = [0, 7, 6]
    assert chosen("least-outstanding", fleet, ASK) == 2
    assert chosen("least-outstanding", fleet, Ask(500, 1.0, np.array([500.0, 64.0, 0.0]))) == 1


def test_power_of_two_never_takes_the_fuller_one() -> None:
    fleet, rng = Fleet(3), Random(1)
    fleet.table[Row.NUM] = [9, 5, 1]
    found = {chosen("power-of-two", fleet, ASK, rng=rng) for _ in range(50)}
    assert found == {1, 2}


def test_prefix_aware_follows_what_is_cached_until_that_is_uneven() -> None:
    fleet, ask = Fleet(3), Ask(500, 1.0, np.array([0.0, 448.0, 64.0]))
    fleet.table[Row.NUM] = [0, 30, 0]
    assert chosen("prefix-aware", fleet, ask) == 1
    fleet.table[Row.NUM] = [0, 40, 0]
    assert chosen("prefix-aware", fleet, ask) == 2
    assert chosen("prefix-aware", fleet, Ask(5000, 1.0, ask.cached)) == 2, "too little is cached"


def test_an_unknown_policy_is_named() -> None:
    with pytest.raises(ConfigError, match="'best'; it must be one of round-robin"):
        policy_named("best")


# --- the one that predicts ---


def test_long_prompts_go_where_prompts_are_fast() -> None:
    slow = Speed(step_s=0.01, token_s=1e-3, row_s=1e-4, context_s=1e-8)
    fleet = fleet_of(standing(slow), standing())
    assert chosen("predicted", fleet, Ask(8000, 10.0)) == 1


def test_a_short_prompt_goes_round_a_queue() -> None:
    slow, busy = standing(GPU.at(0.4)), standing()
    busy.put(stay(15_000), 0.0)
    fleet = fleet_of(slow, busy)
    assert chosen("predicted", fleet, Ask(100, 10.0)) == 0
    assert chosen("predicted", fleet, Ask(100, 10.0), now=1.55) == 1, "it is over by then"


def test_what_is_cached_is_worth_a_wait() -> None:
    busy, idle = standing(), standing()
    busy.put(stay(1500), 0.0)
    fleet = fleet_of(busy, idle)
    assert chosen("predicted", fleet, Ask(4000, 10.0)) == 1
    assert chosen("predicted", fleet, Ask(4000, 10.0, np.array([3840.0, 0.0]))) == 0


@pytest.mark.parametrize("short_of", ["seats", "KV"])
def test_nobody_is_sent_where_there_is_no_room(short_of: str) -> None:
    full = standing(seats=2) if short_of == "seats" else standing(room=1110)
    for _ in range(2):
        each = stay(500)
        full.put(each, 0.0)
        full.begin(each, 0, 0.1)
    slow = standing(GPU.at(0.3))
    assert chosen("predicted", fleet_of(full, slow, now=1.0), ASK, now=1.0) == 1
    assert chosen("predicted", fleet_of(standing(), slow, now=1.0), ASK, now=1.0) == 0


def test_a_first_token_that_does_not_come_makes_its_replica_slow() -> None:
    silent, slow = standing(), standing(GPU.at(0.3))
    silent.put(stay(500), 0.0)
    fleet = fleet_of(silent, slow)
    assert chosen("predicted", fleet, ASK, now=0.05) == 0
    assert chosen("predicted", fleet, ASK, now=1.0) == 1


def test_one_of_many_requests_sees_whether_it_is_still_bad() -> None:
    bad, good = standing(), standing()
    bad.correction.note(0.1, 0.1, 2.0)
    bad.sent_s = 10.0
    fleet, found = fleet_of(bad, good), []
    for number in range(200):
        fleet.num_decided = number
        found.append(chosen("predicted", fleet, ASK, now=10.0 + number / 10))
    assert 1 <= found.count(0) <= 4
    assert 0 not in found[:40], "it has just been tried"


# --- learning ---


def test_a_slow_down_is_believed_soon_and_forgotten_soon() -> None:
    correction = Correction(is_known=True)
    for _ in range(100):
        correction.note(0.02, 0.02, 0.04)
    assert correction.factor == pytest.approx(1.0)
    for _ in range(5):  # half a second
        correction.note(0.01, 0.01, 0.1)
    assert correction.factor > 2
    assert correction.looks_bad
    for _ in range(5):
        correction.note(0.01, 0.01, 0.1)
    assert correction.factor > 3.2
    for _ in range(50):
        correction.note(0.02, 0.02, 0.04)
    assert correction.factor < 1.1


def test_prompts_and_decoding_are_told_apart() -> None:
    correction = Correction(is_known=False)
    for _ in range(100):
        correction.note(0.0, 0.1, 0.3)
        correction.note(0.1, 0.01, 0.53)
    assert correction.decoding == pytest.approx(3.0, rel=0.05)
    assert correction.prompts == pytest.approx(5.0, rel=0.05)


def test_they_are_told_apart_by_stretches_that_are_long() -> None:
    """Seconds each, as on slow devices: after one, the level is what it was alone."""
    correction = Correction(is_known=False)
    for _ in range(12):
        correction.note(0.3, 0.02, 3.0)
        correction.note(0.0, 1.0, 2.0)
    assert correction.prompts / correction.decoding > 2.5


def test_of_a_replica_that_nobody_saw_anything_may_be_assumed_until_it_is_seen() -> None:
    correction = Correction(is_known=False)
    correction.assume(5.0)
    assert (correction.prompts, correction.decoding, correction.usual) == (5.0, 5.0, None)
    for _ in range(20):
        correction.note(0.05, 0.05, 0.2)
    assert correction.factor == pytest.approx(2.0, rel=0.1)


@pytest.mark.parametrize("most_share", [0.9, 0.3])
def test_prompts_and_decoding_do_not_trade_places_under_load(most_share: float) -> None:
    """Every stretch has some of both, and takes now more and now less."""
    correction, rng = Correction(is_known=False), Random(1)
    for _ in range(3000):
        share = rng.uniform(0.2, most_share)
        prompts_s, rest_s = 0.2 * share, 0.2 * (1 - share)
        seconds = 3 * prompts_s + 6 * rest_s
        correction.note(prompts_s, rest_s, seconds * rng.lognormvariate(0, 0.3))
        assert 0.2 < correction.prompts / correction.decoding < 2.5
    seconds = 0.25 * correction.prompts + 0.75 * correction.decoding
    assert seconds == pytest.approx(0.25 * 3 + 0.75 * 6, rel=0.4)


def test_a_slow_down_of_all_is_not_taken_for_one_of_prompts() -> None:
    correction, rng = Correction(is_known=True), Random(1)
    for number in range(300):
        prompts_s = rng.uniform(0.0, 0.05)
        correction.note(prompts_s, 0.02, (prompts_s + 0.02) * (5 if number >= 150 else 1))
    assert correction.prompts == pytest.approx(5.0, rel=0.1)
    assert correction.decoding == pytest.approx(5.0, rel=0.1)


def test_chunks_of_a_prompt_are_not_taken_for_slow_decoding() -> None:
    """A request decodes while a long prompt is computed beside it, in Steps of 2048 tokens."""
    one = standing()
    decoding, long, now = stay(100), stay(20_000), 0.0
    decoding.pairs = long.pairs = 0.0
    for each in (decoding, long):
        one.put(each, now)
    one.begin(decoding, 0, now := now + GPU.step(100, 0, 0))
    one.learn(now, 0, 0.0)
    for _ in range(4):  # another one's last token now and then
        for _ in range(2):
            now += GPU.step(2047, 1, 150)
            one.said += 1
        one.learn(now, 1, 150.0)
    assert one.correction.decoding == pytest.approx(1.0, abs=0.1)
    assert one.correction.prompts == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("speed", [0.25, 1.0, 4.0])
def test_a_replica_that_tells_what_it_computes_is_learned_from(speed: float) -> None:
    """Chunks of long prompts beside streams, however few first tokens come."""
    one, now, computed = standing(), 0.0, Computed()
    long, decoding = stay(100_000), stay(100)
    for each in (decoding, long):
        one.put(each, now)
    one.computed = computed
    one.begin(decoding, 0, now)
    one.learn(now, 0, 0.0)
    for number in range(1, 60):
        chunk = 100 + 50 * (number % 5)
        for _ in range(1 + number % 3):
            pairs = chunk * (computed.prompt_tokens + chunk / 2)
            computed = Computed(
                computed.steps + 1,
                computed.prompt_tokens + chunk,
                computed.prompt_pairs + pairs,
            )
            now += (GPU.step(chunk, 1, 150) + GPU.pair_s * pairs) / speed
            one.said += 1
        one.computed = computed
        one.learn(now, 1, 150.0)  # another one's last token
    assert 0.5 < one.correction.prompts / one.correction.decoding < 2
    prompts_s, rest_s = 200 * GPU.token_s, GPU.step(0, 1, 150)
    next_s = one.correction.prompts * prompts_s + one.correction.decoding * rest_s
    assert next_s == pytest.approx((prompts_s + rest_s) / speed, rel=0.1)
    fresh = standing()
    fresh.correction = one.correction
    fresh.put(stay(100_000 - computed.prompt_tokens), now)
    waits_s = one.column(now, *TARGETS)[Row.FREE] - now
    assert waits_s == pytest.approx(fresh.column(now, *TARGETS)[Row.FREE] - now, rel=0.01)


@pytest.mark.parametrize("num_tokens", [40_000, 60_000, 200_000])
def test_a_long_prompt_slows_streams_down_less_and_less(num_tokens: int) -> None:
    """Nobody else comes, and nothing is heard: time alone tells."""
    one, tpot_s = standing(room=1_000_000), 0.015
    for each in (stay(100), stay(num_tokens)):
        one.put(each, 5.0)
        one.begin(each, 0, 6.0)
    from_s = one.keeps_from_s(tpot_s)
    assert 5.0 < from_s < 500.0
    gaps_s = [one.column(at_s, *TARGETS)[Row.GAP] for at_s in (5.0, from_s, from_s + 1.0)]
    assert gaps_s == sorted(gaps_s, reverse=True)
    assert gaps_s[0] > gaps_s[1] == pytest.approx(tpot_s)


def test_streams_that_are_too_many_are_too_slow_at_any_time() -> None:
    one = standing()
    assert one.keeps_from_s(0.015) == -np.inf
    for _ in range(60):
        one.put(stay(10), 0.0)
    assert one.keeps_from_s(0.015) == np.inf
    assert one.column(1e9, *TARGETS)[Row.GAP] > 0.015


def test_requests_that_do_not_come_any_more_are_forgotten() -> None:
    one = standing()
    for number in range(20):
        one.put(stay(10), 0.1 * number)
    assert one.rate_at(2.0) > 0.5 * one.rate > one.rate_at(30.0) > 0


def test_what_was_cut_short_teaches_nothing() -> None:
    one, here = standing(), stay(100)
    one.put(here, 0.0)
    one.end(here, 30.0, is_cut=True)
    one.learn(60.0, 1, 0.0)
    assert one.correction.factor == 1.0
    assert one.num == 0


def test_outputs_are_expected_by_the_most_that_was_asked_for() -> None:
    typical = Typical()
    short, long = (
        GenerateRequest(
            request_id="q", prompt_ids=(1,) * 10, sampling=SamplingParams(max_tokens=tokens)
        )
        for tokens in (20, 4000)
    )
    for _ in range(20):
        typical.note_output(short, 10)
        typical.note_output(long, 600)
    assert typical.output_of(short) == pytest.approx(10, rel=0.1)
    assert typical.output_of(long) == pytest.approx(600, rel=0.1)


@pytest.mark.parametrize("numbers", [(-1.0, 1, 1, 1), (1, 0, 1, 1), (1, 1, 1, float("nan"))])
def test_speeds_that_cannot_be(numbers: tuple[float, float, float, float]) -> None:
    with pytest.raises(ConfigError, match="give seconds"):
        Speed(*numbers)


# --- what was routed where ---


def prompt(*parts: tuple[int, int]) -> tuple[int, ...]:
    """So many tokens of each value."""
    return tuple(value for value, count in parts for _ in range(count))


def test_each_replica_has_what_it_was_sent() -> None:
    index = PrefixIndex(70)
    for replica in range(70):
        index.make_room(replica, 10_000)
    index.note(3, prompt((1, 1024)), "")
    index.note(69, prompt((1, 200), (2, 100)), "")
    found = index.cached(prompt((1, 900), (3, 300)), "")
    assert found is not None
    assert {n: int(each) for n, each in enumerate(found) if each} == {3: 768, 69: 192}
    assert index.cached(prompt((1, 900)), "another tenant") is None
    assert index.cached(prompt((5, 900)), "") is None
    index.forget(3)
    found = index.cached(prompt((1, 900)), "")
    assert found is not None
    assert found.max() == 192


def test_a_replica_remembers_as_much_as_it_has_room_for() -> None:
    index = PrefixIndex(2)
    index.make_room(0, 64 * 10)
    often = prompt((0, 64))
    index.note(0, often, "")
    for value in range(1, 50):
        index.note(0, prompt((value, 64)), "")
        index.note(0, often, "")
    held = [value for value in range(50) if index.cached(prompt((value, 64)), "") is not None]
    assert len(held) <= 10
    assert {0, 49} <= set(held)
