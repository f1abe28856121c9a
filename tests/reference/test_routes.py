"""A whole engine over random plans, its workers in threads: the tokens of one device.

Random dense models, uneven splits over 1 to 4 ranks, 1 to 3 stages that overlap and stand in for
each other; embeddings or heads on stages without layers. Steps fail now and then.
"""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
from checkpoints import tiny_checkpoint
from ranks import random_cut
from thread_engine import engine, tokens_of

from shoal.core.model_spec import ModelSpec
from shoal.core.plan import InstancePlan, RankPlan, ReplicaPlan, StagePlan, default_routes
from shoal.core.split import Range, Split
from shoal.executor.threads import ThreadExecutor
from shoal.model.spec import read_spec

LAYERS = 5
MODELS: dict[str, tuple[str, int, int, dict[str, Any]]] = {
    "9-3": ("LlamaForCausalLM", 9, 3, {"tie_word_embeddings": True}),
    "14-2": ("Qwen2ForCausalLM", 14, 2, {}),
    "32-8": ("Qwen3ForCausalLM", 32, 8, {"hidden_size": 64}),
    "8-8": ("LlamaForCausalLM", 8, 8, {"attention_bias": True, "mlp_bias": True}),
}


@pytest.fixture(scope="module", params=MODELS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    architecture, heads, kv_heads, more = MODELS[request.param]
    folder = tmp_path_factory.mktemp("model")
    return tiny_checkpoint(folder, architecture, heads, kv_heads, num_hidden_layers=LAYERS, **more)


def random_plan(spec: ModelSpec, rng: random.Random) -> ReplicaPlan:
    num_stages = rng.randint(1, 3)
    cuts = [0, *sorted(rng.randint(0, spec.num_layers) for _ in range(num_stages - 1))]
    stages = []
    for first, last in zip(cuts, [*cuts[1:], spec.num_layers], strict=True):
        overlapping = [
            Range(max(0, first - rng.randint(0, 1)), last) for _ in range(rng.randint(1, 2))
        ]
        stages.append(
            StagePlan(
                instances=tuple(
                    InstancePlan(
                        layers=layers,
                        ranks=(RankPlan(num_threads=1),) * size,
                        split=Split(
                            heads=random_cut(spec.num_heads, size, rng),
                            ffn=random_cut(spec.ffn_size, size, rng),
                            vocab=random_cut(spec.vocab_size, size, rng),
                        ),
                    )
                    for layers in overlapping
                    for size in (rng.randint(1, 4),)
                )
            )
        )
    return ReplicaPlan(stages=tuple(stages), routes=default_routes(tuple(stages)))


@pytest.mark.parametrize("kernels", ["reference", "cpu"])
def test_any_plan_gives_the_tokens_of_one_device(checkpoint: Path, kernels: str) -> None:
    with engine(checkpoint, None, kernels) as (loop, client, _):
        want = tokens_of(loop, client, "alone")
    spec = read_spec(checkpoint)
    for seed in range(3 if kernels == "reference" else 6):  # it is some three times slower
        replica = random_plan(spec, random.Random(seed))
        with engine(checkpoint, replica, kernels) as (loop, client, _):
            assert tokens_of(loop, client, "shared") == want, replica


def test_a_step_that_fails_on_one_rank_costs_no_token(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other ranks of its instance wait for it in a collective, and are let go."""
    replica = random_plan(read_spec(checkpoint), random.Random(3))
    with engine(checkpoint, None, "cpu") as (loop, client, _):
        want = tokens_of(loop, client, "alone")
    with engine(checkpoint, replica, "cpu") as (loop, client, executor):
        assert isinstance(executor, ThreadExecutor)
        assert tokens_of(loop, client, "before") == want
        victim = list(executor._runners.values())[-1]._worker
        launch, calls = victim.launch, itertools.count(1)

        def fails_once(*arguments: Any) -> Any:
            if next(calls) == 3:
                raise RuntimeError("the device said no")
            return launch(*arguments)

        monkeypatch.setattr(victim, "launch", fails_once)
        assert tokens_of(loop, client, "after") == want
        assert next(calls) > 3
