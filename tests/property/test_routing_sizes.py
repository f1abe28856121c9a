"""What is worked out replica by replica for small fleets and by arrays for large ones is the same;
so is what is kept, and what is worked out anew."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from random import Random

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from shoal.core.latency import Slo
from shoal.core.speed import Speed
from shoal.core.stats import EngineInfo
from shoal.policy.breaker import RECOVERED
from shoal.policy.routing.fleet import FEW, Ask, Fleet, Row
from shoal.policy.routing.learning import Correction
from shoal.policy.routing.standing import Standing, Stay
from shoal.router import vacancies
from shoal.router.loads import Loads
from shoal.router.prefix_index import PrefixIndex
from shoal.router.records import Replica
from shoal.router.vacancies import Vacancies

NOW = 3.0
ROUTING = import_module("shoal.policy.routing.predicted")
"""Not the policy of that name."""
SIZES = st.integers(1, 3 * FEW)
INFO = EngineInfo(
    max_model_len=4096,
    num_kv_blocks=200,
    max_num_seqs=4,
    max_num_batched_tokens=512,
    max_waiting=8,
    device="none",
    dtype="none",
)


def some_standing(rng: Random) -> Standing:
    slower = rng.uniform(0.2, 5.0)
    speed = Speed(0.01 * slower, 1e-4 * slower, 1e-5, 1e-8, 1e-12)
    standing = Standing(speed, Correction(is_known=True), seats=4, room=3200, chunk=512)
    now = 0.0
    for _ in range(rng.randrange(6)):
        now += rng.uniform(0.0, 0.5)
        tokens = rng.randrange(1, 900)
        stay = Stay(tokens, tokens * tokens / 2, tokens, rng.uniform(1, 300))
        standing.put(stay, now)
        if rng.random() < 0.6:
            standing.begin(stay, 0, now)
    return standing


def some_fleet(rng: Random, num: int, slo: Slo | None) -> tuple[Fleet, Loads, Vacancies]:
    names = [f"r{number}" for number in range(num)]
    replicas = {name: Replica(name, info=INFO) for name in names}
    fleet, loads = Fleet(num, target_ttft_s=rng.uniform(0.05, 2.0)), Loads(replicas)
    found = Vacancies(slo, fleet, loads, predicts=rng.random() < 0.8)
    for number, name in enumerate(names):
        standing = some_standing(rng)
        found.ready(number, INFO)
        column = standing.column(1.0, fleet.target_ttft_s, fleet.target_tpot_s)
        fleet.table[: Row.NUM, number] = column
        found.renew(number, standing)
        for request in range(rng.randrange(6)):
            loads.put(name, f"{name}-{request}")
    return fleet, loads, found


def some_ask(rng: Random, num: int) -> Ask:
    cached = np.array([rng.choice([0.0, 64.0, 512.0]) for _ in range(num)])
    return Ask(rng.randrange(1, 900), rng.uniform(1, 300), rng.choice([None, cached]))


@contextmanager
def limits(module: object, **wanted: int) -> Iterator[None]:
    before = {name: getattr(module, name) for name in wanted}
    for name, limit in wanted.items():
        setattr(module, name, limit)
    try:
        yield
    finally:
        for name, limit in before.items():
            setattr(module, name, limit)


def some_of(rng: Random, num: int) -> np.ndarray:
    return np.array(sorted(rng.sample(range(num), rng.randint(1, num))), dtype=int)


@given(SIZES, st.integers(0, 1 << 30))
def test_a_choice_is_the_same_one_by_one_and_at_once(num: int, seed: int) -> None:
    rng = Random(seed)
    fleet, _, _ = some_fleet(rng, num, None)
    fit, ask = some_of(rng, num), some_ask(rng, num)
    chosen = []
    for few, in_vain in ((num, 4), (0, num), (0, 0)):
        with limits(ROUTING, _MOST_IN_VAIN=in_vain, FEW=few):
            chosen.append(ROUTING.predicted(fleet, fit, ask, NOW, rng))
    assert len(set(chosen)) == 1
    assert chosen[0] in fit


@given(SIZES, st.integers(0, 1 << 30), st.booleans())
def test_who_has_room_is_the_same_one_by_one_and_at_once(
    num: int, seed: int, has_slo: bool
) -> None:
    rng = Random(seed)
    slo = Slo(ttft_s=0.5, tpot_s=rng.choice([None, 0.02])) if has_slo else None
    _, _, found = some_fleet(rng, num, slo)
    waited_s = rng.choice([0.0, 0.3])
    fit, ask = some_of(rng, num), some_ask(rng, num)
    answers = []
    for few in (num, 0):
        found.waited(1.0)  # otherwise the answer is kept
        found.waited(waited_s)
        with limits(vacancies, FEW=few):
            answers.append((found.among(fit, NOW).tolist(), found.soonest_s(fit, ask, NOW)))
    assert answers[0] == answers[1]


@given(SIZES, st.integers(0, 1 << 30))
def test_what_is_kept_of_who_has_room_is_forgotten_when_something_happens(
    num: int, seed: int
) -> None:
    rng = Random(seed)
    fleet, loads, found = some_fleet(rng, num, None)
    every, now = np.arange(num), NOW
    for _ in range(20):
        number = rng.randrange(num)
        name = f"r{number}"
        if rng.random() < 0.4:
            loads.put(name, "new")
        elif rng.random() < 0.3:
            standing = some_standing(rng)
            column = standing.column(now, fleet.target_ttft_s, fleet.target_tpot_s)
            fleet.table[: Row.NUM, number] = column
            found.renew(number, standing)
        else:
            now += rng.choice([0.0, 0.2])
        kept = found.among(every, now).tolist()
        found.waited(9.0)
        found.waited(0.0)
        assert found.among(every, now).tolist() == kept


@given(SIZES, st.integers(0, 1 << 30))
def test_those_at_their_limit_are_left_out_unless_all_are(num: int, seed: int) -> None:
    rng = Random(seed)
    replicas = {f"r{number}": Replica(f"r{number}", info=INFO) for number in range(num)}
    loads = Loads(replicas)
    for name in replicas:
        loads.add(name, rng.randrange(3))
        loads.allow(name, rng.choice([None, None, 0, 1, 2]))
        loads.drain(name, rng.random() < 0.2)
    but_not = rng.sample(sorted(replicas), rng.randrange(num))
    taking = [each for each in replicas.values() if not each.is_drained] or [*replicas.values()]
    others = [each for each in taking if each.name not in but_not]
    free = [
        each for each in others if each.allowance is None or loads.of(each.name) < each.allowance
    ]
    known = [each for each in others if each.allowance is None or each.allowance >= RECOVERED]
    found = [f"r{number}" for number in loads.fitting(False, but_not)]
    assert found == [each.name for each in free or known or others]
    assert loads.left == [each for each in replicas.values() if each.is_drained]


@given(st.integers(0, 1 << 30), st.integers(1, 40))
def test_granules_named_before_are_those_named_anew(seed: int, num: int) -> None:
    rng = Random(seed)
    beginnings = [tuple(rng.randrange(50) for _ in range(700)) for _ in range(2)]
    fresh, kept = PrefixIndex(num), PrefixIndex(num)
    for _ in range(12):
        tokens = (*rng.choice(beginnings)[: rng.randrange(700)], *range(rng.randrange(400)))
        known: list[tuple[int, int]] = []
        replica = rng.randrange(num)
        for _ in range(2):
            found, again = fresh.cached(tokens, "a"), kept.cached(tokens, "a", known)
            assert (found is None) == (again is None)
            assert found is None or again is None or found.tolist() == again.tolist()
            fresh.note(replica, tokens, "a")
            kept.note(replica, tokens, "a", known)
            tokens = (*tokens, *(rng.randrange(50) for _ in range(300)))
