"""What requests that are refused or give nothing teach of replicas: not how fast they are."""

from __future__ import annotations

import pytest
from test_router_answers import Answering
from test_router_hedging import PROMPT, Clocked
from test_router_rescues import LONG, long_prompts

from shoal.core.request import ErrorInfo, Output
from shoal.router.events import AttemptFailed, ReplicaOutputs

_WRONG = ErrorInfo(status=400, code="bad", message="no")
_LONGER = list(range(1, 40)) * 2


def _say(fleet: Clocked, output: Output) -> None:
    """The replica of a request does, and that is all."""
    name, sent_id = next(key for key in fleet.running if key[1] == output.request_id)
    del fleet.running[name, sent_id]
    fleet.tell(ReplicaOutputs(name, fleet.incarnations[name], [output]))


def _refuse(fleet: Clocked, request_id: str, status: int) -> None:
    fleet.submit(request_id, _LONGER)
    fleet.now += 0.003
    if status == 429:
        fleet.fail(("a", request_id), status)
    else:
        _say(fleet, Output(request_id=request_id, finish="error", error=_WRONG))


def _slowness(fleet: Clocked) -> float:
    prospect = fleet.state.prospects(fleet.now)["a"]
    return max(prospect.prompts, prospect.decoding)


@pytest.mark.parametrize("error", [_WRONG, None])
def test_who_answers_nothing_quickly_is_not_thought_fast(error: ErrorInfo | None) -> None:
    fleet = Clocked("a")
    fleet.warm()
    before = fleet.state.prospects(fleet.now)["a"]
    for number in range(60):
        fleet.submit(f"bad{number}", _LONGER)
        fleet.now += 0.003
        finish = "stop" if error is None else "error"
        _say(fleet, Output(request_id=f"bad{number}", finish=finish, error=error))
        fleet.wait(0.2)
    after = fleet.state.prospects(fleet.now)["a"]
    assert after.ttft_s == pytest.approx(before.ttft_s, rel=0.05)
    assert (after.prompts, after.decoding) == pytest.approx((before.prompts, before.decoding))


@pytest.mark.parametrize("status", [400, 429])
def test_what_the_others_take_is_learned_though_many_are_refused(status: int) -> None:
    fleet = Clocked("a", hedging=False)
    fleet.warm()
    before = _slowness(fleet)
    for number, prompt in enumerate(long_prompts(20)):
        fleet.submit(f"q{number}", prompt, max_tokens=LONG)
        for turn in range(LONG):
            fleet.say(gap_s=0.2)  # four times as long as before
            if turn % 10 == 5:
                _refuse(fleet, f"bad{number}-{turn}", status)
    assert _slowness(fleet) > 2.5 * before


def test_an_answer_that_does_not_say_how_much_it_holds_is_one() -> None:
    """Three failures of many answers are no row of them."""
    fleet = Answering("a", "b")
    for number in range(60):
        fleet.submit(f"q{number}", PROMPT)
        name, sent_id = next(iter(fleet.running))
        fleet.wait(0.5)
        if name == "a" and number % 3 == 0:
            error = ErrorInfo(status=502, code="broken", message="no")
            del fleet.running[name, sent_id]
            fleet.tell(AttemptFailed(name, fleet.incarnations[name], sent_id, error))
        for _, each in list(fleet.running):
            _say(fleet, Output(request_id=each, finish="stop"))
    sent = [place for number in range(40, 60) for place in fleet.places(f"q{number}")]
    assert sent.count("a") >= 6
    assert not any(output.error for output in fleet.finished.values())


def test_a_late_answer_that_does_not_say_how_much_it_holds_is_sought_elsewhere() -> None:
    fleet = Answering("a", "b")
    for number in range(20):
        fleet.submit(f"warm{number}", PROMPT)
        fleet.wait(1.0)
        _say(fleet, Output(request_id=f"warm{number}", finish="stop"))
    assert len(fleet.late("q")) == 2
