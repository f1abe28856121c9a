"""The engine over stages, instances and overlapping routes, while any of them fail."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
from engine_bench import VOCAB, Bench, make_config, make_request
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal.core.errors import ConfigError
from shoal.core.plan import Hop, Route
from shoal.core.request import GenerateRequest
from shoal.core.split import Range
from shoal.core.step import InstancesReady, StepFailure
from shoal.engine.events import Cancel, InstancesSlow, Submit


def random_routes(rng: random.Random, num_stages: int) -> tuple[Route, ...]:
    """Some of the chains through 1-3 instances a stage, cut at random layers: of each route its
    own, or all alike."""
    num_layers, first, stages = rng.randrange(1, 6), 0, []
    for _ in range(num_stages):
        stages.append(range(first, first + rng.randrange(1, 4)))
        first = stages[-1].stop
    chains = list(itertools.product(*stages))
    routes, are_alike, inner = [], rng.random() < 0.6, list[int]()
    for chain in rng.sample(chains, rng.randrange(1, min(len(chains), 5) + 1)):
        if not (inner and are_alike):
            inner = sorted(rng.randrange(num_layers + 1) for _ in chain[1:])
        cuts = itertools.pairwise([0, *inner, num_layers])
        routes.append(
            tuple(Hop(at, Range(*layers)) for at, layers in zip(chain, cuts, strict=True))
        )
    return tuple(routes)


def fail_at_random(bench: Bench, rng: random.Random) -> None:
    """Something that an executor may report: a bad Step, a worker that died, a cut link."""
    everyone = range(len(bench.config.instance_blocks))
    some = [instance for instance in everyone if rng.random() < 0.4]
    blamed = rng.choice(bench.steps).step_id if bench.steps and rng.random() < 0.5 else None
    match rng.randrange(4):
        case 0:
            bench.fail(step_id=blamed)
        case 1:
            bench.fail(step_id=blamed, lost=())
        case 2:
            bench.fail(step_id=blamed, lost=some, down=some)
        case _:
            partitioned = [instance for instance in everyone if rng.random() < 0.3]
            bench.fail(lost=some, down=[*some, *partitioned])


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**32),
    num_stages=st.integers(1, 4),
    num_blocks=st.sampled_from([13, 20, 60]),
    budget=st.sampled_from([6, 24, 100]),
    prefix_caching=st.sampled_from([True, True, False]),
    faults=st.sampled_from([0.0, 0.02, 0.1]),
)
def test_outputs_depend_on_prompts_alone(
    seed: int, num_stages: int, num_blocks: int, budget: int, prefix_caching: bool, faults: float
) -> None:
    rng = random.Random(seed)
    routes = random_routes(rng, num_stages)
    num_instances = 1 + max(hop.instance for route in routes for hop in route)
    config = make_config(
        # Some routes are too small for the longest requests, but never all.
        instance_blocks=tuple(num_blocks + rng.choice([-4, 0, 9]) for _ in range(num_instances)),
        max_model_len=16 * (num_blocks - 4),
        routes=routes,
        max_num_batched_tokens=budget,
        prefix_caching=prefix_caching,
        max_steps_in_flight=rng.randrange(1, 4),
        max_step_failures=1_000,
    )
    bench = Bench(config, rng)
    prefixes = [[rng.randrange(1, VOCAB) for _ in range(rng.randrange(80))] for _ in range(3)]
    requests: dict[str, GenerateRequest] = {}
    cancelled: set[str] = set()
    for i in range(30):
        own = [rng.randrange(1, VOCAB) for _ in range(rng.choice([0, 0, 5, 30]))]
        request = make_request(
            f"r{i}",
            rng.choice(prefixes) + own or [1],
            max_tokens=rng.randrange(1, 30),
            priority=rng.randrange(3),
            seed=rng.randrange(3),
        )
        requests[request.request_id] = request
        bench.submit(request)
        if rng.random() < 0.1:
            cancelled.add(f"r{rng.randrange(i + 1)}")
            bench.tell(*(Cancel(victim) for victim in cancelled))
        for _ in range(rng.randrange(12 * num_stages)):
            if rng.random() < faults / num_stages:
                fail_at_random(bench, rng)
            if bench.down and rng.random() < 0.1:
                bench.ready(rng.choice(sorted(bench.down)))
            bench.step()
    bench.ready(*bench.down)
    bench.run_out()
    assert set(bench.finished) == set(requests), "each request ends exactly once"
    for request_id, request in requests.items():
        got, want = bench.outputs[request_id], bench.expected(request)
        if bench.finished[request_id].finish == "cancelled":
            assert request_id in cancelled
            assert got == want[: len(got)]
        else:
            assert got == want


def stages(*instances: int, layers: int = 6) -> tuple[Route, ...]:
    """All chains through stages of so many instances, with `layers` layers each."""
    first, numbers = 0, []
    for count in instances:
        numbers.append(range(first, first + count))
        first += count
    return tuple(
        tuple(
            Hop(at, Range(layers * stage, layers * (stage + 1))) for stage, at in enumerate(chain)
        )
        for chain in itertools.product(*numbers)
    )


def run_until(bench: Bench, request_id: str, num_tokens: int) -> None:
    while len(bench.outputs[request_id]) < num_tokens:
        bench.step()


LONG = [1 + i % (VOCAB - 1) for i in range(130)]


def test_only_what_a_lost_instance_needs_is_computed_again() -> None:
    bench = Bench(
        make_config(routes=stages(1, 1, 1), instance_blocks=(40, 40, 40), max_num_batched_tokens=64)
    )
    request = make_request("r", LONG, max_tokens=40, seed=1)
    bench.submit(request)
    run_until(bench, "r", 5)
    before = [instance.num_tokens for instance in bench.workers.instances]
    bench.fail(lost=[1], down=[1])
    assert not bench.steps, "the only route is down"
    assert bench.state.stats().recovering
    bench.ready(1)
    assert not bench.state.stats().recovering
    assert {step.num_hops for step in bench.steps} == {2, None}
    run_until(bench, "r", 6)
    after = [instance.num_tokens for instance in bench.workers.instances]
    first, second, third = (now - then for now, then in zip(after, before, strict=True))
    assert first >= second >= 130
    assert third < 30, "the last stage kept its KV"
    bench.run_out()
    assert bench.outputs["r"] == bench.expected(request)


def test_a_lost_last_stage_means_all_of_it_again() -> None:
    bench = Bench(make_config(routes=stages(1, 1), instance_blocks=(40, 40)))
    request = make_request("r", LONG, max_tokens=20, seed=1)
    bench.submit(request)
    run_until(bench, "r", 5)
    bench.fail(lost=[1])
    assert all(step.num_hops is None for step in bench.steps)
    assert bench.steps[0].rows[0].start == 0
    bench.run_out()
    assert bench.outputs["r"] == bench.expected(request)


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_a_failure_that_costs_no_kv_costs_nothing_but_the_steps_in_flight(
    prefix_caching: bool,
) -> None:
    config = make_config(
        routes=stages(1, 1), instance_blocks=(40, 40), prefix_caching=prefix_caching
    )
    bench = Bench(config)
    request = make_request("r", LONG, max_tokens=40, seed=1)
    bench.submit(request)
    run_until(bench, "r", 5)
    bench.fail(lost=[])
    assert bench.steps[0].rows[0].start >= 130 + 4
    bench.run_out()
    assert bench.outputs["r"] == bench.expected(request)


def test_requests_of_a_route_that_is_down_take_another_and_keep_what_is_shared() -> None:
    config = make_config(routes=stages(1, 2, 1), instance_blocks=(60, 60, 60, 60))
    bench = Bench(config)
    request = make_request("r", LONG, max_tokens=40, seed=1)
    bench.submit(request)
    run_until(bench, "r", 5)
    assert bench.workers.instances[2].num_tokens == 0
    last_before = bench.workers.instances[3].num_tokens
    bench.fail(lost=[1], down=[1])
    assert {step.route for step in bench.steps} == {1}
    run_until(bench, "r", 6)
    assert bench.workers.instances[3].num_tokens - last_before < 30
    bench.run_out()
    assert bench.outputs["r"] == bench.expected(request)


def test_a_cut_link_with_no_other_way_waits_and_rebuilds_nothing() -> None:
    bench = Bench(make_config(routes=stages(1, 1), instance_blocks=(40, 40)))
    request = make_request("r", LONG, max_tokens=40, seed=1)
    bench.submit(request)
    run_until(bench, "r", 5)
    bench.fail(lost=[], down=[0, 1])
    assert not bench.steps
    bench.ready(0)
    assert not bench.steps
    bench.ready(1)
    assert bench.steps[0].rows[0].start >= 130 + 4
    bench.run_out()
    assert bench.outputs["r"] == bench.expected(request)


def test_another_failure_while_one_is_down() -> None:
    bench = Bench(make_config(routes=stages(1, 2), instance_blocks=(60, 60, 60)))
    request = make_request("r", LONG, max_tokens=40, seed=1)
    bench.submit(request)
    run_until(bench, "r", 5)
    bench.fail(lost=[1], down=[1])
    bench.fail(lost=[2], down=[2])
    assert not bench.steps
    bench.ready(2)
    assert {step.route for step in bench.steps} == {1}
    bench.ready(1)
    bench.run_out()
    assert bench.outputs["r"] == bench.expected(request)


def test_kv_in_flight_is_not_found_by_other_routes() -> None:
    """The last instance serves both, and runs the second's Step before the first's."""
    bench = Bench(make_config(routes=stages(2, 1), instance_blocks=(60, 60, 60)))
    requests = [make_request(f"r{i}", LONG, max_tokens=10) for i in range(2)]
    for request in requests:
        bench.submit(request)
    while "r1" not in bench.finished:
        instance, route = max(bench.workers.ready(), key=lambda ready: ready[1])
        bench.workers.run_one(instance, route)
        for result in bench.workers.results():
            bench.give(result)
    bench.run_out()
    assert all(bench.outputs[each.request_id] == bench.expected(each) for each in requests)


def test_kv_that_was_found_in_flight_is_not_there_if_its_step_fails() -> None:
    bench = Bench(make_config(max_num_batched_tokens=400))
    requests = [make_request(f"r{i}", LONG[:97], max_tokens=10) for i in range(2)]
    bench.outputs = {"r0": [], "r1": []}
    bench.tell(*(Submit(request) for request in requests))
    for _ in range(2):
        assert [row.start for row in bench.steps[0].rows] == [0, 96]
        bench.fail(lost=[])
    bench.run_out()
    assert all(bench.outputs[each.request_id] == bench.expected(each) for each in requests)


def test_news_of_an_older_incarnation_is_nothing_to_it() -> None:
    bench = Bench(make_config(routes=stages(1, 1), instance_blocks=(40, 40)))
    request = make_request("r", LONG, max_tokens=10, seed=1)
    bench.submit(request)
    bench.fail(lost=[])
    old = StepFailure(step_id=0, incarnation=0, reason="late", lost=(0,), down=(0, 1))
    bench.tell(old)
    bench.run_out()
    assert bench.outputs["r"] == bench.expected(request)


def lose_worker(bench: Bench, instance: int = 0) -> None:
    """It ends, and is started again after a while."""
    bench.fail(lost=[instance], down=[instance])
    bench.now += 5.0
    bench.ready(instance)


@pytest.mark.parametrize("together", [1, 6])
def test_workers_that_die_are_not_held_against_requests(together: int) -> None:
    """Now and then, or all of a machine's at once."""
    routes = stages(together, 1)
    blocks = (40,) * (together + 1)
    bench = Bench(make_config(routes=routes, instance_blocks=blocks, max_step_failures=1))
    request = make_request("r", LONG, max_tokens=10, seed=1)
    bench.submit(request)
    while "r" not in bench.finished:
        for instance in range(together):
            bench.fail(lost=[instance], down=[instance])
        bench.now += 5.0
        bench.ready(*range(together))
        num_before = len(bench.outputs["r"])
        while "r" not in bench.finished and len(bench.outputs["r"]) == num_before:
            bench.step()
    assert bench.outputs["r"] == bench.expected(request)


