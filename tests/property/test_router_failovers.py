"""Requests whose replica is gone or fails go on or end, and replicas that failed are used again."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
from chain_worker import expected_output
from hypothesis import given, settings
from hypothesis import strategies as st
from test_router_hedging import PROMPT, Clocked
from test_router_rescues import LONG, begin_streams, long_prompts
from test_router_state import INFO, VOCAB, own_id

from shoal.core.request import ErrorInfo, Output
from shoal.core.speed import Speed
from shoal.router.events import (
    DrainReplica,
    ReplicaOutputs,
    ReplicaReady,
    ReplicaStuck,
    ResumeReplica,
)


def _begun(fleet: Clocked, count: int, *, at: str) -> list[tuple[str, str]]:
    """Streams that run there, as the replica knows them."""
    begin_streams(fleet, count, at=at)
    return [key for key in fleet.running if key[0] == at]


def _fail_all(fleet: Clocked, name: str, status: int = 502) -> None:
    for key in [each for each in fleet.running if each[0] == name]:
        if key in fleet.running:
            fleet.fail(key, status)


def _fail_first(fleet: Clocked, name: str, count: int) -> None:
    """So many requests there fail."""
    while _num_sent(fleet, name) < count:
        fleet.submit(f"first{fleet.now}-{len(fleet.sent)}", PROMPT)
        _fail_all(fleet, name)
    fleet.finish()


def _num_sent(fleet: Clocked, name: str) -> int:
    return sum(send.replica == name for sends in fleet.sent.values() for send in sends)


def _serve_some(fleet: Clocked, count: int, *, broken: str = "") -> None:
    for number in range(count):
        fleet.submit(f"{fleet.now}-{number}", PROMPT, max_tokens=3)
        if broken:
            _fail_all(fleet, broken, 503)
        fleet.finish()


# --- replicas that failed are used again ---


def test_one_that_broke_off_all_it_had_is_used_again_when_it_is_back() -> None:
    fleet = Clocked("a", "b")
    _begun(fleet, 4, at="a")
    _fail_all(fleet, "a")
    fleet.wait(0.2)
    fleet.down("a")
    fleet.finish()
    fleet.up("a")
    before = _num_sent(fleet, "a")
    for number in range(20):
        fleet.submit(f"new{number}", PROMPT)
        fleet.say()
    assert _num_sent(fleet, "a") - before >= 5
    fleet.finish()


def test_one_that_failed_while_it_was_loading_is_used_again() -> None:
    fleet = Clocked("a", "b")
    _serve_some(fleet, 12, broken="a")
    while_broken = _num_sent(fleet, "a")
    assert while_broken >= 3
    fleet.wait(2.0)
    for number in range(20):
        fleet.submit(f"new{number}", PROMPT)
        fleet.say()
    assert _num_sent(fleet, "a") - while_broken >= 5
    fleet.finish()


def test_one_that_goes_on_failing_is_tried_more_and_more_seldom() -> None:
    fleet = Clocked("a", "b")
    tried_s = []
    while fleet.now < 120.0:
        before = _num_sent(fleet, "a")
        _serve_some(fleet, 1, broken="a")
        tried_s += [fleet.now] * (_num_sent(fleet, "a") - before)
        fleet.wait(0.5)
    later = [each for each in tried_s if each > 15.0]
    assert 3 <= len(later) <= 8, "every 16 s, then every 30 s, about"
    assert all(output.error is None for output in fleet.finished.values())


def test_one_that_breaks_off_all_that_it_begins_costs_nobody_an_answer() -> None:
    fleet = Clocked("a", "b")
    for number in range(200):
        fleet.submit(f"q{number}", PROMPT)
        fleet.say()
        _fail_all(fleet, "a")
    fleet.finish()
    assert not any(output.error for output in fleet.finished.values())
    assert _num_sent(fleet, "a") < 20


def test_who_cannot_be_tried_does_not_keep_others_from_it() -> None:
    fast, slow = Speed(0.02, 2e-4, 2e-4, 1e-7), Speed(0.2, 2e-3, 2e-3, 1e-6)
    fleet = Clocked("a", "b", "c", speeds={"a": fast, "b": slow, "c": fast})
    for is_stuck in (True, False):
        for name in ("a", "b"):
            fleet.tell(ReplicaStuck(name, 0, is_stuck=is_stuck))
    fleet.tell(DrainReplica("a"))
    fleet.submit("q", PROMPT)
    assert fleet.places("q") == ["b"]


def test_those_that_answered_take_all_while_everybody_else_is_in_doubt() -> None:
    fleet = Clocked("a", "b")
    fleet.tell(ReplicaStuck("a", 0, is_stuck=True))
    fleet.tell(ReplicaStuck("b", 0, is_stuck=True))
    fleet.tell(ReplicaStuck("a", 0, is_stuck=False))
    fleet.wait(0.5)
    for number in range(4):
        fleet.submit(f"q{number}", PROMPT)
    assert [fleet.places(f"q{number}") for number in range(4)] == [["a"]] * 4


def test_one_that_is_tried_and_has_too_much_to_do_costs_nobody_an_answer() -> None:
    fleet = Clocked("a", "b")
    _fail_first(fleet, "a", 3)
    fleet.wait(2.0)
    before = _num_sent(fleet, "a")
    for number in range(60):
        fleet.submit(f"new{number}", PROMPT, max_tokens=3)
        _fail_all(fleet, "a", 429)
        fleet.finish()
    assert not any(output.error for output in fleet.finished.values())
    assert 1 <= _num_sent(fleet, "a") - before <= 6


# --- requests whose replica failed ---


def test_nothing_that_a_replica_had_is_lost_for_there_being_much() -> None:
    names = ["a", "b", "c"]
    fleet = Clocked(*names)
    for name in names:
        fleet.down(name)
        fleet.up(name, max_num_seqs=64, num_kv_blocks=1000)
    for number in range(30):  # which leaves as little of the budget as may be
        fleet.submit(f"busy{number}", PROMPT)
        while fleet.running:
            fleet.fail(next(iter(fleet.running)), 429)
    count = 40
    assert len(_begun(fleet, count, at="a")) == count
    _fail_all(fleet, "a")
    fleet.finish()
    for number, prompt in enumerate(long_prompts(count)):
        assert fleet.delivered[f"s{number}"] == expected_output(prompt, LONG, VOCAB)


@pytest.mark.parametrize("status", [429, 502, 503])
def test_a_fleet_that_fails_at_all_is_not_asked_three_times_as_much(status: int) -> None:
    names = ["a", "b", "c", "d"]
    fleet = Clocked(*names)
    for number in range(500):
        fleet.submit(f"q{number}", PROMPT)
        while fleet.running:
            fleet.fail(next(iter(fleet.running)), status)
        fleet.wait(0.05)
    num_sent = sum(_num_sent(fleet, name) for name in names)
    assert len(fleet.finished) == 500
    assert num_sent <= 500 + 30, "nothing is earned by failing"


def test_what_was_lost_before_a_stream_got_on_does_not_end_it() -> None:
    fleet = Clocked("a", "b", "c", "d", max_lost=3)
    (key,) = _begun(fleet, 1, at="a")
    for _ in range(5):
        fleet.fail(key)
        (key,) = fleet.running
        fleet.fail(key)
        for _ in range(9):
            fleet.say()
        (key,) = fleet.running
    fleet.finish()
    assert fleet.delivered["s0"] == expected_output(long_prompts(1)[0], LONG, VOCAB)


def test_what_was_lost_without_getting_on_ends_it() -> None:
    fleet = Clocked("a", "b", "c", "d", max_lost=3)
    _begun(fleet, 1, at="a")
    for _ in range(3):
        (key,) = fleet.running
        fleet.fail(key)
    assert fleet.finished["s0"].error is not None
    assert len(fleet.places("s0")) == 3


# --- one of two attempts ends ---


def _hedged(fleet: Clocked) -> tuple[str, str]:
    """Where a request is, and where it is too, as it is late; all others say something."""
    fleet.warm()
    for number, prompt in enumerate(long_prompts(len(fleet.live))):
        fleet.submit(f"other{number}", prompt, max_tokens=LONG)
    fleet.say()
    fleet.submit("q", PROMPT)
    (lead,) = fleet.places("q")
    _wait_for(fleet, "q", 1.0)
    _, rival = fleet.places("q")
    return lead, rival


def _wait_for(fleet: Clocked, request_id: str, seconds: float) -> None:
    """All say something but that one."""
    end_s = fleet.now + seconds
    while fleet.now < end_s:
        for key in list(fleet.running):
            if own_id(key[1]) != request_id and key in fleet.running:
                fleet.produce(key)
        fleet.wait(0.1)


def _key(fleet: Clocked, name: str, request_id: str) -> tuple[str, str]:
    return next(each for each in fleet.running if (each[0], own_id(each[1])) == (name, request_id))


def test_who_lost_a_rival_gets_another_one() -> None:
    fleet = Clocked("a", "b", "c")
    lead, rival = _hedged(fleet)
    fleet.fail(_key(fleet, rival, "q"), 503)
    _wait_for(fleet, "q", 0.5)
    third = ({"a", "b", "c"} - {lead, rival}).pop()
    assert fleet.places("q") == [lead, rival, third]


def test_who_lost_a_rival_with_its_replica_gets_another_one() -> None:
    fleet = Clocked("a", "b", "c")
    lead, rival = _hedged(fleet)
    fleet.down(rival)
    _wait_for(fleet, "q", 0.5)
    third = ({"a", "b", "c"} - {lead, rival}).pop()
    assert fleet.places("q") == [lead, rival, third]


def test_a_rival_that_is_refused_leaves_the_lead_alone() -> None:
    fleet = Clocked("a", "b")
    lead, rival = _hedged(fleet)
    name, sent_id = _key(fleet, rival, "q")
    del fleet.running[name, sent_id]
    error = ErrorInfo(status=400, code="bad", message="no")
    refused = Output(request_id=sent_id, finish="error", error=error)
    fleet.tell(ReplicaOutputs(rival, 0, [refused]))
    assert "q" not in fleet.finished
    assert [name for name, each in fleet.running if own_id(each) == "q"] == [lead]
    fleet.finish()
    assert fleet.delivered["q"] == expected_output(PROMPT, 8, VOCAB)


# --- streams that nobody can go on with for now ---


def _stranded(fleet: Clocked, count: int) -> list[str]:
    """Streams of "a", which is gone; "c" cannot go on with them."""
    for name in ("a", "c"):
        fleet.down(name)
    fleet.up("a", max_num_seqs=count, num_kv_blocks=1000)
    for number, prompt in enumerate(long_prompts(count)):
        fleet.submit(f"s{number}", prompt, max_tokens=LONG)
        fleet.say()
    assert len(fleet.running) == count
    fleet.up("c", restarts=True)
    fleet.down("a")
    return [f"s{number}" for number in range(count)]


def _error(fleet: Clocked, request_id: str) -> ErrorInfo | None:
    output = fleet.finished.get(request_id)
    return None if output is None else output.error


@pytest.mark.parametrize("count", [1, 12])
def test_streams_that_nobody_can_go_on_with_hold_nobody_up(count: int) -> None:
    fleet = Clocked("a", "c")
    stranded = _stranded(fleet, count)
    for number in range(3):
        fleet.submit(f"new{number}", PROMPT)
        assert fleet.places(f"new{number}") == ["c"]
        fleet.say()
    for number in range(20):
        fleet.submit(f"more{number}", PROMPT)  # of which some wait
    fleet.finish()
    assert not any(_error(fleet, f"more{number}") for number in range(20))
    assert {each for each in stranded if each in fleet.finished} in (set(), set(stranded))


def test_a_stream_that_nobody_can_go_on_with_ends_soon() -> None:
    fleet = Clocked("a", "c", stranded_timeout_s=5.0)
    (stream,) = _stranded(fleet, 1)
    fleet.wait(4.5)
    assert stream not in fleet.finished
    fleet.wait(1.0)
    error = _error(fleet, stream)
    assert error is not None
    assert (error.status, error.code) == (503, "replica_lost")


def test_a_stream_goes_on_with_who_is_back_soon() -> None:
    fleet = Clocked("a", "c", stranded_timeout_s=5.0)
    stranded = _stranded(fleet, 12)
    for number in range(20):
        fleet.submit(f"new{number}", PROMPT)
    fleet.wait(4.0)
    fleet.up("a")
    fleet.finish()
    for each, prompt in zip(stranded, long_prompts(12), strict=True):
        assert fleet.delivered[each] == expected_output(prompt, LONG, VOCAB)
    assert all(_error(fleet, f"new{number}") is None for number in range(20))


def test_what_nobody_ever_goes_on_with_ends_at_once() -> None:
    fleet = Clocked("a", "c", homeless_timeout_s=60.0)
    (stream,) = _stranded(fleet, 1)
    fleet.down("c")
    fleet.wait(10.0)
    assert stream not in fleet.finished, "nobody else would answer either"
    fleet.down("a", final=True)
    fleet.wait(0.3)
    error = _error(fleet, stream)
    assert error is not None and error.code == "replica_lost"


def test_streams_end_where_they_are_if_nobody_else_can_go_on() -> None:
    fleet = Clocked("a", "c")
    fleet.down("c")
    fleet.up("c", restarts=True)
    fleet.tell(DrainReplica("c"))
    fleet.submit("q", long_prompts(1)[0], max_tokens=LONG)
    fleet.say()
    fleet.tell(ResumeReplica("c"))
    fleet.tell(DrainReplica("a"))
    for _ in range(20):
        fleet.say(gap_s=0.3)
    assert fleet.places("q") == ["a"]
    fleet.submit("new", PROMPT)
    assert fleet.places("new") == ["c"]
    fleet.finish()
    assert fleet.delivered["q"] == expected_output(long_prompts(1)[0], LONG, VOCAB)


# --- what replicas say of themselves ---


def test_who_can_be_followed_from_now_on_is_no_new_replica() -> None:
    fleet = Clocked("a", "b")
    for name in ("b", "a"):
        fleet.down(name)
    fleet.up("a", restarts=True)
    fleet.submit("before", long_prompts(2)[0], max_tokens=LONG)
    fleet.say()
    fleet.tell(ReplicaReady("a", fleet.incarnations["a"], replace(INFO, restarts=False)))
    fleet.submit("since", long_prompts(2)[1], max_tokens=LONG)
    fleet.say()
    assert fleet.state.outstanding()["a"] == 2
    fleet.up("b")
    fleet.tell(DrainReplica("a"))
    fleet.say()
    assert Counter(fleet.places("before") + fleet.places("since")) == {"a": 2, "b": 1}
    fleet.down("a")
    error = _error(fleet, "before")
    assert error is not None and error.code == "replica_lost"
    fleet.finish()
    assert fleet.delivered["since"] == expected_output(long_prompts(2)[1], LONG, VOCAB)


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 2**32), num_replicas=st.integers(2, 4))
def test_whatever_fails_every_request_ends_once_and_in_no_other_text(
    seed: int, num_replicas: int
) -> None:
    """Some replicas cannot go on with what others began, and which ones changes."""
    rng = random.Random(seed)
    names = [f"r{i}" for i in range(num_replicas)]
    fleet = Clocked(*names, seed=seed, stranded_timeout_s=2.0, homeless_timeout_s=20.0)
    prompts = {f"q{i}": [rng.randrange(1, VOCAB) for _ in range(5)] for i in range(40)}
    for request_id, prompt in prompts.items():
        fleet.submit(request_id, prompt, max_tokens=12)
        for _ in range(rng.randrange(4)):
            fleet.say(gap_s=rng.choice([0.02, 0.1, 0.6, 2.0]))
        name = rng.choice(names)
        if rng.random() < 0.2:
            fleet.stalled ^= {name}
        if rng.random() < 0.3:
            _fail_all(fleet, name, rng.choice([429, 502, 503]))
        if rng.random() < 0.2:
            fleet.tell(rng.choice([DrainReplica, ResumeReplica])(name))
        if rng.random() < 0.2:
            fleet.down(name) if name in fleet.live else fleet.up(name, restarts=rng.random() < 0.5)
        elif name in fleet.live and rng.random() < 0.1:
            changed = replace(INFO, restarts=rng.random() < 0.5)
            fleet.tell(ReplicaReady(name, fleet.incarnations[name], changed))
    fleet.stalled.clear()
    for name in names:
        fleet.tell(ResumeReplica(name))
        if name not in fleet.live:
            fleet.up(name)
    for _ in range(60):
        fleet.say(gap_s=0.5)
    assert set(fleet.finished) == set(prompts)
    for request_id, prompt in prompts.items():
        want, got = expected_output(prompt, 12, VOCAB), fleet.delivered[request_id]
        assert got == want[: len(got)]
        assert len(got) == len(want) or fleet.finished[request_id].error is not None
    _serve_some(fleet, 3)
    last = [output for name, output in fleet.finished.items() if name not in prompts]
    assert not any(output.error for output in last)
    assert set(fleet.state.outstanding().values()) == {0}
