"""Constants from timed Steps: of a device alone, of a running replica; and who gets which."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import pytest

from shoal.core.cluster import Cluster, Constants, Device, Host, Link
from shoal.core.errors import ConfigError
from shoal.core.model_spec import LayerSpec, ModelSpec, RopeSpec
from shoal.core.plan import InstancePlan, RankPlan, ReplicaPlan, StagePlan, default_routes
from shoal.core.split import Range, split_by_weights, whole
from shoal.core.step import Step, StepRow
from shoal.core.step_times import InstanceStep, StepClock, StepTaken
from shoal.policy.cost_model.calibration import device_constants, narrow, running_constants
from shoal.policy.cost_model.constants import constants_for
from shoal.policy.cost_model.loads import StepLoad
from shoal.policy.cost_model.numbers import Numbers
from shoal.policy.cost_model.times import InstanceCost, ReplicaCost, part_of

SPEC = ModelSpec(
    architecture="llama",
    num_layers=16,
    hidden_size=1024,
    num_heads=16,
    num_kv_heads=4,
    head_dim=64,
    ffn_size=4096,
    vocab_size=32000,
    norm_eps=1e-5,
    layers=(LayerSpec(rope=RopeSpec()),) * 16,
    max_positions=4096,
    attention_scale=0.125,
    tied_embeddings=True,
)
INT8 = Numbers(weights="int8", compute="int8", packed=True)
KINDS = [
    *(((context - 1, 1, True),) * batch for batch in (1, 4, 16) for context in (32, 1024)),
    *(((0, tokens, True),) for tokens in (8, 16, 32, 64, 128, 256)),
    ((992, 32, True),),
    *((*((31, 1, True),) * 4, (0, tokens, False)) for tokens in (8, 24)),
]
DEPTHS = (Range(0, 16), Range(8, 16))


def _device(host: str, slowness: float = 1.0) -> Device:
    return Device(
        name=f"{host}.cpu",
        kind="cpu",
        host=host,
        device="cpu",
        memory_bytes=8 << 30,
        bandwidth_bytes_per_s=20e9 / slowness,
        flops=(("bfloat16", 100e9 / slowness), ("int8", 300e9 / slowness)),
        precisions=("bfloat16", "int8"),
        launch_s=2e-6 * slowness,
    )


def _true(device: Device, slowness: float = 1.0, exposed: float = 0.0) -> Constants:
    return Constants(
        kind="cpu",
        engine="shoal",
        precision="int8",
        eta=0.6,
        layer_s=80e-6 * slowness,
        mfu=0.5,
        error=0.0,
        bandwidth_bytes_per_s=device.bandwidth_bytes_per_s,
        flops_per_s=device.flops_per_s("bfloat16"),
        device=device.name,
        step_s=2e-3 * slowness,
        row_s=3e-4 * slowness,
        attention=0.1,
        exposed=exposed,
    )


def _runs(
    device: Device, constants: Constants, noise: float = 0.0
) -> list[tuple[ModelSpec, list[StepTaken]]]:
    """Of the model's width, and of half of it."""
    widths = (SPEC, narrow(SPEC))
    return [(spec, list(_taken(spec, device, constants, noise))) for spec in widths]


def _taken(
    spec: ModelSpec, device: Device, constants: Constants, noise: float = 0.0
) -> Iterator[StepTaken]:
    rng = random.Random(1)
    cluster = Cluster(hosts=(Host(name=device.host),), devices=(device,))
    for layers in DEPTHS:
        shard = part_of(whole(spec), layers)
        cost = InstanceCost(spec, [shard], [device], cluster, INT8).under(constants)
        for rows in KINDS:
            seconds = cost.time(StepLoad.of(rows)).total_s
            yield StepTaken(layers, rows, seconds * rng.uniform(1 - noise, 1 + noise))


@pytest.mark.parametrize("exposed", [0.1, 0.9])
def test_steps_that_were_not_timed_are_foretold(exposed: float) -> None:
    device = _device("a")
    true = _true(device, exposed=exposed)
    found = device_constants(device, INT8, _runs(device, true), source="a test")
    cluster = Cluster(hosts=(Host(name="a"),), devices=(device,))
    for layers in (Range(0, 16), Range(12, 16), Range(6, 10)):
        cost = InstanceCost(SPEC, [part_of(whole(SPEC), layers)], [device], cluster, INT8)
        mixed = StepLoad.decode(3, 200) + StepLoad.of([(0, 12, False)])
        loads = StepLoad.decode(2, 500), StepLoad.decode(8, 100), StepLoad.prefill(200), mixed
        for load in loads:
            want = cost.under(true).time(load).total_s
            assert cost.under(found).time(load).total_s == pytest.approx(want, rel=0.05)
    assert found.exposed == pytest.approx(exposed, abs=0.15)
    for name in ("eta", "layer_s", "mfu", "attention", "row_s"):
        assert getattr(found, name) == pytest.approx(getattr(true, name), rel=0.15), name
    assert (found.device, found.precision, found.source) == ("a.cpu", "int8", "a test")
    assert found.error < 0.02


