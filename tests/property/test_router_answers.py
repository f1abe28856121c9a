"""Requests answered as a whole: hedged where that pays, and each gets exactly one answer."""

from __future__ import annotations

import random
from dataclasses import dataclass
from statistics import median

from hypothesis import given, settings
from hypothesis import strategies as st
from test_router_hedging import PROMPT, Clocked

from shoal.core.request import GenerateRequest, Output, SamplingParams
from shoal.core.speed import Speed
from shoal.policy.hedging import EXTRA_SHARE, Lateness
from shoal.router.events import Cancel, ReplicaOutputs, Submit

LENGTH = 40
_FIRST_TOKENS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class _Silent(GenerateRequest):
    @property
    def tells_progress(self) -> bool:
        return False

    @property
    def may_go_on(self) -> bool:
        return False


class Answering(Clocked):
    """Replicas that answer once they are done, all at once."""

    def submit(self, request_id: str, prompt: list[int], max_tokens: int = LENGTH) -> None:
        sampling = SamplingParams(max_tokens=max_tokens)
        self.tell(
            Submit(_Silent(request_id=request_id, prompt_ids=tuple(prompt), sampling=sampling))
        )

    def produce(self, key: tuple[str, str]) -> None:
        replica, sent_id = key
        del self.running[key]
        said = Output(request_id=sent_id, token_ids=(1,) * LENGTH, finish="stop")
        self.tell(ReplicaOutputs(replica, self.incarnations[replica], [said]))

    def warm(self) -> None:
        for number in range(20):
            self.submit(f"warm{number}", PROMPT)
            self.wait(1.0)
            self.finish()

    def late(self, request_id: str) -> list[str]:
        """Where it is after a time in which others come twice."""
        self.submit(request_id, PROMPT)
        self.stalled = set(self.live)
        self.wait(2.0)
        return self.places(request_id)


def test_a_late_answer_is_sought_elsewhere_and_comes_once() -> None:
    fleet = Answering("a", "b")
    fleet.warm()
    first, second = fleet.late("q")
    assert first != second
    assert fleet.state.hedges.doubted == 0
    fleet.stalled = {first}
    fleet.say()
    assert not fleet.running, "the other attempt ends"
    assert len(fleet.delivered["q"]) == LENGTH
    assert (fleet.state.hedges.hedged, fleet.state.hedges.won) == (1, 1)
    late = Output(request_id="q", token_ids=(1,) * LENGTH, finish="stop")
    fleet.tell(ReplicaOutputs(first, fleet.incarnations[first], [late]))
    assert len(fleet.delivered["q"]) == LENGTH
    assert fleet.state.hedges.doubted == 0, "that one says nothing says nothing"


def test_the_first_one_wins_if_it_answers_first() -> None:
    fleet = Answering("a", "b")
    fleet.warm()
    _, second = fleet.late("q")
    fleet.stalled = {second}
    fleet.say()
    assert not fleet.running
    assert len(fleet.delivered["q"]) == LENGTH
    assert fleet.state.hedges.won == 0


def test_nobody_is_late_before_it_is_known_how_answers_come() -> None:
    fleet = Answering("a", "b")
    assert len(fleet.late("q")) == 1


def test_without_hedging_there_is_one_attempt() -> None:
    fleet = Answering("a", "b", hedging=False)
    fleet.warm()
    assert len(fleet.late("q")) == 1


def test_who_waited_less_than_the_other_one_takes_stays() -> None:
    """Which would come later than the first one, for all that is known."""
    fast = Speed(step_s=0.02, token_s=2e-4, row_s=2e-4, context_s=1e-7)
    slow = Speed(step_s=0.2, token_s=2e-3, row_s=2e-3, context_s=1e-6)
    fleet = Answering("fast", "slow", speeds={"fast": fast, "slow": slow})
    fleet.warm()
    assert fleet.late("q") == ["fast"]
    fleet.wait(20.0)
    assert fleet.places("q") == ["fast", "slow"]


def test_all_that_both_compute_is_charged() -> None:
    fleet = Answering("a", "b")
    fleet.warm()
    fleet.late("q")
    assert fleet.state.hedges.extra_tokens == len(PROMPT) + LENGTH


def test_answers_of_any_length_are_waited_for() -> None:
    """Some take ten times the median, as they are long: they would elsewhere."""
    answers, rng = Lateness(float("inf")), random.Random(0)
    times = [rng.lognormvariate(0.0, 1.2) for _ in range(256)]
    for each in times:
        answers.note(each, 1.0, 0.0)
    late = sum(each > answers.patience_s(1.0) for each in times)
    assert late <= 0.07 * len(times)
    assert answers.patience_s(1.0) > 4 * median(times)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), hedging=st.booleans())
def test_whatever_stalls_every_request_gets_one_answer(seed: int, hedging: bool) -> None:
    rng = random.Random(seed)
    names = ["r0", "r1", "r2"]
    fleet = Answering(*names, seed=seed, max_lost=1000, hedging=hedging)
    if rng.random() < 0.7:
        fleet.warm()
    cancelled = set()
    for number in range(25):
        fleet.submit(f"q{number}", PROMPT)
        fleet.say(gap_s=rng.choice([0.05, 0.5, 1.0, 3.0]))
        name = rng.choice(names)
        if rng.random() < 0.3:
            fleet.stalled ^= {name}
        if rng.random() < 0.1:
            fleet.down(name) if name in fleet.live else fleet.up(name)
        if rng.random() < 0.1:
            cancelled.add(f"q{number}")
            fleet.tell(Cancel(f"q{number}"))
    fleet.stalled.clear()
    for name in names:
        if name not in fleet.live:
            fleet.up(name)
    fleet.finish()
    for number in range(25):
        name = f"q{number}"
        assert name in fleet.finished
        assert len(fleet.delivered[name]) == LENGTH or name in cancelled
    stats = fleet.state.hedges
    assert stats.extra_tokens <= _FIRST_TOKENS + EXTRA_SHARE * stats.computed_tokens
    assert hedging or stats.hedged == 0
