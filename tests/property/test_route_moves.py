"""Running requests change routes inside a replica, with their KV, while anything fails."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from engine_bench import VOCAB, Bench, make_config, make_request
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_engine_routes import fail_at_random, random_routes, run_until, stages

from shoal.core.kv import KVArrived, KVHop
from shoal.core.request import GenerateRequest
from shoal.core.step import BLOCK_SIZE
from shoal.engine.config import EngineConfig
from shoal.engine.events import Cancel, CopyKV, DrainInstance, DropKV, EndLoan, StopKV

LONG = [1 + i % (VOCAB - 1) for i in range(130)]


@dataclass
class CopyingBench(Bench):
    """`carry` is called when copies shall end."""

    copies: dict[int, CopyKV] = field(default_factory=dict)
    lent: set[int] = field(default_factory=set)
    stopped: list[int] = field(default_factory=list)
    num_copies: int = 0

    def carry(self, share: float = 1.0) -> None:
        """Copies end: `share` of each came, and the rest is something that is wrong."""
        for number in list(self.copies):
            if (copy := self.copies.pop(number, None)) is None:
                continue  # dropped with the one before
            counts = [int(len(hop.block_ids) * share) for hop in copy.hops]
            for hop, count in zip(copy.hops, counts, strict=True):
                self._fill(copy, hop, count)
            self.tell(KVArrived(number, tuple(counts)))

    def _fill(self, copy: CopyKV, hop: KVHop, count: int) -> None:
        target = self.workers.instances[hop.instance]
        for layer in range(hop.layers.start, hop.layers.stop):
            (source,) = (lent for lent in copy.loan.hops if layer in lent.layers)
            for index, block in enumerate(hop.block_ids):
                if index < count:
                    held = source.block_ids[copy.first + index]
                    target.copy(block, layer, self.workers.instances[source.instance], held)
                else:
                    target.spoil(block, layer)

    def run_out(self) -> None:
        for _ in range(100_000):
            if not (self.in_flight or self.copies):
                break
            self.step()
            self.carry()
        super().run_out()
        assert not self.lent
        assert not self.copies

    def computed(self) -> list[int]:
        """Tokens that each instance has computed."""
        return [instance.num_tokens for instance in self.workers.instances]

    def running(self) -> list[int]:
        """Requests on each instance."""
        return [each.num_running for each in self.state.stats().instances]

    def _carry_out(self, effect: object) -> None:
        match effect:
            case CopyKV(loan, first, hops):
                assert loan.lease_id < 0, "other numbers are the router's"
                assert loan.lease_id not in self.lent
                assert {len(hop.block_ids) for hop in hops} == {loan.num_ready - first}
                self.lent.add(loan.lease_id)
                self.copies[loan.lease_id] = effect
                self.num_copies += 1
            case StopKV(number):
                self.stopped.append(number)
            case DropKV(number):
                del self.copies[number]
            case EndLoan(number):
                self.lent.remove(number)
            case _:
                super()._carry_out(effect)


def copying_config(*instances: int, kinds: tuple[str, ...] = (), **fields: object) -> EngineConfig:
    count = sum(instances)
    return make_config(
        routes=stages(*instances),
        instance_blocks=(60,) * count,
        kv_kinds=kinds or ("same",) * count,
        max_num_batched_tokens=64,
        **fields,
    )


def long_request(request_id: str = "r", first: int = 1) -> GenerateRequest:
    """That does not end by itself before 50 tokens."""
    for seed in range(100):
        request = make_request(request_id, [first, *LONG[1:]], max_tokens=60, seed=seed)
        if len(Bench(copying_config(1, 2, 1)).expected(request)) >= 50:
            return request
    raise AssertionError("none of 100 runs for long")


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**32),
    num_stages=st.integers(1, 3),
    num_blocks=st.sampled_from([16, 24, 60]),
    prefix_caching=st.sampled_from([True, True, False]),
    faults=st.sampled_from([0.0, 0.02, 0.1]),
)
def test_outputs_depend_on_prompts_alone(
    seed: int, num_stages: int, num_blocks: int, prefix_caching: bool, faults: float
) -> None:
    rng = random.Random(seed)
    while len(routes := random_routes(rng, num_stages)) == 1:
        pass
    num_instances = 1 + max(hop.instance for route in routes for hop in route)
    config = make_config(
        instance_blocks=tuple(num_blocks + rng.choice([-4, 0, 9]) for _ in range(num_instances)),
        max_model_len=16 * (num_blocks - 4),
        routes=routes,
        kv_kinds=tuple(rng.choice(["a"] * 8 + ["b", ""]) for _ in range(num_instances)),
        prefix_caching=prefix_caching,
        max_steps_in_flight=rng.randrange(1, 4),
        max_step_failures=1_000,
    )
    bench = CopyingBench(config, rng)
    requests: dict[str, GenerateRequest] = {}
    cancelled: set[str] = set()
    prefix = [rng.randrange(1, VOCAB) for _ in range(rng.randrange(130))]
    for i in range(12):
        own = [rng.randrange(1, VOCAB) for _ in range(rng.choice([1, 5, 30]))]
        request = make_request(
            f"r{i}",
            prefix + own,
            max_tokens=rng.randrange(1, min(120, config.max_model_len - len(prefix + own) + 1)),
            priority=rng.randrange(2),
            seed=rng.randrange(3),
        )
        requests[request.request_id] = request
        bench.submit(request)
        for _ in range(rng.randrange(20 * num_stages)):
            bench.now += rng.choice([0.0, 0.1, 3.0])
            if rng.random() < 0.02:
                cancelled.add(f"r{rng.randrange(i + 1)}")
                bench.tell(*(Cancel(victim) for victim in cancelled))
            if rng.random() < 0.1:
                bench.tell(DrainInstance(rng.randrange(num_instances), rng.random() < 0.5))
            if rng.random() < faults / num_stages:
                fail_at_random(bench, rng)
            if bench.down and rng.random() < 0.1:
                bench.ready(rng.choice(sorted(bench.down)))
            if rng.random() < 0.2:
                bench.carry(rng.choice([0.0, 0.5, 1.0, 1.0]))
            bench.step()
    bench.ready(*bench.down)
    bench.run_out()
    for request_id, request in requests.items():
        got, want = bench.outputs[request_id], bench.expected(request)
        if bench.finished[request_id].finish == "cancelled":
            assert request_id in cancelled
            assert got == want[: len(got)]
        else:
            assert got == want


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_a_request_leaves_a_drained_instance_with_its_kv(prefix_caching: bool) -> None:
    bench = CopyingBench(copying_config(1, 2, 1, prefix_caching=prefix_caching))
    request = long_request()
    bench.submit(request)
    run_until(bench, "r", 8)
    assert bench.running() == [1, 1, 0, 1]
    before = bench.computed()
    bench.tell(DrainInstance(1, True))
    run_until(bench, "r", 16)
    assert bench.running() == [1, 1, 0, 1], "it goes on where it is while its KV is copied"
    bench.carry()
    run_until(bench, "r", 24)
    assert bench.running() == [1, 0, 1, 1]
    again = [now - then for now, then in zip(bench.computed(), before, strict=True)]
    # 16 new tokens; and again what was not in full blocks, or came while the others were copied.
    assert max(again[0], again[3]) < 16 + 2 * BLOCK_SIZE
    assert again[2] < 8 + 2 * BLOCK_SIZE
    bench.run_out()
    assert bench.outputs["r"] == bench.expected(request)
    stats = bench.state.stats()
    assert (stats.route_moves, stats.copied_tokens) == (1, 128)


def test_a_long_prompt_is_copied_while_it_is_read() -> None:
    bench = CopyingBench(copying_config(1, 2, 1, max_model_len=600))
    prompt = LONG * 3
    bench.submit(make_request("r", prompt, max_tokens=4))
    while bench.computed()[3] < 100:
        bench.step()
    bench.tell(DrainInstance(1, True))
    for _ in range(3):
        bench.step()
        bench.carry()
    bench.run_out()
    assert bench.num_copies > 1
    assert bench.computed()[0] < len(prompt) + 64 + 4
    assert bench.outputs["r"] == bench.expected(make_request("r", prompt, max_tokens=4))


def test_load_spreads_when_an_instance_is_back() -> None:
    bench = CopyingBench(copying_config(1, 2, 1))
    bench.fail(lost=[2], down=[2])
    requests = [
        make_request(f"r{i}", [i + 1, *LONG[:90]], max_tokens=100, seed=i) for i in range(4)
    ]
    for request in requests:
        bench.submit(request)
        run_until(bench, request.request_id, 1)
    assert bench.running()[1:3] == [4, 0]
    before = bench.computed()
    bench.ready(2)
    for _ in range(200):
        bench.now += 0.1
        bench.step()
        bench.carry()
        if bench.running()[1:3] == [2, 2]:
            break
    else:
        raise AssertionError(f"requests are on {bench.running()}")
    assert bench.computed()[2] - before[2] < 2 * 2 * BLOCK_SIZE + 200
    assert bench.state.stats().route_moves == 2
    bench.run_out()
    for request in requests:
        assert bench.outputs[request.request_id] == bench.expected(request)


def test_short_requests_stay() -> None:
    """Moving one would cost more than it gains."""
    bench = CopyingBench(copying_config(1, 2, 1))
    bench.fail(lost=[2], down=[2])
    for i in range(3):
        bench.submit(make_request(f"r{i}", [i + 1] * 4, max_tokens=14))
    bench.ready(2)
    bench.now += 10.0
    bench.run_out()
    assert bench.num_copies == 0


def test_kv_that_means_something_else_there_is_computed() -> None:
    bench = CopyingBench(copying_config(1, 2, 1, kinds=("a", "a", "b", "a")))
    request = long_request()
    bench.submit(request)
    run_until(bench, "r", 8)
    bench.tell(DrainInstance(1, True))
    run_until(bench, "r", 12)
    assert bench.running() == [1, 0, 1, 1]
    assert bench.num_copies == 0
    assert bench.computed()[2] >= 130
    bench.run_out()
    assert bench.outputs["r"] == bench.expected(request)


@pytest.mark.parametrize("victim", [1, 2])
def test_source_or_target_dies_in_the_middle(victim: int) -> None:
    bench = CopyingBench(copying_config(1, 2, 1))
    request = long_request()
    bench.submit(request)
    run_until(bench, "r", 8)
    bench.tell(DrainInstance(1, True))
    assert bench.copies
    before = bench.computed()[victim ^ 3]
    bench.fail(lost=[victim], down=[victim])
    assert not bench.copies, "nothing more is written of what was on its way"
    run_until(bench, "r", 12)
    again = bench.computed()[victim ^ 3] - before
    assert again >= 130 if victim == 1 else again < 10
    bench.ready(victim)
    bench.run_out()
    assert bench.outputs["r"] == bench.expected(request)


@pytest.mark.parametrize("share", [None, 0.5])
def test_what_does_not_come_in_time_is_computed(share: float | None) -> None:
    """Nothing came, and workers don't even say so; or half of it did."""
    bench = CopyingBench(copying_config(1, 2, 1))
    request = long_request()
    bench.submit(request)
    run_until(bench, "r", 8)
    bench.tell(DrainInstance(1, True))
    for _ in range(2):
        deadline = bench.state.next_deadline()
        assert deadline is not None
        bench.now = deadline
        bench.tell()
        assert bench.stopped == [-1]
        if share is not None:
            bench.carry(share)
            break
    run_until(bench, "r", 12)
    assert bench.running() == [1, 0, 1, 1]
    assert 130 <= bench.computed()[2] + bench.state.stats().copied_tokens < 170
    assert bench.state.stats().copied_tokens == (0 if share is None else 64)
    bench.run_out()
    assert bench.outputs["r"] == bench.expected(request)