def test_noise_is_said() -> None:
    device = _device("a")
    runs = _runs(device, _true(device), noise=0.2)
    assert 0.03 < device_constants(device, INT8, runs, source="").error < 0.2


def test_too_few_steps_are_refused() -> None:
    device = _device("a")
    steps = list(_taken(SPEC, device, _true(device)))[:3]
    with pytest.raises(ConfigError, match="seven at least"):
        device_constants(device, INT8, [(SPEC, steps)], source="")


def _pipeline() -> tuple[ReplicaPlan, Cluster]:
    """A fast device alone, then two of different speeds together."""
    devices = _device("a"), _device("b"), _device("c", 2.0)
    network = Link(latency_s=1e-4, bytes_per_s=1e9)
    constants = tuple(_true(each, s) for each, s in zip(devices, (1.0, 1.0, 2.0), strict=True))
    cluster = Cluster(
        hosts=tuple(Host(name=each.host) for each in devices),
        devices=devices,
        network=network,
        constants=constants,
    )
    ranks = [RankPlan(device="cpu", host=host) for host in "abc"]
    stages = tuple(
        StagePlan(
            instances=(
                InstancePlan(
                    layers=layers, ranks=tuple(own), split=split_by_weights(SPEC, weights)
                ),
            )
        )
        for layers, own, weights in (
            (Range(0, 10), ranks[:1], [1.0]),
            (Range(10, 16), ranks[1:], [2.0, 1.0]),
        )
    )
    return ReplicaPlan(stages=stages, routes=default_routes(stages)), cluster


def test_a_running_replica_corrects_what_a_probe_said() -> None:
    plan, cluster = _pipeline()
    # As it runs, everything takes longer than alone.
    slower = replace(
        cluster,
        constants=tuple(
            replace(each, eta=each.eta * 0.8, step_s=each.step_s * 2, mfu=each.mfu * 0.7)
            for each in cluster.constants
        ),
    )
    live, probed = (ReplicaCost(SPEC, plan, each, INT8) for each in (slower, cluster))
    loads = [StepLoad.of(rows) for rows in KINDS]
    steps = [
        InstanceStep(number, StepTaken(hop.layers, rows, stage.time(load).total_s))
        for rows, load in zip(KINDS, loads, strict=True)
        for number, (hop, stage) in enumerate(zip(plan.routes[0], live.hops(), strict=True))
    ]
    found = running_constants(SPEC, plan, cluster, INT8, steps, source="")
    assert {each.device for each in found} == {"a.cpu", "b.cpu", "c.cpu"}
    fitted = ReplicaCost(SPEC, plan, replace(cluster, constants=found), INT8)
    errors = [abs(fitted.latency_s(each) / live.latency_s(each) - 1) for each in loads]
    before = [abs(probed.latency_s(each) / live.latency_s(each) - 1) for each in loads]
    assert max(errors) < 0.06 < min(before)
    by_device = {each.device: each for each in found}
    # The slow rank's own seconds stay twice the fast one's.
    assert by_device["c.cpu"].step_s == pytest.approx(2 * by_device["b.cpu"].step_s)


def test_an_instance_that_served_nothing_keeps_its_constants() -> None:
    plan, cluster = _pipeline()
    rows = KINDS[0]
    steps = [InstanceStep(0, StepTaken(Range(0, 10), rows, 0.01))] * 50
    assert running_constants(SPEC, plan, cluster, INT8, steps, source="") == ()


def test_a_device_has_its_own_constants_before_its_kinds() -> None:
    one, other = _device("a"), _device("b")
    of_kind = replace(_true(one), device="", eta=0.9)
    cluster = Cluster(
        hosts=(Host(name="a"), Host(name="b")),
        devices=(one, other),
        network=Link(latency_s=1e-4, bytes_per_s=1e9),
        constants=(of_kind, _true(one)),
    )
    assert constants_for(cluster, one, "shoal", "int8").eta == 0.6
    assert constants_for(cluster, other, "shoal", "int8").eta == 0.9


def _step(number: int) -> Step:
    row = StepRow(sequence_id=0, start=7, token_ids=(1, 2), block_ids=((0,),), samples=True)
    return Step(step_id=number, rows=(row,))


def test_a_steps_seconds_begin_when_the_one_before_has_ended() -> None:
    clock = StepClock()
    layers = Range(0, 16)
    clock.note(_step(0), layers, 10.0, 10.5)
    clock.note(_step(1), layers, 10.1, 10.8)  # it waited for the first
    clock.note(_step(2), layers, 12.0, 12.1)  # nothing was there between
    taken = clock.take()
    assert [each.seconds for each in taken] == pytest.approx([0.5, 0.3, 0.1])
    assert taken[0].rows == ((7, 2, True),)
    assert clock.take() == ()


def test_only_the_latest_steps_are_kept() -> None:
    clock = StepClock()
    for number in range(1000):
        clock.note(_step(number), Range(0, 16), float(number), number + 0.5)
    assert 0 < len(clock.take()) <= 64