def test_a_cut_link_is_held_against_nobody() -> None:
    bench = Bench(make_config(routes=stages(1, 1), instance_blocks=(40, 40), max_step_failures=1))
    request = make_request("r", LONG, max_tokens=10, seed=1)
    bench.submit(request)
    for _ in range(10):
        bench.fail(lost=[], down=[0])
        bench.now += 5.0
        bench.ready(0)
    bench.run_out()
    assert bench.outputs["r"] == bench.expected(request)


@pytest.mark.parametrize("routes", [stages(1), stages(1, 2)])
def test_a_request_under_which_workers_always_end_takes_no_other_with_it(
    routes: tuple[Route, ...],
) -> None:
    """Nobody says which Step it was; it must not be tried for ever either."""
    num_instances = 1 + max(hop.instance for route in routes for hop in route)
    config = make_config(
        routes=routes, instance_blocks=(60,) * num_instances, max_num_batched_tokens=100
    )
    bench = Bench(config)
    requests = {f"r{i}": make_request(f"r{i}", [i + 1] * 20, max_tokens=30) for i in range(6)}
    for request in requests.values():
        bench.submit(request)
    num_losses = 0
    for _ in range(10_000):
        if not bench.steps:
            break
        if any(row.token_ids[:1] == (4,) for row in bench.steps[0].rows if row.start < 16):
            num_losses += 1
            lose_worker(bench)
        else:
            bench.step()
    assert num_losses == 4, "with others, again, and twice alone"
    error = bench.finished["r3"].error
    assert error is not None
    assert error.status == 500
    for request_id in requests.keys() - {"r3"}:
        assert bench.outputs[request_id] == bench.expected(requests[request_id])


