"""Second attempts, silent replicas, retries: no token is lost or comes twice, budgets are kept."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from chain_worker import expected_output
from hypothesis import given, settings
from hypothesis import strategies as st
from test_router_state import INFO, VOCAB, Fleet, own_id

from shoal.core.request import ErrorInfo, Output
from shoal.policy.hedging import EXTRA_SHARE
from shoal.router.events import Cancel, ReplicaOutputs, ReplicaReady, ReplicaStuck, Tick

_TICK_S = 0.25
_FIRST_TOKENS = 4096
PROMPT = [1, 2, 3]


class Clocked(Fleet):
    """Time goes by in it, and replicas may stall."""

    def __init__(self, *names: str, seed: int = 0, **config: object) -> None:
        super().__init__(*names, seed=seed, **config)
        self.stalled: set[str] = set()
        for name in names:
            self.up(name)

    def wait(self, seconds: float) -> None:
        """Ticks as often as the router wants them, but nobody says anything."""
        end_s = self.now + seconds
        while self.now < end_s:
            wake_s = self.state.wake_s
            due_s = self.now + _TICK_S if wake_s is None else min(self.now + _TICK_S, wake_s)
            self.now = min(max(due_s, self.now), end_s)
            self.tell(Tick())

    def say(self, *, but_not: str = "", gap_s: float = 0.05) -> None:
        """A token of each request at replicas that do not stall, then time."""
        for key in [each for each in self.running if each[0] not in {but_not, *self.stalled}]:
            if key in self.running:
                self.produce(key)
        self.wait(gap_s)

    def finish(self) -> None:
        for _ in range(2000):
            if not self.running:
                return
            self.say()
        raise AssertionError("requests do not end")

    def places(self, request_id: str) -> list[str]:
        return [send.replica for send in self.sent[request_id]]

    def warm(self) -> None:
        """Requests that come as predicted, more or less."""
        for number in range(40):
            self.submit(f"warm{number}", PROMPT, max_tokens=3)
            self.finish()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), num_replicas=st.integers(2, 4), hedging=st.booleans())
def test_whatever_stalls_every_request_ends_once_with_its_tokens(
    seed: int, num_replicas: int, hedging: bool
) -> None:
    rng = random.Random(seed)
    names = [f"r{i}" for i in range(num_replicas)]
    fleet = Clocked(*names, seed=seed, max_lost=1000, hedging=hedging)
    prompts = {f"q{i}": [rng.randrange(1, VOCAB) for _ in range(5)] for i in range(30)}
    cancelled = set()
    for request_id, prompt in prompts.items():
        fleet.submit(request_id, prompt, max_tokens=12)
        for _ in range(rng.randrange(4)):
            fleet.say(gap_s=rng.choice([0.02, 0.1, 0.6, 2.0]))
        name = rng.choice(names)
        if rng.random() < 0.3:
            fleet.stalled ^= {name}
        if rng.random() < 0.15:
            fleet.down(name) if name in fleet.live else fleet.up(name)
        if rng.random() < 0.1:
            cancelled.add(request_id)
            fleet.tell(Cancel(request_id))
    fleet.stalled.clear()
    for name in names:
        if name not in fleet.live:
            fleet.up(name)
    fleet.finish()
    assert set(fleet.finished) == set(prompts)
    for request_id, prompt in prompts.items():
        want = expected_output(prompt, 12, VOCAB)
        if request_id in cancelled:
            want = want[: len(fleet.delivered[request_id])]
        assert fleet.delivered[request_id] == want
    assert set(fleet.state.outstanding().values()) == {0}
    stats = fleet.state.hedges
    assert stats.extra_tokens <= _FIRST_TOKENS + EXTRA_SHARE * stats.computed_tokens
    assert hedging or stats.hedged == 0


def test_a_late_first_token_is_sought_elsewhere_and_the_loser_ends() -> None:
    fleet = Clocked("a", "b")
    fleet.warm()
    fleet.submit("q", PROMPT)
    (first,) = fleet.places("q")
    fleet.stalled = {first}
    fleet.wait(1.0)
    assert len(fleet.places("q")) == 2
    fleet.say()
    assert [key for key in fleet.running if key[0] == first] == []
    fleet.finish()
    assert fleet.delivered["q"] == expected_output(PROMPT, 8, VOCAB)
    assert (fleet.state.hedges.hedged, fleet.state.hedges.won) == (1, 1)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_rival_is_found_though_others_are_not_trusted_yet(number: int) -> None:
    fleet = Clocked("a", "b", "c", "d")
    fleet.warm()
    fleet.submit("q", PROMPT)
    (first,) = fleet.places("q")
    others = sorted({"a", "b", "c", "d"} - {first})
    trusted = others.pop(number)
    for is_stuck in (True, False):
        for name in others:
            fleet.tell(ReplicaStuck(name, fleet.incarnations[name], is_stuck=is_stuck))
    fleet.wait(1.0)
    assert fleet.places("q") == [first, trusted]


def test_the_first_attempt_wins_if_it_is_the_first_to_speak() -> None:
    fleet = Clocked("a", "b")
    fleet.warm()
    fleet.submit("q", PROMPT)
    (first,) = fleet.places("q")
    fleet.stalled = {"a", "b"}
    fleet.wait(1.0)
    assert len(fleet.places("q")) == 2
    fleet.produce((first, "q"))
    assert [key[0] for key in fleet.running] == [first]
    assert fleet.state.hedges.won == 0


def test_without_hedging_a_late_request_has_one_attempt() -> None:
    fleet = Clocked("a", "b", hedging=False)
    fleet.warm()
    fleet.submit("q", PROMPT)
    fleet.wait(2.0)
    assert len(fleet.places("q")) == 1


def test_streams_of_a_silent_replica_go_on_elsewhere_and_it_is_trusted_again() -> None:
    fleet = Clocked("a", "b", "c")
    fleet.warm()
    for number in range(3):
        fleet.submit(f"q{number}", PROMPT, max_tokens=30)
    for _ in range(3):
        fleet.say()
    silent = fleet.places("q0")[0]
    fleet.stalled = {silent}
    for _ in range(40):
        fleet.say(gap_s=0.05)
    assert silent not in {key[0] for key in fleet.running}
    for number in range(4):
        fleet.submit(f"new{number}", PROMPT)
    # One of them at most is sent there, to see.
    assert sum(silent in fleet.places(f"new{number}") for number in range(4)) <= 1
    fleet.stalled.clear()
    for number in range(120):
        fleet.submit(f"later{number}", PROMPT, max_tokens=3)
        if number % 4 == 3:
            fleet.say()
            fleet.say()
    later = [place for number in range(60, 120) for place in fleet.places(f"later{number}")]
    assert later.count(silent) > 4
    fleet.finish()
    for number in range(3):
        assert fleet.delivered[f"q{number}"] == expected_output(PROMPT, 30, VOCAB)


def test_who_says_that_it_is_stuck_is_not_waited_for() -> None:
    fleet = Clocked("a", "b")
    for number in range(4):
        fleet.submit(f"q{number}", PROMPT)
    fleet.say()
    fleet.stalled = {"a"}
    there = [own_id(each) for name, each in fleet.running if name == "a"]
    assert there
    fleet.tell(ReplicaStuck("a", fleet.incarnations["a"] - 1, True))
    assert all(fleet.places(each) == ["a"] for each in there), "that was its predecessor"
    fleet.tell(ReplicaStuck("a", fleet.incarnations["a"], True))
    assert all(fleet.places(each) == ["a", "b"] for each in there)
    for number in range(5):
        for _ in range(8):
            fleet.say(gap_s=0.25)
        fleet.submit(f"new{number}", PROMPT)
        assert fleet.places(f"new{number}") == ["b"], "nobody is sent there to try it"
    fleet.tell(ReplicaStuck("a", fleet.incarnations["a"], False))
    fleet.stalled.clear()
    for _ in range(8):
        fleet.say(gap_s=0.25)
    fleet.submit("last", PROMPT)
    assert fleet.places("last") == ["a"]
    fleet.finish()
    assert all(ids == expected_output(PROMPT, 8, VOCAB) for ids in fleet.delivered.values())


def test_a_router_that_slept_doubts_nobody() -> None:
    fleet = Clocked("a", "b")
    fleet.warm()
    fleet.submit("q", PROMPT, max_tokens=30)
    fleet.say()
    fleet.now += 60.0
    fleet.tell(Tick())
    assert len(fleet.places("q")) == 1
    assert fleet.state.hedges.doubted == 0


def test_nobody_goes_on_with_what_such_a_replica_began() -> None:
    fleet = Clocked("a", "b")
    fleet.down("b")
    fleet.down("a")
    fleet.live.add("a")
    fleet.tell(ReplicaReady("a", 0, replace(INFO, restarts=True)))
    fleet.submit("q", PROMPT)
    fleet.say()
    fleet.up("b")
    fleet.wait(5.0)
    assert fleet.places("q") == ["a"]
    fleet.down("a")
    error = fleet.finished["q"].error
    assert error is not None
    assert error.code == "replica_lost"


@pytest.mark.parametrize(("status", "num_sent"), [(500, 2), (503, 2), (429, 2), (400, 1)])
def test_what_a_replica_failed_at_is_tried_at_another(status: int, num_sent: int) -> None:
    fleet = Clocked("a", "b")
    fleet.submit("q", PROMPT)
    (first,) = fleet.places("q")
    error = ErrorInfo(status=status, code="broken", message="no")
    fleet.running.pop((first, "q"))
    failed = Output(request_id="q", finish="error", error=error)
    fleet.tell(ReplicaOutputs(first, fleet.incarnations[first], [failed]))
    assert len(fleet.places("q")) == num_sent
    assert ("q" in fleet.finished) == (num_sent == 1)
    fleet.finish()
    if num_sent == 2:
        assert fleet.delivered["q"] == expected_output(PROMPT, 8, VOCAB)


def test_a_retry_avoids_all_that_failed_and_ends_when_none_is_left() -> None:
    fleet = Clocked("a", "b", "c")
    fleet.submit("q", PROMPT)
    error = ErrorInfo(status=502, code="broken", message="no")
    tried: list[str] = []
    while "q" not in fleet.finished:
        ((replica, sent_id),) = fleet.running
        tried.append(replica)
        fleet.running.pop((replica, sent_id))
        failed = Output(request_id=sent_id, finish="error", error=error)
        fleet.tell(ReplicaOutputs(replica, fleet.incarnations[replica], [failed]))
    assert sorted(tried) == ["a", "b", "c"]
    assert fleet.finished["q"].error == error


def test_a_replica_that_fails_again_and_again_is_left_alone() -> None:
    fleet = Clocked("a", "b")
    error = ErrorInfo(status=500, code="broken", message="no")
    for number in range(40):
        fleet.submit(f"q{number}", PROMPT)
        for replica, sent_id in list(fleet.running):
            if replica == "a":
                fleet.running.pop((replica, sent_id))
                failed = Output(request_id=sent_id, finish="error", error=error)
                fleet.tell(ReplicaOutputs("a", fleet.incarnations["a"], [failed]))
        fleet.finish()
    sent = [place for sends in fleet.sent.values() for place in (each.replica for each in sends)]
    assert sent.count("a") < 15
    assert all(output.error is None for output in fleet.finished.values())
    assert {own_id(each) for each in fleet.sent} == set(fleet.finished)
