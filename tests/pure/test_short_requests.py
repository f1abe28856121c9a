"""What short requests take beside their Steps: `shoal probe --from` takes off what those took."""

from __future__ import annotations

import pytest

from shoal.cli.probe_from import Served, short_steps_s
from shoal.core.cluster import Cluster, Device, Host, Link
from shoal.core.model_spec import LayerSpec, ModelSpec, RopeSpec
from shoal.core.plan import InstancePlan, RankPlan, ReplicaPlan, StagePlan, default_routes
from shoal.core.split import Range, split_by_weights
from shoal.core.step_times import InstanceStep, ReplicaSteps, StepTaken
from shoal.policy.cost_model.numbers import Numbers

SPEC = ModelSpec(
    architecture="llama",
    num_layers=8,
    hidden_size=256,
    num_heads=4,
    num_kv_heads=4,
    head_dim=64,
    ffn_size=512,
    vocab_size=1000,
    norm_eps=1e-5,
    layers=(LayerSpec(rope=RopeSpec()),) * 8,
    max_positions=4096,
    attention_scale=0.125,
    tied_embeddings=True,
)
SHORT, LONG, DECODE = ((0, 16, True),), ((0, 64, True),), ((16, 1, True),)
HOP_S = 2e-3


def _device(host: str, rate: float) -> Device:
    return Device(
        name=f"{host}.cpu",
        kind="cpu",
        host=host,
        device="cpu",
        memory_bytes=1 << 30,
        bandwidth_bytes_per_s=rate,
        flops=(("bfloat16", rate * 10),),
        precisions=("bfloat16",),
    )


CLUSTER = Cluster(
    hosts=(Host(name="a"), Host(name="b")),
    devices=(_device("a", 1e9), _device("b", 1e7)),
    network=Link(latency_s=HOP_S, bytes_per_s=1e12),
)


def _plan(*hosts: str) -> ReplicaPlan:
    count = 8 // len(hosts)
    stages = tuple(
        StagePlan(
            instances=(
                InstancePlan(
                    layers=Range(number * count, (number + 1) * count),
                    ranks=(RankPlan(device="cpu", host=host),),
                    split=split_by_weights(SPEC, [1.0]),
                ),
            )
        )
        for number, host in enumerate(hosts)
    )
    return ReplicaPlan(stages=stages, routes=default_routes(stages))


def _served(
    plan: ReplicaPlan, *steps: tuple[int, tuple[tuple[int, int, bool], ...], float]
) -> Served:
    told = tuple(
        InstanceStep(instance, StepTaken(plan.instances[instance].layers, rows, seconds))
        for instance, rows, seconds in steps
    )
    return Served(plan, Numbers(), ReplicaSteps(plan, "bfloat16", told))


def test_steps_that_came_between_count_and_their_hops() -> None:
    plan = _plan("a", "b")
    old = [(0, SHORT, 9.0), (1, SHORT, 9.0), (0, LONG, 8.0)]
    new = [(0, SHORT, 0.01), (0, DECODE, 7.0), (1, SHORT, 0.03)] * 3
    found = short_steps_s(SPEC, [_served(plan, *old)], [_served(plan, *old, *new)], CLUSTER)
    assert found == pytest.approx(0.04 + HOP_S, rel=1e-3)


def test_of_unequal_replicas_the_one_that_ran_them_counts() -> None:
    quick, slow = _plan("a"), _plan("b")
    before = [_served(quick), _served(slow)]
    after = [_served(quick, *[(0, SHORT, 0.01)] * 8), _served(slow, (0, SHORT, 1.0))]
    assert short_steps_s(SPEC, before, after, CLUSTER) == pytest.approx(0.01)


def test_what_is_not_told_is_that_of_the_quickest() -> None:
    quick, slow = _served(_plan("a")), _served(_plan("b"))
    both = short_steps_s(SPEC, [slow, quick], [slow, quick], CLUSTER)
    assert both == short_steps_s(SPEC, [quick], [quick], CLUSTER)
    assert both < short_steps_s(SPEC, [slow], [slow], CLUSTER) / 10
