"""Who comes in, who waits and in which order, and who shares a computation."""

from __future__ import annotations

import random

import pytest
from chain_worker import expected_output
from hypothesis import given, settings
from hypothesis import strategies as st
from test_router_state import INFO, VOCAB, Fleet

from shoal.core.latency import Slo
from shoal.core.request import ErrorInfo, GenerateRequest, SamplingParams
from shoal.policy.admission import Promise, Promises, Shares
from shoal.router.events import Cancel, Submit, Tick

PLACES = INFO.max_num_seqs + 1
"""Requests that a replica is sent: as many as run there, and one that is next."""


def ask(
    fleet: Fleet, request_id: str, *, prompt: tuple[int, ...] = (1, 2, 3), **more: object
) -> None:
    """Sampled without a seed, unless it says otherwise: nobody shares it."""
    params: dict[str, object] = {"max_tokens": more.pop("max_tokens", 8)}
    params |= {name: more.pop(name) for name in ("temperature", "seed") if name in more}
    fleet.tell(
        Submit(
            GenerateRequest(
                request_id=request_id,
                prompt_ids=prompt,
                sampling=SamplingParams(**params),  # type: ignore[arg-type]
                **more,  # type: ignore[arg-type]
            )
        )
    )


def refusal(fleet: Fleet, request_id: str) -> ErrorInfo:
    error = fleet.finished[request_id].error
    assert error is not None
    return error


def finish(fleet: Fleet, request_id: str) -> None:
    while request_id not in fleet.finished:
        fleet.produce(next(key for key in fleet.running if key[1] == request_id))


def test_a_small_tenant_does_not_stand_behind_a_flood() -> None:
    fleet = Fleet("r")
    fleet.up("r")
    for i in range(PLACES + 20):
        ask(fleet, f"flood{i}", salt="big/")
    ask(fleet, "mine", salt="small/own")
    assert len(fleet.running) == PLACES
    finish(fleet, "flood0")
    finish(fleet, "flood1")
    assert ("r", "mine") in fleet.running
    fleet.run_out()
    assert len(fleet.finished) == PLACES + 21


@pytest.mark.parametrize("first", ["idle", "flood"])
def test_what_an_idle_fleet_gave_is_held_against_nobody(first: str) -> None:
    fleet = Fleet("r")
    fleet.up("r")
    for i in range(100):
        ask(fleet, f"idle{i}", salt="mine/")
        finish(fleet, f"idle{i}")
    for i in range(PLACES):
        ask(fleet, f"flood{i}", salt="big/")
    if first == "idle":
        ask(fleet, "mine", salt="mine/")
    for i in range(PLACES, PLACES + 20):
        ask(fleet, f"flood{i}", salt="big/")
    if first == "flood":
        ask(fleet, "mine", salt="mine/")
    finish(fleet, "flood0")
    finish(fleet, "flood1")
    assert ("r", "mine") in fleet.running
    fleet.run_out()
    assert len(fleet.finished) == 100 + PLACES + 21


def test_what_runs_when_a_queue_forms_counts() -> None:
    """Who has all of the seats is served after who has none, until that one has had as much."""
    shares, turns = Shares(), []
    for _ in range(3):
        shares.sent("full", 100.0)
    shares.begin()
    shares.came("new", ())
    shares.came("full", ("new",))
    for _ in range(8):
        turns.append(shares.in_turn(["full", "new"])[0])
        shares.sent(turns[-1], 100.0)
    assert turns == ["new", "new", "new", "full", "new", "full", "new", "full"]


def test_who_took_less_than_expected_is_charged_for_that_alone() -> None:
    shares, turns = Shares(), []
    for _ in range(50):
        shares.sent("short", 100.0)
    shares.begin()
    for _ in range(50):
        shares.ended("short", 100.0, 10.0)
    shares.came("short", ())
    shares.came("long", ("short",))
    for _ in range(6):
        turns.append(shares.in_turn(["short", "long"])[0])
        shares.sent(turns[-1], 100.0)
    assert turns.count("long") == 3, "nothing was saved up"


def test_the_urgent_come_first_and_the_least_urgent_go() -> None:
    fleet = Fleet("r", max_waiting=2)
    fleet.up("r")
    for i in range(PLACES):
        ask(fleet, f"running{i}")
    for request_id, priority in [("late", 5), ("later", 5), ("urgent", -1)]:
        ask(fleet, request_id, priority=priority)
    assert refusal(fleet, "later").code == "queue_full"
    finish(fleet, "running0")
    assert ("r", "urgent") in fleet.running and ("r", "late") not in fleet.running


def test_nobody_takes_all_of_the_queue() -> None:
    fleet = Fleet("r", max_waiting=20)
    fleet.up("r")
    for i in range(PLACES + 30):
        ask(fleet, f"flood{i}", salt="big/")
    num_waiting = fleet.state.entrance.num_waiting
    assert num_waiting == 16
    for i in range(3):
        ask(fleet, f"mine{i}", salt="small/")
    assert fleet.state.entrance.num_waiting == num_waiting + 3
    assert refusal(fleet, f"flood{PLACES + 29}").code == "queue_full"


