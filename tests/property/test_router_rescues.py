"""Streams whose replica fails go on where that is soonest, and replicas that are back are used."""

from __future__ import annotations

from itertools import islice

import pytest
from chain_worker import expected_output
from test_router_hedging import PROMPT, Clocked
from test_router_state import VOCAB, own_id

from shoal.core.kv import KVOffer
from shoal.core.request import Output
from shoal.router.events import (
    AttemptHeld,
    DrainReplica,
    KVLent,
    LendAt,
    ReplicaOutputs,
    ReplicaStuck,
    ResumeReplica,
)

LONG = 60


def long_prompts(count: int) -> list[list[int]]:
    """Whose outputs do not end before they must."""
    all_of_them = ([first, second, 3] for first in range(1, VOCAB) for second in range(1, VOCAB))
    long = (each for each in all_of_them if len(expected_output(each, LONG, VOCAB)) == LONG)
    return list(islice(long, count))


def _stuck(fleet: Clocked, name: str, is_stuck: bool) -> None:
    (fleet.stalled.add if is_stuck else fleet.stalled.discard)(name)
    fleet.tell(ReplicaStuck(name, fleet.incarnations[name], is_stuck))


def begin_streams(fleet: Clocked, count: int, *, at: str) -> list[str]:
    """Of which each has begun there."""
    others = fleet.live - {at}
    for name in others:
        fleet.tell(DrainReplica(name))
    ids = [f"s{number}" for number in range(count)]
    for each, prompt in zip(ids, long_prompts(count), strict=True):
        fleet.submit(each, prompt, max_tokens=LONG)
    for name in others:
        fleet.tell(ResumeReplica(name))
    fleet.say()
    return ids


def _at(fleet: Clocked, name: str) -> list[str]:
    return sorted(own_id(request_id) for replica, request_id in fleet.running if replica == name)


def test_one_that_is_back_takes_all_streams_of_another_one() -> None:
    fleet = Clocked("a", "b")
    ids = begin_streams(fleet, 4, at="a")
    _stuck(fleet, "a", True)
    for _ in range(4):
        fleet.say()
    assert _at(fleet, "b") == ids
    _stuck(fleet, "a", False)
    _stuck(fleet, "b", True)
    fleet.say()
    assert _at(fleet, "a") == ids
    fleet.finish()
    for each, prompt in zip(ids, long_prompts(4), strict=True):
        assert fleet.delivered[each] == expected_output(prompt, LONG, VOCAB)


def test_streams_of_one_that_dies_are_shared_out() -> None:
    fleet = Clocked("a", "b", "c")
    ids = begin_streams(fleet, 8, at="a")
    fleet.down("a")
    assert len(_at(fleet, "b")) == len(_at(fleet, "c")) == len(ids) / 2


def test_a_long_stream_outlives_more_replicas_than_a_request_may_end() -> None:
    fleet = Clocked("a", "b", max_lost=3)
    (stream,) = begin_streams(fleet, 1, at="a")
    for _ in range(5):
        ((replica, _),) = fleet.running
        fleet.down(replica)
        fleet.up(replica)
        for _ in range(9):
            fleet.say()
    fleet.finish()
    assert fleet.delivered[stream] == expected_output(long_prompts(1)[0], LONG, VOCAB)


def test_that_a_request_is_cancelled_is_no_sign_of_life() -> None:
    fleet = Clocked("a", "b")
    ids = begin_streams(fleet, 2, at="a")
    fleet.stalled = {"a"}
    for _ in range(15):
        fleet.say(gap_s=0.1)
    assert _at(fleet, "b") == ids
    said = [Output(request_id=each, finish="cancelled") for each in ids]
    fleet.tell(ReplicaOutputs("a", fleet.incarnations["a"], said))
    for _ in range(3):
        fleet.say(gap_s=0.1)
    fleet.submit("new", PROMPT)
    assert fleet.places("new") == ["b"]


