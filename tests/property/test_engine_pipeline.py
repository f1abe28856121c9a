"""Whether all stages of a pipeline have work: a clock on which every hop takes one tick."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest
from engine_bench import Bench, make_config, make_request

from shoal.core.plan import Hop, Route
from shoal.core.split import Range
from shoal.core.step import Step


def chain(num_stages: int) -> tuple[Route, ...]:
    return (tuple(Hop(i, Range(i, i + 1)) for i in range(num_stages)),)


def make_bench(num_stages: int, **fields: object) -> Bench:
    config = make_config(
        routes=chain(num_stages),
        instance_blocks=(200,) * num_stages,
        eos_token_ids=(),
        max_model_len=1000,
        **{"max_num_seqs": 64, "max_num_batched_tokens": 64, **fields},
    )
    return Bench(config)


def tick(bench: Bench) -> int:
    """Every instance that can runs a Step, all at once; how many did."""
    ready = bench.workers.ready()
    for instance, route in ready:
        bench.workers.run_one(instance, route)
    for result in bench.workers.results():
        bench.give(result)
    return len(ready)


def ticks_until(bench: Bench, done: Callable[[], bool]) -> int:
    count = 0
    while not done():
        tick(bench)
        count += 1
        assert count < 10_000
    return count


def is_decode(step: Step) -> bool:
    return all(row.num_tokens == 1 for row in step.rows)


@pytest.mark.parametrize("num_stages", [2, 3, 4])
@pytest.mark.parametrize("extra", [0, 1, 2, 5, 17])
def test_every_stage_is_busy_with_as_many_streams(num_stages: int, extra: int) -> None:
    bench = make_bench(num_stages)
    num_streams = num_stages + extra
    for i in range(num_streams):
        bench.submit(make_request(f"r{i}", [i + 1, 2, 3], max_tokens=200))
        tick(bench)
    for _ in range(30):
        tick(bench)
    assert len(bench.steps) == num_stages + 1
    assert all(is_decode(step) for step in bench.steps)
    before = sum(len(output) for output in bench.outputs.values())
    num_ticks = 20 * num_stages
    busy = sum(tick(bench) for _ in range(num_ticks))
    assert busy == num_ticks * num_stages
    tokens = sum(len(output) for output in bench.outputs.values()) - before
    # Every stream one token in each round of the pipeline.
    assert tokens == pytest.approx(num_streams * num_ticks / num_stages, rel=0.03)


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4])
def test_a_single_stream_never_waits_for_the_engine(num_stages: int) -> None:
    bench = make_bench(num_stages)
    bench.submit(make_request("r", [1, 2, 3], max_tokens=100))
    assert len(bench.steps) == 2, "the one that runs, and the next; more would only wait"
    ticks = ticks_until(bench, lambda: len(bench.outputs["r"]) == 100)
    assert ticks == 100 * num_stages


@pytest.mark.parametrize("num_stages", [2, 3, 4])
def test_chunks_of_one_prompt_are_on_different_stages_at_once(num_stages: int) -> None:
    bench = make_bench(num_stages)
    bench.submit(make_request("r", [1 + i % 40 for i in range(640)], max_tokens=1))
    ticks = ticks_until(bench, lambda: len(bench.outputs["r"]) == 1)
    assert ticks == 640 // 64 + num_stages - 1


def test_streams_that_end_leave_hardly_a_stage_idle() -> None:
    bench = make_bench(3)
    for i in range(12):
        bench.submit(make_request(f"r{i}", [i + 1, 2, 3], max_tokens=40 + 15 * i))
    for _ in range(40):
        tick(bench)
    busy = []
    while len(bench.outputs) - len(bench.finished) > 4:
        busy.append(tick(bench))
    assert sum(busy) >= 0.97 * 3 * len(busy)


@pytest.mark.parametrize("num_stages", [2, 3, 4])
def test_streams_that_come_and_go_leave_hardly_a_stage_idle(num_stages: int) -> None:
    """The number of those that decode changes all the time: a Step that took one of the Step
    before it, to be as large as that, would wait for its token."""
    bench, rng = make_bench(num_stages), Random(num_stages)
    busy, num_late = [], 0
    for number in range(150 * num_stages):
        if number % num_stages == 0:
            prompt = [1 + number % 40] * rng.randrange(2, 80)
            bench.submit(make_request(f"r{number}", prompt, max_tokens=rng.randrange(10, 30)))
        busy.append(tick(bench))
        step = bench.steps[-1]
        latest = {step.step_id - back for back in range(1, num_stages)}
        num_late += any(row.token_ref and row.token_ref.step_id in latest for row in step.rows)
    busy = busy[20 * num_stages :]
    assert sum(busy) >= 0.97 * num_stages * len(busy)
    assert num_late <= 4 * num_stages, "while there are few"


def test_a_prompt_does_not_stop_the_others() -> None:
    bench = make_bench(3)
    for i in range(6):
        bench.submit(make_request(f"r{i}", [i + 1, 2, 3], max_tokens=300))
    for _ in range(30):
        tick(bench)
    bench.submit(make_request("long", [1 + i % 40 for i in range(600)], max_tokens=1))
    before = [len(bench.outputs[f"r{i}"]) for i in range(6)]
    num_ticks = ticks_until(bench, lambda: "long" in bench.finished)
    after = [len(bench.outputs[f"r{i}"]) for i in range(6)]
    gained = [late - early for late, early in zip(after, before, strict=True)]
    assert min(gained) >= num_ticks // 3 - 2
    assert num_ticks <= 600 // 60 + 3 + 4


def test_a_step_decodes_for_no_more_than_its_share() -> None:
    bench = make_bench(3)
    for i in range(10):
        bench.submit(make_request(f"r{i}", [i + 1, 2, 3], max_tokens=100))
    for _ in range(60):
        tick(bench)
        if all(is_decode(step) for step in bench.steps):
            assert all(len(step.rows) <= 4 for step in bench.steps[1:])


def test_rebuilding_and_decoding_take_turns() -> None:
    """Streams that lost KV at the middle stage come back while new ones are served."""
    bench = make_bench(3, max_num_seqs=16)
    for i in range(4):
        bench.submit(make_request(f"old{i}", [i + 1] * 500, max_tokens=60))
    ticks_until(bench, lambda: all(len(output) > 3 for output in bench.outputs.values()))
    bench.fail(lost=[1], down=[1])
    bench.submit(make_request("new", [9] * 10, max_tokens=60))
    bench.ready(1)
    ticks_until(bench, lambda: len(bench.outputs["new"]) > 3)
    assert any(step.num_hops == 2 for step in bench.steps), "the old ones are not done yet"
    ticks_until(bench, lambda: len(bench.finished) == 5)
    for i in range(4):
        want = bench.expected(make_request("", [i + 1] * 500, max_tokens=60))
        assert bench.outputs[f"old{i}"][: len(want)] == want
