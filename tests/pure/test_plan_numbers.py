"""A plan that names how an instance's numbers are kept costs what whoever wrote it counted."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shoal.core.cluster import Device, Precision
from shoal.core.plan import InstancePlan, RankPlan
from shoal.core.split import Range, Split
from shoal.planner.formats import numbers_for
from shoal.policy.cost_model.times import numbers_of

GIB = 1 << 30


def device(kind: str) -> Device:
    return Device(
        name=kind,
        host="",
        device=kind,
        kind=kind,
        memory_bytes=16 * GIB,
        bandwidth_bytes_per_s=1e10,
        flops=(("bfloat16", 1e11), ("int8", 4e11)),
        precisions=("float32", "bfloat16", "int8", "int4", "fp8"),
    )


@pytest.mark.parametrize("kind", ["cpu", "cuda:0"])
@pytest.mark.parametrize("kept", ["bfloat16", "int8", "int4", "fp8"])
@pytest.mark.parametrize("engine", ["bfloat16", "int8"])
@pytest.mark.parametrize("kv", ["bfloat16", "int8"])
def test_numbers_of_a_plan(kind: str, kept: Precision, engine: Precision, kv: Precision) -> None:
    devices = [device(kind)]
    planned = numbers_for(devices, kept, kv)
    default = numbers_for(devices, engine, kv)
    assert planned is not None and default is not None
    quantize = kept if kept in ("int8", "int4", "fp8") else "none"
    named = replace(instance(), dtype=planned.activations, quantize=quantize)
    assert numbers_of(named, default) == planned
    if quantize != "none":
        assert numbers_of(replace(named, dtype=None), default) == planned


def instance() -> InstancePlan:
    return InstancePlan(
        layers=Range(0, 1), ranks=(RankPlan(device="cpu"),), split=Split(heads=(), ffn=(), vocab=())
    )