def test_who_did_nothing_for_a_while_is_not_thought_slow() -> None:
    fleet = Clocked("a", "b")
    fleet.warm()
    before = fleet.state.prospects(fleet.now)["a"]
    begin_streams(fleet, 3, at="a")
    fleet.stalled = {"a"}
    for _ in range(30):
        fleet.say(gap_s=0.1)
    fleet.stalled.clear()
    for number in range(8):
        fleet.submit(f"new{number}", PROMPT)
        fleet.say()
    after = fleet.state.prospects(fleet.now)["a"]
    assert max(after.prompts, after.decoding) < 2 * max(before.prompts, before.decoding)


def test_without_hedging_a_pause_is_waited_for() -> None:
    fleet = Clocked("a", "b", hedging=False)
    fleet.warm()
    ids = begin_streams(fleet, 3, at="a")
    for _ in range(4):
        fleet.say()
    fleet.stalled = {"a"}
    fleet.submit("new", PROMPT)
    fleet.wait(2.0)
    fleet.stalled.clear()
    fleet.finish()
    assert all(fleet.places(each) == ["a"] for each in ids)
    assert len(fleet.places("new")) == 1
    assert (fleet.state.hedges.hedged, fleet.state.hedges.rescued) == (0, 0)


@pytest.mark.parametrize("has_begun", [True, False])
def test_without_hedging_a_silent_replica_is_left_nevertheless(has_begun: bool) -> None:
    fleet = Clocked("a", "b", hedging=False)
    fleet.warm()
    if has_begun:
        begin_streams(fleet, 1, at="a")
    else:
        fleet.tell(DrainReplica("b"))
        fleet.submit("s0", long_prompts(1)[0], max_tokens=LONG)
        fleet.tell(ResumeReplica("b"))
    fleet.stalled = {"a"}
    fleet.wait(2.0)
    assert fleet.places("s0") == ["a"]
    fleet.wait(2.0)
    assert fleet.places("s0") == ["a", "b"]
    fleet.finish()
    assert fleet.delivered["s0"] == expected_output(long_prompts(1)[0], LONG, VOCAB)
    assert (fleet.state.hedges.hedged, fleet.state.hedges.rescued) == (0, 1)


def test_what_is_not_read_is_no_silence() -> None:
    """A client that reads nothing says nothing of the replica that answers it."""
    fleet = Clocked("a", "b")
    fleet.warm()
    (stream,) = begin_streams(fleet, 1, at="a")
    fleet.say()
    ((name, sent_id),) = fleet.running
    fleet.tell(AttemptHeld(name, fleet.incarnations[name], sent_id, True))
    fleet.wait(30.0)
    assert fleet.places(stream) == ["a"]
    assert fleet.state.hedges.doubted == 0
    fleet.tell(AttemptHeld(name, fleet.incarnations[name], sent_id, False))
    fleet.wait(0.5)
    assert fleet.places(stream) == ["a"]
    fleet.wait(5.0)
    assert fleet.places(stream) == ["a", "b"], "it is read again, and says nothing"
    fleet.finish()
    assert fleet.delivered[stream] == expected_output(long_prompts(1)[0], LONG, VOCAB)


class _Lending(Clocked):
    """Replicas that have nothing to lend."""

    num_asked = 0

    def tell(self, event: object) -> None:
        asked = self._count(event)
        for each in asked:
            self.num_asked += 1
            offer = KVOffer(each.move_id, "", (), ())
            self.tell(KVLent(each.replica, self.incarnations[each.replica], offer))

    def _count(self, event: object) -> list[LendAt]:
        found: list[LendAt] = []
        handle = self.state.handle

        def noted(event: object, now: float) -> list[object]:
            effects = handle(event, now)  # type: ignore[arg-type]
            found.extend(each for each in effects if isinstance(each, LendAt))
            return list(effects)

        self.state.handle = noted  # type: ignore[assignment, method-assign]
        try:
            super().tell(event)  # type: ignore[arg-type]
        finally:
            self.state.handle = handle  # type: ignore[method-assign]
        return found


def test_for_balance_nothing_is_computed_again() -> None:
    fleet = _Lending("a", "b", moves_kv=True, balance_gap=3)
    ids = begin_streams(fleet, 4, at="a")
    for _ in range(10):
        fleet.say()
    assert fleet.num_asked
    assert _at(fleet, "a") == ids