def test_who_would_wait_too_long_is_told_when_to_come_again() -> None:
    fleet = Fleet("r", slo=Slo(ttft_s=2.0))
    fleet.up("r")
    for i in range(PLACES + 2):
        ask(fleet, f"first{i}")
    # One leaves every second.
    for i in range(4):
        fleet.now += 1.0
        finish(fleet, f"first{i}")
        ask(fleet, f"more{i}")
    ask(fleet, "one")
    ask(fleet, "two")
    error = refusal(fleet, "two")
    assert (error.status, error.code) == (429, "overloaded")
    assert error.retry_after_s is not None and 1 <= error.retry_after_s <= 5
    assert fleet.state.refusal("", 0, fleet.now) is not None
    fleet.run_out()
    assert fleet.state.refusal("", 0, fleet.now) is None
    ask(fleet, "three")
    assert "three" not in fleet.finished


def test_the_same_is_computed_once() -> None:
    fleet = Fleet("r")
    fleet.up("r")
    ask(fleet, "a", temperature=0.0)
    fleet.produce(("r", "a"))
    fleet.produce(("r", "a"))
    ask(fleet, "b", temperature=0.0, seed=5)  # which a greedy one does not need
    assert fleet.delivered["b"] == fleet.delivered["a"]
    ask(fleet, "other tenant", temperature=0.0, salt="x/")
    ask(fleet, "longer", temperature=0.0, max_tokens=9)
    ask(fleet, "chance", temperature=1.0)
    assert set(fleet.running) == {("r", each) for each in ("a", "other tenant", "longer", "chance")}
    assert fleet.state.entrance.num_collapsed == 1
    fleet.run_out()
    assert fleet.delivered["b"] == fleet.delivered["a"] == expected_output((1, 2, 3), 8, VOCAB)


def test_a_computation_goes_on_while_anyone_wants_it() -> None:
    fleet = Fleet("r")
    fleet.up("r")
    ask(fleet, "a", temperature=0.0, timeout_s=5.0)
    ask(fleet, "b", temperature=0.0, timeout_s=50.0)
    ask(fleet, "c", temperature=0.0)
    fleet.tell(Cancel("a"))
    assert fleet.finished["a"].finish == "cancelled" and fleet.running
    fleet.now = 51.0
    fleet.tell(Tick())
    assert refusal(fleet, "b").code == "timeout" and fleet.running
    fleet.produce(("r", "a"))
    assert fleet.delivered["c"] and not fleet.delivered["b"]
    fleet.tell(Cancel("c"))
    assert not fleet.running and fleet.state.num_in_flight == 0


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), collapse=st.booleans())
def test_everybody_gets_the_right_tokens_and_one_end(seed: int, collapse: bool) -> None:
    """Tenants, priorities, time limits, cancels and lost replicas; few different prompts."""
    rng = random.Random(seed)
    fleet = Fleet("r0", "r1", max_lost=1_000, max_waiting=12, collapse=collapse)
    fleet.up("r0")
    prompts: dict[str, tuple[int, ...]] = {}
    for i in range(60):
        fleet.now += rng.choice([0.0, 0.1, 1.0])
        request_id = f"q{i}"
        prompts[request_id] = (1, 2, rng.randrange(3, 6))
        ask(
            fleet,
            request_id,
            prompt=prompts[request_id],
            temperature=rng.choice([0.0, 1.0]),
            salt=rng.choice(["", "a/", "b/"]),
            priority=rng.choice([0, 0, 1]),
            timeout_s=rng.choice([None, None, 3.0]),
        )
        for _ in range(rng.randrange(6)):
            if fleet.running:
                fleet.produce(rng.choice(list(fleet.running)))
        if rng.random() < 0.2:
            fleet.tell(Cancel(rng.choice(list(prompts))))
        if rng.random() < 0.2:
            name = rng.choice(["r0", "r1"])
            fleet.down(name) if name in fleet.live else fleet.up(name)
        fleet.tell(Tick())
    if not fleet.live:
        fleet.up("r0")
    fleet.run_out()
    assert set(fleet.finished) == set(prompts)
    assert fleet.state.num_in_flight == fleet.state.entrance.num_waiting == 0
    for request_id, prompt in prompts.items():
        want, got = expected_output(prompt, 8, VOCAB), fleet.delivered[request_id]
        assert got == want[: len(got)]
        assert len(got) == len(want) or fleet.finished[request_id].finish in ("cancelled", "error")


def test_whose_speed_nobody_knows_gets_two_prompts_until_it_has_answered() -> None:
    fleet = Fleet("r", slo=Slo(ttft_s=1000.0))
    fleet.up("r")
    for i in range(PLACES):
        ask(fleet, f"q{i}")
    assert len(fleet.running) == 2
    fleet.now += 0.05
    fleet.produce(("r", "q0"))
    fleet.tell(Tick())
    assert len(fleet.running) == PLACES
    fleet.run_out()
    assert len(fleet.finished) == PLACES


def test_a_promise_is_the_more_careful_the_later_the_last_ones_were_kept() -> None:
    promises = Promises()
    at_first = promises.margin
    for number in range(40):
        promises.came(Promise(made_s=number, ttft_s=2.0), now=number + 1.0)
    assert promises.margin == at_first > 1, "early ones prove nothing"
    for number in range(40, 60):
        promises.came(Promise(made_s=number, ttft_s=2.0), now=number + 5.0)
    assert promises.margin == pytest.approx(1.3 * 2.5)
    for number in range(60, 160):
        promises.came(Promise(made_s=number, ttft_s=2.0), now=number + 2.0)
    assert promises.margin == at_first
