"""What a simulated replica says: the middle of a stream later, in order, with its times."""

from __future__ import annotations

from collections.abc import Sequence

from shoal.core.request import Output
from shoal.core.stats import Computed
from shoal.sim.voice import Voice

Told = list[tuple[list[Output], list[float], Computed]]


def a_voice(*, keeps: bool = True) -> tuple[Voice, Told]:
    told: Told = []

    def report(outputs: Sequence[Output], times: Sequence[float], computed: Computed) -> None:
        told.append((list(outputs), list(times), computed))

    return Voice(report, keeps=keeps), told


def tokens(*request_ids: str, num: int = 1) -> list[Output]:
    return [Output(request_id=each, token_ids=(int(each),) * num) for each in request_ids]


def after(num_steps: int) -> Computed:
    return Computed(num_steps)


def test_tokens_between_are_told_together_with_the_time_of_each() -> None:
    voice, told = a_voice()
    voice.say(tokens("1", "2"), (0.1,), after(1), at_once=False)
    voice.say(tokens("1", "2", num=3), (0.2, 0.3, 0.4), after(4), at_once=False)
    assert not told
    voice.tell()
    assert told == [(tokens("1", "2", num=4), [0.1, 0.2, 0.3, 0.4], after(4))]
    voice.tell()
    assert len(told) == 1


def test_a_first_or_last_token_is_told_at_once_after_what_came_before() -> None:
    voice, told = a_voice()
    first = [Output(request_id="3", token_ids=(3,), num_cached_tokens=0)]
    last = [*tokens("1"), Output(request_id="2", token_ids=(2,), finish="length")]
    voice.say(tokens("1", "2"), (0.1,), after(1), at_once=False)
    voice.say(first, (0.2,), after(2), at_once=False)
    assert told == [(tokens("1", "2"), [0.1], after(1)), (first, [0.2], after(2))]
    voice.say(tokens("1", "2"), (0.3,), after(3), at_once=False)
    voice.say(last, (0.4,), after(4), at_once=False)
    assert told[2:] == [(tokens("1", "2"), [0.3], after(3)), (last, [0.4], after(4))]


def test_tokens_of_others_are_told_apart() -> None:
    voice, told = a_voice()
    voice.say(tokens("1", "2"), (0.1,), after(1), at_once=False)
    voice.say(tokens("1"), (0.2,), after(2), at_once=False)
    voice.tell()
    assert told == [(tokens("1", "2"), [0.1], after(1)), (tokens("1"), [0.2], after(2))]


def test_what_is_waited_for_is_told_at_once() -> None:
    voice, told = a_voice()
    voice.say(tokens("1"), (0.1,), after(1), at_once=False)
    voice.say(tokens("1"), (0.2,), after(2), at_once=True)
    assert [times for _, times, _ in told] == [[0.1], [0.2]]
    plain, heard = a_voice(keeps=False)
    plain.say(tokens("1"), (0.1,), after(1), at_once=False)
    assert heard == [(tokens("1"), [0.1], after(1))]
