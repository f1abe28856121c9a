"""Slots for experts: every round has what it runs, whatever steps want."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.model.expert_slots import ExpertSlots


class Memory:
    """What slots hold, filled when they are told to."""

    def __init__(self, num_experts: int, num_slots: int) -> None:
        self.slots = ExpertSlots(num_experts, num_slots)
        self.held: dict[int, int] = {}
        self.num_experts = num_experts

    def step(self, wanted: Sequence[int]) -> int:
        """Runs a step; how many rounds it took."""
        self.slots.begin(wanted)
        run: list[int] = []
        first = rounds = 0
        while first < self.num_experts:
            turn = self.slots.next_round(first)
            assert turn.until > first
            assert all(first <= expert < turn.until for expert in turn.experts)
            running = {self.slots.slot_of[expert] for expert in turn.experts}
            assert len(running) == len(turn.experts), "each has a slot of its own"
            for expert, slot in turn.reads:
                assert self.held.get(slot) != expert, "it was there"
                assert expert in turn.experts or slot not in running, "what runs is left alone"
                self.held[slot] = expert
            for expert in turn.experts:
                assert self.held[self.slots.slot_of[expert]] == expert
            run += turn.experts
            first, rounds = turn.until, rounds + 1
        assert run == list(wanted), "all that are wanted, in their order"
        return rounds


@st.composite
def cases(draw: st.DrawFn) -> tuple[int, int, list[list[int]]]:
    num_experts = draw(st.integers(1, 20))
    num_slots = draw(st.integers(1, num_experts))
    experts = st.sets(st.integers(0, num_experts - 1)).map(sorted)
    return num_experts, num_slots, draw(st.lists(experts, max_size=12))


@settings(deadline=None, max_examples=300)
@given(cases())
def test_rounds_have_what_they_run(case: tuple[int, int, list[list[int]]]) -> None:
    num_experts, num_slots, steps = case
    memory = Memory(num_experts, num_slots)
    for wanted in steps:
        rounds = memory.step(wanted)
        if len(wanted) <= num_slots:
            assert rounds == 1
    assert memory.slots.num_uses == sum(map(len, steps))
    assert memory.slots.num_reads <= memory.slots.num_uses


@settings(deadline=None, max_examples=50)
@given(st.integers(2, 30), st.data())
def test_what_fits_is_read_once(num_experts: int, data: st.DataObject) -> None:
    num_slots = data.draw(st.integers(1, num_experts))
    wanted = sorted(data.draw(st.sets(st.integers(0, num_experts - 1), max_size=num_slots)))
    memory = Memory(num_experts, num_slots)
    for _ in range(3):
        memory.step(wanted)
    assert memory.slots.num_reads == len(wanted)


def test_steps_that_want_all_keep_a_part() -> None:
    """Throwing out what was used longest ago would keep nothing."""
    memory = Memory(16, 8)
    for _ in range(20):
        memory.step(range(16))
    before = memory.slots.num_reads
    memory.step(range(16))
    assert memory.slots.num_reads - before <= 12


def test_what_is_wanted_often_stays() -> None:
    memory = Memory(16, 4)
    for step in range(200):
        memory.step(sorted({3, 7, 11, step * 5 % 16}))
    before = memory.slots.num_reads
    for step in range(16):
        memory.step(sorted({3, 7, 11, step * 5 % 16}))
    assert memory.slots.num_reads - before <= 13  # the 13 others, once each


def test_one_that_was_not_read_is_read_again() -> None:
    slots = ExpertSlots(4, 2)
    slots.begin([1, 3])
    assert [expert for expert, _ in slots.next_round(0).reads] == [1, 3]
    slots.forget(3)
    slots.begin([1, 3])
    assert [expert for expert, _ in slots.next_round(0).reads] == [3]


def test_uses_count_however_many_steps_there_were() -> None:
    """Weights of uses grow with time, and are brought down before they overflow."""
    memory = Memory(4, 2)
    for _ in range(50_000):
        memory.step([0, 1])
    memory.step([2])
    for _ in range(200):
        memory.step([0, 2])
    before = memory.slots.num_reads
    memory.step([0, 2])
    assert memory.slots.num_reads == before
