"""KV blocks of ranks that split KV by tokens: what they hold together, and who is given which."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest

from shoal.core.errors import ConfigError
from shoal.core.model_spec import LayerSpec, ModelSpec, RopeSpec
from shoal.core.options import EngineOptions
from shoal.core.plan import InstancePlan, RankPlan, ReplicaPlan, StagePlan, default_routes
from shoal.core.split import KVSplit, Range, split_by_weights, stacked
from shoal.engine.blocks import BlockPool
from shoal.executor.capacity import Capacity, settle
from shoal.wire.worker_messages import Loaded

SPEC = ModelSpec(
    architecture="llama",
    num_layers=2,
    hidden_size=8,
    num_heads=4,
    num_kv_heads=2,
    head_dim=2,
    ffn_size=64,
    vocab_size=64,
    norm_eps=1e-5,
    layers=(LayerSpec(rope=RopeSpec()),) * 2,
    max_positions=4096,
    attention_scale=1.0,
    tied_embeddings=True,
)
LOADED = Loaded(
    num_blocks=1,
    weight_bytes=1,
    kv_bytes=1,
    device="CPU",
    device_type="cpu",
    dtype="float32",
    kernels="reference",
    digest="",
)


def settled(kv: KVSplit, blocks: tuple[int, ...], max_model_len: int | None = None) -> Capacity:
    """Of two stages: one shared by as many ranks as there are blocks, one alone."""
    split = replace(split_by_weights(SPEC, [1.0] * len(blocks)), kv=kv)
    shared = InstancePlan(layers=Range(0, 1), ranks=(RankPlan(),) * len(blocks), split=split)
    alone = InstancePlan(
        layers=Range(1, 2), ranks=(RankPlan(),), split=replace(split_by_weights(SPEC, [1.0]), kv=kv)
    )
    stages = (StagePlan(instances=(shared,)), StagePlan(instances=(alone,)))
    facts = {(0, rank): with_blocks(count) for rank, count in enumerate(blocks)}
    return settle(
        ReplicaPlan(stages=stages, routes=default_routes(stages)),
        EngineOptions(model_path="", max_model_len=max_model_len),
        SPEC,
        {**facts, (1, 0): with_blocks(50)},
    )


def with_blocks(num_blocks: int) -> Loaded:
    return msgspec.structs.replace(LOADED, num_blocks=num_blocks)


def test_blocks_of_all_ranks_count() -> None:
    found = settled("tokens", (10, 3, 20), 33 * 16)
    assert found.instance_blocks == (33, 50)
    assert found.rank_blocks == ((10, 3, 20), ())
    assert stacked(found.rank_blocks[0]) == (Range(0, 10), Range(10, 13), Range(13, 33))


def test_by_heads_the_fewest_count() -> None:
    assert settled("heads", (10, 3, 20)).instance_blocks == (3, 50)
    assert settled("heads", (10, 3, 20)).rank_blocks == ((), ())
    with pytest.raises(ConfigError, match="instance 0 of stage 0 holds 48 tokens"):
        settled("heads", (10, 3, 20), 33 * 16)


@pytest.mark.parametrize("parts", [(10, 3, 20), (1, 1), (5,), (7, 30)])
def test_every_sequence_has_blocks_of_all_parts_in_proportion(parts: tuple[int, ...]) -> None:
    pool, total = BlockPool(sum(parts), parts), sum(parts)
    ranges, taken = stacked(parts), list[int]()
    for count in range(1, total + 1):
        taken += pool.allocate(1)
        for own in ranges:
            wanted = count * len(own) / total
            assert abs(sum(block in own for block in taken) - wanted) <= 1
    assert sorted(taken) == list(range(total))
