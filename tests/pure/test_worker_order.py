"""Where workers stand, in which order they run Steps, and who is taken to be lost."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from shoal.core.plan import Hop, InstancePlan, RankPlan, ReplicaPlan, StagePlan, default_routes
from shoal.core.split import Range, Split
from shoal.core.step import Step
from shoal.executor.lab_state import LabState
from shoal.executor.liveness import Liveness, to_take_down
from shoal.wire.worker_messages import Beat
from shoal.worker.order import StepOrder
from shoal.worker.place import Place


def instance(layers: tuple[int, int], num_ranks: int) -> InstancePlan:
    heads = tuple(Range(rank, rank + 1) for rank in range(num_ranks))
    return InstancePlan(
        layers=Range(*layers),
        ranks=(RankPlan(),) * num_ranks,
        split=Split(heads=heads, ffn=heads, vocab=heads),
    )


STAGES = (
    StagePlan(instances=(instance((0, 2), 2),)),
    StagePlan(instances=(instance((2, 4), 1), instance((2, 4), 3))),
    StagePlan(instances=(instance((4, 6), 2),)),
)
REPLICA = ReplicaPlan(stages=STAGES, routes=default_routes(STAGES))
PLACES = {
    place.name: place
    for number, each in enumerate(REPLICA.instances)
    for place in (Place(REPLICA, number, rank) for rank in range(len(each.ranks)))
}


def step(step_id: int, route: int = 0) -> Step:
    return Step(step_id=step_id, rows=(), route=route)


def test_every_rank_gets_its_activations_from_one_and_all_first_ranks_the_tokens() -> None:
    for route, hops in enumerate(REPLICA.routes):
        for before, after in itertools.pairwise(hops):
            senders = [PLACES[name] for name in REPLICA.worker_names(before.instance)]
            got = [taker for sender in senders for taker in sender.takers(route)]
            assert sorted(got) == sorted(REPLICA.worker_names(after.instance))
            for sender in senders:
                for taker in sender.takers(route):
                    assert PLACES[taker].givers(route) == (sender.name,)
        last = [PLACES[name] for name in REPLICA.worker_names(hops[-1].instance)]
        assert last[0].token_takers(route) == REPLICA.worker_names(hops[0].instance)
        assert not any(place.token_takers(route) for place in last[1:])


def test_whoever_is_sent_to_listens() -> None:
    for place in PLACES.values():
        for peer in place.sends_to:
            assert place.name in PLACES[peer].hears


def test_only_instances_of_several_ranks_and_routes_need_a_leader() -> None:
    leads = {name for name, place in PLACES.items() if place.leads}
    follows = {name for name, place in PLACES.items() if place.follows}
    assert leads == {"s0.i0.r0", "s2.i3.r0"}
    assert follows == {"s0.i0.r1", "s2.i3.r1"}


@given(st.integers(0, 2**32), st.integers(1, 4))
def test_followers_run_what_the_leader_ran_in_its_order(seed: int, num_routes: int) -> None:
    """Whenever input comes, on whichever rank first; within a route the order never changes."""
    rng = random.Random(seed)
    steps = [step(i, rng.randrange(num_routes)) for i in range(20)]
    leader, follower = StepOrder(follows=False), StepOrder(follows=True)
    ready: tuple[set[int], set[int]] = (set(), set())
    ran: tuple[list[Step], list[Step]] = ([], [])
    waiting = [(rank, each.step_id) for rank in (0, 1) for each in steps]
    arriving = {0: list(steps), 1: list(steps)}
    rng.shuffle(waiting)
    while len(ran[1]) < len(steps):
        rank = rng.randrange(2)
        if arriving[rank]:
            (leader, follower)[rank].add(arriving[rank].pop(0))
        if waiting:
            where, step_id = waiting.pop()
            ready[where].add(step_id)
        if (taken := leader.take(lambda each: each.step_id in ready[0])) is not None:
            ran[0].append(taken)
            follower.note_decision(taken.step_id)
        if (taken := follower.take(lambda each: each.step_id in ready[1])) is not None:
            ran[1].append(taken)
    assert ran[0] == ran[1]
    for route in range(num_routes):
        ids = [each.step_id for each in ran[0] if each.route == route]
        assert ids == sorted(ids)


def test_a_step_that_waits_holds_up_its_own_route_only() -> None:
    order = StepOrder(follows=False)
    for each in (step(0, 0), step(1, 0), step(2, 1)):
        order.add(each)
    taken = order.take(lambda each: each.step_id != 0)
    assert taken is not None
    assert taken.step_id == 2
    assert order.take(lambda each: each.step_id != 0) is None


# --- signs of life ---


def beat(busy_s: float = 0.0, **heard_s: float) -> Beat:
    return Beat(incarnation=0, num_steps=0, busy_s=busy_s, heard_s=heard_s)


def followed(*workers: str) -> Liveness:
    liveness = Liveness()
    for worker in workers:
        liveness.begin(worker, 0.0)
    return liveness


def test_silence_beyond_a_stall_is_noticed_and_forgiven_who_slept_himself() -> None:
    liveness = followed("a", "b")
    for tenth in range(0, 40, 2):
        liveness.beat("a", beat(), tenth / 10)
    assert not liveness.lost(2.5)
    assert list(liveness.lost(3.9)) == ["b"]
    liveness.forgive(1.0)
    assert not liveness.lost(3.9)


def test_a_step_that_never_ends_and_a_deaf_worker_are_lost() -> None:
    liveness = followed("a", "b")
    liveness.reset_sent("b", 0.0)
    for worker, busy_s in (("a", 61.0), ("b", 0.0)):
        liveness.beat(worker, beat(busy_s), 6.0)
    assert set(liveness.lost(6.0)) == {"a", "b"}
    liveness.reset_done("b")
    assert set(liveness.lost(6.0)) == {"a"}


def test_those_who_do_not_hear_each_other_are_parted_only_if_both_are_alive() -> None:
    liveness = followed("a", "b")
    liveness.beat("a", beat(b=1.6), 2.0)
    assert not liveness.parted(2.0), "b has not said anything either: it may be stopped"
    liveness.beat("b", beat(a=0.1), 2.0)
    assert liveness.parted(2.0) == {("a", "b")}
    assert not liveness.hear_each_other(["b"], 2.0)
    liveness.beat("a", beat(b=0.1), 2.5)
    assert liveness.hear_each_other(["b"], 2.5)


def test_of_parted_instances_the_one_with_stand_ins_waits() -> None:
    instance_of = {"a": 0, "b": 1, "c": 2, "d": 3}
    assert to_take_down([("a", "b")], instance_of, {0: 0, 1: 1, 2: 1, 3: 0}) == {1}
    assert to_take_down([("b", "d")], instance_of, {0: 0, 1: 1, 2: 1, 3: 0}) == {1}
    # One host that nobody hears: it alone goes.
    pairs = [("a", "c"), ("b", "c"), ("c", "d")]
    assert to_take_down(pairs, instance_of, dict.fromkeys(range(4), 0)) == {2}


# --- a lab's wishes ---


def test_a_labs_file_is_reread_when_it_changes_and_links_heal(tmp_path: Path) -> None:
    file = tmp_path / "state.json"
    hosts = {"s0.i0.r0": "x", "s1.i1.r0": "y", "s1.i2.r0": None}
    lab = LabState(file, hosts)
    assert not lab.changed()
    file.write_text(json.dumps({"speeds": {"s0.i0.r0": 0.3}, "links": {"y|x": {"cut": True}}}))
    assert lab.changed()
    assert not lab.changed()
    wanted = lab.wanted("s0.i0.r0", 1.0)
    assert wanted.speed == 0.3
    assert {peer: link.cut for peer, link in wanted.links.items()} == {"s1.i1.r0": True}
    assert lab.wanted("s1.i2.r0", 0.5).speed == 0.5
    (tmp_path / "next").write_text("{}")
    (tmp_path / "next").replace(file)
    assert lab.changed()
    assert lab.wanted("s0.i0.r0", 1.0).links["s1.i1.r0"].cut is False
    lab.write_workers({"s0.i0.r0": 7})
    assert json.loads((tmp_path / "state.json.workers").read_text()) == {"s0.i0.r0": 7}


def test_a_plan_with_parts_of_layers_names_hops_in_order() -> None:
    assert REPLICA.routes[1][1] == Hop(2, Range(2, 4))