def test_requests_spread_over_instances_by_load() -> None:
    config = make_config(
        routes=stages(1, 2), instance_blocks=(200, 60, 60), max_num_batched_tokens=200
    )
    bench = Bench(config)
    for i in range(6):
        bench.submit(make_request(f"r{i}", [i + 1] * 40, max_tokens=20))
        bench.step()
    rows = [step.route for step in bench.steps for _ in step.rows]
    assert set(rows) == {0, 1}
    bench.run_out()
    one, two = (bench.workers.instances[i].num_tokens for i in (1, 2))
    assert 0.5 < one / two < 2


def test_a_larger_instance_takes_more() -> None:
    config = make_config(
        routes=stages(1, 2),
        instance_blocks=(400, 120, 40),
        max_num_seqs=12,
        max_num_batched_tokens=600,
    )
    bench = Bench(config)
    bench.tell()
    for i in range(12):
        bench.submit(make_request(f"r{i}", [i + 1] * 32, max_tokens=60, seed=i))
    bench.step()
    sequences = {(row.sequence_id, step.route) for step in bench.steps for row in step.rows}
    routes = [route for _, route in sequences]
    assert routes.count(0) >= 2 * routes.count(1) > 0


def test_a_known_prefix_draws_requests_to_its_instance() -> None:
    config = make_config(
        routes=stages(1, 2), instance_blocks=(60, 60, 60), max_num_batched_tokens=200
    )
    bench = Bench(config)
    for i, prompt in enumerate([LONG, [7] * 100]):
        bench.submit(make_request(f"warm{i}", prompt, max_tokens=1))
    bench.run_out()
    for i, prompt in enumerate([LONG, [7] * 100] * 2):
        bench.submit(make_request(f"r{i}", prompt, max_tokens=1))
        assert bench.steps[0].num_tokens < 16
        assert bench.steps[0].route == i % 2
        bench.run_out()


