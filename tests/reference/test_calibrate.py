"""Steps of random weights, timed on this device, as served ones run."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shoal.core.model_spec import ExpertsSpec, LayerSpec, ModelSpec, RopeSpec
from shoal.core.options import EngineOptions
from shoal.core.split import Range
from shoal.worker.calibrate import affordable, calibrate, shallow, step_kinds

TINY = ModelSpec(
    architecture="llama",
    num_layers=4,
    hidden_size=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    ffn_size=128,
    vocab_size=512,
    norm_eps=1e-5,
    layers=(LayerSpec(rope=RopeSpec()),) * 4,
    max_positions=2048,
    attention_scale=0.25,
    tied_embeddings=True,
)
MIXED = replace(
    TINY,
    layers=(LayerSpec(rope=RopeSpec(), has_experts=True),) * 4,
    experts=ExpertsSpec(num_experts=4, num_active=2, ffn_size=64),
)


@pytest.mark.parametrize(
    ("spec", "options"),
    [
        (TINY, EngineOptions(model_path="", device="cpu", quantize="int8", num_threads=1)),
        (TINY, EngineOptions(model_path="", device="cpu", dtype="float32", kernels="reference")),
        (MIXED, EngineOptions(model_path="", device="cpu", dtype="bfloat16", num_threads=1)),
    ],
    ids=["int8", "plain torch", "experts"],
)
def test_steps_of_all_kinds_at_two_depths_are_timed(
    spec: ModelSpec, options: EngineOptions
) -> None:
    found = calibrate(spec, options, budget_s=0.1)
    assert {each.layers for each in found.taken} == {Range(0, 4), Range(2, 4)}
    batches = {len(each.rows) for each in found.taken}
    chunks = {each.rows[0][1] for each in found.taken}
    contexts = {each.rows[0][0] for each in found.taken}
    assert batches >= {1, 4, 16}
    assert chunks >= {1, 8, 64}
    assert any(len({row[1] for row in each.rows}) > 1 for each in found.taken)  # a prompt beside
    assert contexts >= {0, 31, 1023}
    assert all(each.seconds > 0 for each in found.taken)


def test_a_labs_device_pays_after_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    class Told:
        def __init__(self, speed: float) -> None:
            told.append(f"speed {speed}")

        def begin(self) -> None:
            told.append("begin")

        def pay(self) -> None:
            told.append("pay")

    monkeypatch.setattr("shoal.worker.calibrate.Speed", Told)
    options = EngineOptions(model_path="", device="cpu", dtype="float32", num_threads=1)
    found = calibrate(TINY, options, speed=0.25, budget_s=0.05)
    assert told[0] == "speed 0.25"
    assert told[1::2] == ["begin"] * (len(told) // 2)
    assert told[2::2] == ["pay"] * (len(told) // 2)
    assert len(told) // 2 > 3 * len(found.taken)


@pytest.mark.parametrize(
    ("token_s", "longest"), [(1e-5, 512), (6e-4, 256), (1.2e-3, 128), (1e-2, 64), (10.0, 64)]
)
def test_a_slow_device_runs_short_steps_only(token_s: float, longest: int) -> None:
    kinds = list(step_kinds(TINY))
    able = affordable(kinds, token_s, 2.5)
    sizes = [sum(row.num_tokens for row in rows) for rows in able]
    assert max(sizes) == longest
    assert len([size for size in sizes if size <= 64]) == len(
        [rows for rows in kinds if sum(row.num_tokens for row in rows) <= 64]
    )


def test_large_models_are_measured_by_a_few_layers_and_words() -> None:
    large = replace(
        TINY,
        num_layers=80,
        layers=TINY.layers * 20,
        hidden_size=8192,
        num_heads=64,
        num_kv_heads=8,
        head_dim=128,
        ffn_size=28672,
        vocab_size=128256,
    )
    small = shallow(large)
    assert small.num_layers == len(small.layers) == 2
    assert small.vocab_size < 20_000
    assert shallow(TINY) == TINY
