"""Which form hidden states take on a link: by what it gives, and what the stage computes."""

from __future__ import annotations

import msgspec
import pytest

from shoal.core.link_forms import form_of
from shoal.core.model_spec import LayerSpec, ModelSpec, RopeSpec
from shoal.core.options import ActivationFormat, DType, EngineOptions
from shoal.core.plan import InstancePlan, RankPlan, ReplicaPlan, StagePlan, default_routes
from shoal.core.split import Range, split_by_weights
from shoal.executor.link_forms import LinkForms
from shoal.policy.compression import Message, Pace, Way, choose, choose_sums
from shoal.wire.worker_messages import LinkFacts, PaceFacts, Warm

MESSAGE = Message(width=576, itemsize=4)
HALF = Message(width=576, itemsize=2)
PACE = Pace(step_s=0.012, step_tokens=16, coding_s=5e-9)
SPEC = ModelSpec(
    architecture="test",
    num_layers=8,
    hidden_size=576,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    ffn_size=1536,
    vocab_size=49152,
    norm_eps=1e-5,
    layers=(LayerSpec(rope=RopeSpec()),) * 8,
    max_positions=8192,
    attention_scale=0.125,
    tied_embeddings=True,
)
ORDER = ["exact", "bfloat16", "int8"]


def way(mbit: float, latency_s: float = 1e-4) -> Way:
    return Way(latency_s=latency_s, bandwidth_bytes_per_s=mbit * 1e6 / 8)


LOOPBACK = way(2400, 8e-5)


@pytest.mark.parametrize(
    ("link", "num_tokens", "form"),
    [
        (way(20), 1, "exact"),  # 0.7 ms of a step of 13: not felt
        (way(20), 128, "int8"),
        (way(20), 4096, "int8"),
        (way(100), 128, "bfloat16"),
        (way(1000), 4096, "exact"),
        (LOOPBACK, 1, "exact"),
        (LOOPBACK, 16384, "exact"),
        (way(1, latency_s=1.0), 1, "exact"),  # it is the distance that takes long
    ],
)
def test_what_auto_takes(link: Way, num_tokens: int, form: str) -> None:
    assert form_of(choose("auto", MESSAGE, link, PACE), num_tokens) == form


def test_a_slower_link_never_takes_a_more_exact_form() -> None:
    for num_tokens in (1, 8, 64, 512):
        forms = [
            ORDER.index(form_of(choose("auto", MESSAGE, way(mbit), PACE), num_tokens))
            for mbit in (1, 3, 10, 30, 100, 300, 1000, 3000)
        ]
        assert forms == sorted(forms, reverse=True)


def test_a_larger_message_never_takes_a_more_exact_form() -> None:
    for mbit in (5, 20, 50, 200):
        forms = [ORDER.index(form) for _, form in choose("auto", MESSAGE, way(mbit), PACE)]
        assert forms == sorted(forms)


def test_a_device_too_slow_at_coding_sends_exactly() -> None:
    slow = Pace(step_s=0.012, step_tokens=16, coding_s=2e-6)
    assert choose("auto", MESSAGE, way(20), slow) == ()


@pytest.mark.parametrize(
    ("wanted", "message", "steps"),
    [
        ("exact", MESSAGE, ()),
        ("bfloat16", MESSAGE, ((1, "bfloat16"),)),
        ("int8", MESSAGE, ((1, "int8"),)),
        ("bfloat16", HALF, ()),  # as many bytes: nothing to gain
        ("int8", HALF, ((1, "int8"),)),
    ],
)
def test_what_the_user_says_holds_on_any_link(
    wanted: ActivationFormat, message: Message, steps: object
) -> None:
    assert choose(wanted, message, LOOPBACK, PACE) == steps
    assert choose(wanted, message, way(20), PACE) == steps


def sums(wanted: ActivationFormat, link: Way) -> object:
    return choose_sums(wanted, MESSAGE, link, PACE, num_ranks=2, num_sums=60)


def test_sums_of_an_instance() -> None:
    assert sums("auto", way(20)) == ((1, "int8"),)
    assert sums("auto", LOOPBACK) == ()
    assert sums("exact", way(20)) == ()
    assert sums("int8", LOOPBACK) == ((1, "int8"),)
    assert sums("bfloat16", way(20)) == ()  # there is no such sum


def test_the_form_of_a_message() -> None:
    steps = ((4, "bfloat16"), (32, "int8"))
    found = [form_of(steps, num_tokens) for num_tokens in (1, 3, 4, 31, 32, 9999)]
    assert found == ["exact", "exact", "bfloat16", "bfloat16", "int8", "int8"]


# --- what an executor makes of it ---


def pipeline_forms(
    link: Way, dtype: DType = "auto", wanted: ActivationFormat = "auto"
) -> LinkForms:
    """Two stages, the second of two ranks that reduce over a network."""
    split = [split_by_weights(SPEC, [1.0] * num_ranks) for num_ranks in (1, 2)]
    first = InstancePlan(layers=Range(0, 4), ranks=(RankPlan(),), split=split[0])
    second = InstancePlan(layers=Range(4, 8), ranks=(RankPlan(), RankPlan()), split=split[1])
    stages = (StagePlan(instances=(first,)), StagePlan(instances=(second,)))
    replica = ReplicaPlan(stages=stages, routes=default_routes(stages))
    options = EngineOptions(model_path="m", dtype=dtype, activation_format=wanted)
    facts = PaceFacts(step_s=0.012, step_tokens=16, coding_s=5e-9, itemsize=4)
    seconds = tuple(link.latency_s + size / link.bandwidth_bytes_per_s for size in (64, 131072))
    summing = msgspec.structs.replace(facts, gather_s=seconds, gather_bytes=(64, 131072))
    links = [
        LinkFacts(peer, "eth0", link.latency_s, link.bandwidth_bytes_per_s)
        for peer in ("s1.i1.r0", "s1.i1.r1")
    ]
    warm = {(0, 0): Warm(links, facts), (1, 0): Warm([], summing), (1, 1): Warm([], summing)}
    return LinkForms(replica, options, SPEC, warm)


def test_every_link_and_sum_gets_its_form() -> None:
    forms = pipeline_forms(way(20))
    told = forms.of("s0.i0.r0")
    assert set(told.links) == {"s1.i1.r0", "s1.i1.r1"}
    assert form_of(told.links["s1.i1.r1"], 512) == "int8"
    assert forms.of("s1.i1.r0") == forms.of("s1.i1.r1")
    assert form_of(forms.of("s1.i1.r0").sums, 512) == "int8"
    assert any("s0.i0.r0 to s1.i1.r1: " in line and "rather than" in line for line in forms.lines)
    assert any("sums of instance 1: int8" in line for line in forms.lines)


@pytest.mark.parametrize(
    "forms",
    [
        pipeline_forms(way(8000, 8e-5)),
        pipeline_forms(way(20), dtype="float32"),
        pipeline_forms(way(20), wanted="exact"),
    ],
    ids=["a fast link", "float32", "as told"],
)
def test_what_stays_exact(forms: LinkForms) -> None:
    for name in ("s0.i0.r0", "s1.i1.r0", "s1.i1.r1"):
        told = forms.of(name)
        assert not any(told.links.values())
        assert told.sums == ()
    assert all(": exact; " in line for line in forms.lines)


def test_who_asks_for_int8_gets_it_in_float32_too() -> None:
    told = pipeline_forms(way(8000), dtype="float32", wanted="int8").of("s0.i0.r0")
    assert told.links["s1.i1.r0"] == ((1, "int8"),)