def test_requests_never_take_a_route_too_small_for_them() -> None:
    config = make_config(routes=stages(1, 2), instance_blocks=(60, 5, 60))
    bench = Bench(config, random.Random(1))
    for i in range(8):
        request = make_request(f"r{i}", [i + 1] * 60, max_tokens=100)
        bench.submit(request)
        assert {step.route for step in bench.steps} == {1}
    bench.run_out()


def test_routes_of_other_layers_share_no_kv() -> None:
    first, second = stages(1, 2)
    second = (replace(second[0], layers=Range(0, 3)), replace(second[1], layers=Range(3, 12)))
    config = make_config(routes=(first, second), instance_blocks=(60, 60, 60))
    bench = Bench(config)
    prompts = [LONG, LONG[:100]]
    for i, prompt in enumerate(prompts * 3):
        bench.submit(make_request(f"r{i}", prompt, max_tokens=30, seed=i))
    requests = {f"r{i}": p for i, p in enumerate(prompts * 3)}
    bench.run_out()
    for i, (request_id, prompt) in enumerate(requests.items()):
        want = bench.expected(make_request(request_id, prompt, max_tokens=30, seed=i))
        assert bench.outputs[request_id] == want


def test_ready_instances_that_were_never_down_are_welcome() -> None:
    bench = Bench(make_config())
    bench.tell(InstancesReady((0,)))
    bench.submit(make_request("r", LONG[:20]))
    bench.run_out()


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"routes": ()}, "no route"),
        ({"instance_blocks": (0,)}, "instance 0 has 0 KV blocks"),
        ({"routes": stages(1, 1)}, "route 0 goes through instances"),
        ({"routes": (stages(1)[0] * 2,)}, "name each of them once"),
        ({"routes": stages(1, 1), "instance_blocks": (40, 5)}, "holds only 80"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(fields: dict[str, object], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        make_config(**fields)


def test_routes_shift_away_from_an_instance_that_is_slow() -> None:
    both = tuple((Hop(instance, Range(0, 2)),) for instance in range(2))
    config = make_config(instance_blocks=(60, 60), routes=both, max_num_batched_tokens=100)

    def running(*slow: tuple[int, float]) -> list[int]:
        """On each instance."""
        bench = Bench(config)
        bench.tell(InstancesSlow(slow))
        for number in range(config.max_num_seqs):
            bench.submit(make_request(f"q{number}", [number + 1] * 8, max_tokens=60))
        for _ in range(12):
            bench.step()
        stats = bench.state.stats()
        assert stats.slow == slow
        bench.run_out()
        return [each.num_running for each in stats.instances]

    for instance in range(2):
        slow = running((instance, 4.0))
        assert slow[instance] < slow[1 - instance]
