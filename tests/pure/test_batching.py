"""How much of a prompt goes into the Steps of those that decode: on a machine on paper."""

from __future__ import annotations

import random
from collections import deque

import pytest

from shoal.core.latency import percentile
from shoal.policy.batching import Seats, StepTimes

DECODING_S, TOKEN_S, LATER = 0.02, 0.0007, 3.0
"""Of eight streams; of the first token of a long prompt; how much more its last one takes."""
PROMPT, MOST = 7500, 512


def token_s(position: int) -> float:
    return TOKEN_S * (1 + LATER * position / PROMPT)


def alone_s() -> float:
    """Of the prompt, in full Steps."""
    seconds, position = 0.0, 0
    while position < PROMPT:
        num = min(MOST, PROMPT - position)
        seconds += DECODING_S / 2 + num * token_s(position + num // 2)
        position += num
    return seconds


def steps_beside(times: StepTimes, noise: random.Random | None) -> list[float]:
    """Seconds of each Step while a long prompt is computed beside streams, two in flight."""

    def measured(seconds: float) -> float:
        return seconds if noise is None else seconds * max(noise.gauss(1.0, 0.15), 0.5)

    for _ in range(20):
        times.handed_out(9, 0)
        times.took(0, measured(DECODING_S))
    position, found = 0, list[float]()
    in_flight: deque[tuple[int, float]] = deque()
    while position < PROMPT:
        room = times.prompt_tokens(9, 1, decodes=True)
        num = min(MOST if room is None else room, PROMPT - position)
        times.handed_out(9, num)
        found.append(measured(DECODING_S + num * token_s(position)))
        in_flight.append((num, found[-1]))
        position += num
        if len(in_flight) > 1:
            times.took(*in_flight.popleft())
    return found


@pytest.mark.parametrize("seed", [None, 1, 2, 3])
def test_streams_go_on_and_the_prompt_too(seed: int | None) -> None:
    noise = None if seed is None else random.Random(seed)
    steps = sorted(steps_beside(StepTimes(), noise))
    assert percentile(steps, 50) < 1.9 * DECODING_S
    assert percentile(steps, 99) < 2 * DECODING_S * (1 if seed is None else 1.4)
    assert sum(steps) < 2.5 * alone_s()


def test_a_target_is_kept_as_long_as_the_prompt_comes_through() -> None:
    generous, tight = StepTimes(0.1), StepTimes(0.021)
    steps = steps_beside(generous, None)
    assert percentile(sorted(steps), 90) == pytest.approx(0.1, rel=0.15)
    assert sum(steps) < 1.4 * alone_s()
    assert sum(steps_beside(tight, None)) < 2.7 * alone_s()


def test_prompts_that_wait_add_up() -> None:
    times = StepTimes()
    for _ in range(4):
        times.took(0, 0.02)
    for _ in range(20):
        times.took(32, 0.02 + 32 * 0.001)
    one = times.prompt_tokens(8, 1, decodes=True)
    many = times.prompt_tokens(8, 10, decodes=True)
    assert one is not None and many is not None
    assert 15 <= one <= 17 and 10 * one <= many < 10 * (one + 1)


def test_a_hiccup_changes_little() -> None:
    times = StepTimes()
    for _ in range(4):
        times.took(0, 0.02)
    for _ in range(20):
        times.took(32, 0.02 + 32 * 0.001)
    before = times.prompt_tokens(8, 1, decodes=True)
    times.took(32, 5.0)
    times.took(0, 5.0)
    after = times.prompt_tokens(8, 1, decodes=True)
    assert before is not None and after is not None and before / 2 < after <= before


def test_a_copy_goes_its_own_way() -> None:
    times = StepTimes()
    for _ in range(4):
        times.took(0, 0.02)
        times.took(32, 0.05)
    copy = times.copy()
    before = copy.prompt_tokens(8, 1, decodes=True)
    for _ in range(4):
        copy.took(0, 0.2)
    assert copy.prompt_tokens(8, 1, decodes=True) != before
    assert times.prompt_tokens(8, 1, decodes=True) == before


def test_nothing_known_holds_nothing_back_for_long() -> None:
    times = StepTimes()
    rooms = []
    for _ in range(12):
        rooms.append(times.prompt_tokens(3, 1, decodes=True))
        times.handed_out(3, 0 if rooms[-1] == 0 else 512)
    assert rooms[0] is None and set(rooms) == {None, 0}
    assert rooms.count(0) < 4


def test_the_article_s_batches_follow_the_rate() -> None:
    seats = Seats("article", 64)
    now = 0.0
    for number in range(50):
        now = number * 0.1
        seats.open(number + 1, 0, 1, now)
    assert seats.open(50, 3, 0, now) == 10
    assert seats.open(51, 3, 1, now + 0.05) == 3, "they wait for others"
    due_s = seats.next_s
    assert due_s is not None
    assert seats.open(51, 3, 1, due_s) >= 10
    assert Seats("even", 64).open(1, 3, 1, 0.0) == 64