def test_for_balance_a_request_moves_with_its_kv_or_not_at_all() -> None:
    bench = CopyingBench(copying_config(1, 2, 1))
    bench.fail(lost=[2], down=[2])
    for i in range(2):
        bench.submit(long_request(f"r{i}", i + 1))
        run_until(bench, f"r{i}", 1)
    bench.ready(2)
    assert bench.num_copies == 1
    bench.carry(0.5)
    for _ in range(20):
        bench.step()
    assert bench.running()[1:3] == [2, 0]
    assert bench.num_copies == 1, "it is not tried again at once"
    bench.run_out()


def test_the_only_instance_of_a_stage_is_not_left() -> None:
    bench = CopyingBench(copying_config(1, 1))
    request = make_request("r", LONG[:40], max_tokens=20, seed=1)
    bench.tell(DrainInstance(0, True))
    bench.submit(request)
    bench.run_out()
    assert bench.outputs["r"] == bench.expected(request)


def test_new_requests_stay_away_until_it_is_resumed() -> None:
    bench = CopyingBench(copying_config(1, 2))
    bench.tell(DrainInstance(2, True))
    for i in range(4):
        bench.submit(make_request(f"a{i}", [i + 1] * 30, max_tokens=3))
    assert bench.running() == [4, 4, 0]
    bench.run_out()
    bench.tell(DrainInstance(2, False))
    for i in range(4):
        bench.submit(make_request(f"b{i}", [i + 9] * 30, max_tokens=3))
    assert bench.running() == [4, 2, 2]
    bench.run_out()
