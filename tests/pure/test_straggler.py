"""Sliding windows, who is slow for long, and a circuit breaker's way from closed to closed."""

from __future__ import annotations

import random

import pytest

from shoal.core.split import Range
from shoal.core.step_times import InstanceStep, StepTaken
from shoal.policy.breaker import Breaker
from shoal.policy.hedging import (
    Budget,
    Lateness,
    hedge_budget,
    hushed_after_s,
    rescue_budget,
    silent_after_s,
)
from shoal.policy.straggler import InstanceTimes, Straggler
from shoal.policy.window import Window


def step(instance: int, seconds: float, num_rows: int = 4) -> InstanceStep:
    rows = tuple((100, 1, True) for _ in range(num_rows))
    return InstanceStep(instance, StepTaken(Range(0, 4), rows, seconds))


def test_a_window_knows_the_order_of_what_it_holds() -> None:
    rng, window = random.Random(0), Window(50, span_s=10.0)
    kept: list[tuple[float, float]] = []
    for number in range(500):
        now, value = number * 0.3, rng.choice([rng.random(), 0.5])
        window.add(value, now)
        kept = [each for each in [*kept, (now, value)] if each[0] >= now - 10.0][-50:]
        ordered = sorted(value for _, value in kept)
        assert len(window) == len(ordered)
        assert window.quantile(0.5) == ordered[len(ordered) // 2]
        assert (window.quantile(0.0), window.quantile(1.0)) == (ordered[0], ordered[-1])


def test_an_instance_is_slow_against_its_own_steps_of_the_same_size() -> None:
    times = InstanceTimes()
    for number in range(100):
        times.note(step(0, 0.01 + 0.001 * (number % 3)), number * 0.1)
        times.note(step(1, 0.05, num_rows=number % 60 + 1), number * 0.1)
    assert times.slow(10.0) == ()
    for number in range(100):
        times.note(step(0, 0.04), 10.0 + number * 0.1)
        times.note(step(1, 0.05, num_rows=number % 60 + 1), 10.0 + number * 0.1)
    ((instance, slowness),) = times.slow(20.0)
    assert instance == 0
    assert 3.0 < slowness < 4.5
    assert times.slow(60.0) == ()  # nothing was seen lately


def test_who_is_slow_for_a_moment_is_no_straggler() -> None:
    straggler = Straggler()
    for number in range(400):
        straggler.note(4.0 if 100 <= number < 160 else 1.0, number * 0.1)
        assert straggler.lasting(number * 0.1) is None
    for number in range(400, 700):
        straggler.note(4.0, number * 0.1)
    found = straggler.lasting(70.0)
    assert found is not None
    assert (found.p50, found.p95) == (4.0, 4.0)


def test_a_breaker_opens_for_longer_each_time_and_closes_by_and_by() -> None:
    breaker = Breaker()
    assert [breaker.failed(0.0) for _ in range(3)] == [False, False, True]
    opened_s, now = [], 0.0
    for _ in range(7):
        opened_s.append(breaker.ends_s - now)
        assert not breaker.look(breaker.ends_s - 0.01)
        assert breaker.look(breaker.ends_s)
        assert breaker.allowance == 1
        now = breaker.ends_s
        assert breaker.failed(now)
    assert opened_s == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]
    assert breaker.look(breaker.ends_s)
    allowed = []
    while breaker.allowance is not None:
        allowed.append(breaker.allowance)
        breaker.answered()
    assert allowed == [1, 2, 4, 8, 16, 32]
    assert [breaker.failed(now) for _ in range(3)] == [False, False, True], "that is forgotten"


def test_a_breaker_counts_what_fails_though_it_began() -> None:
    breaker = Breaker()
    for _ in range(20):
        assert not breaker.failed(0.0)
        breaker.ended()
    for _ in range(2):
        breaker.answered()
        assert not breaker.failed(0.0)
    breaker.answered()
    assert breaker.failed(0.0)


def test_patience_follows_what_is_usual_and_not_the_few_that_are_very_late() -> None:
    lateness = Lateness()
    cautious_s = lateness.patience_s(0.2)
    for number in range(300):
        lateness.note(2.5 if number % 16 == 0 else 0.2 + 0.001 * (number % 7), 0.2, 0.0)
    assert 0.3 <= lateness.patience_s(0.2) <= 0.85 < cautious_s


def test_short_prompts_that_are_late_by_times_make_nobody_wait_long_for_long_ones() -> None:
    lateness = Lateness()
    for number in range(300):
        late = number % 10 == 0
        lateness.note(0.09 if late else 0.02, 0.02, 0.0)
    assert lateness.patience_s(0.4) <= 0.4 + 1.2 * 0.07 + 0.1 + 1e-9
    assert lateness.patience_s(0.02) <= 0.12 + 1e-9


def test_a_first_token_is_due_before_it_is_late() -> None:
    lateness = Lateness()
    assert lateness.due_s(0.2) == lateness.patience_s(0.2)
    for number in range(300):
        lateness.note(0.3 if number % 10 else 0.8, 0.2, 0.0)
    assert lateness.due_s(0.2) == pytest.approx(0.3 + 0.1)
    assert lateness.patience_s(0.2) > 0.7


def test_streams_are_hushed_long_before_their_replica_is_in_doubt() -> None:
    assert hushed_after_s(0.02, 0.03) < 0.25 < silent_after_s(0.02, 0.03)
    assert hushed_after_s(0.02, 0.5) == 1.5, "a Step with a long prompt is no silence"


def test_rescues_leave_half_of_the_budget() -> None:
    all_of_it, rescues = hedge_budget(), rescue_budget()
    for each in (all_of_it, rescues):
        each.earn(100_000)
    assert all_of_it.has(9096) and not all_of_it.has(9097)
    assert rescues.has(4548) and not rescues.has(4549)


def test_a_budget_is_a_share_of_what_was_done() -> None:
    budget, spent = Budget(0.05, 100.0, 1000.0), 0
    for _ in range(1000):
        budget.earn(100)
        spent += 40 * budget.spend(40)
    assert spent <= 100 + 0.05 * 100_000
    assert spent >= 0.05 * 100_000 - 40
    budget.charge(10_000)
    assert not budget.spend(1)
