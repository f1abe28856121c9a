"""Ranges of ranks: every part owned once, whatever the weights; KV heads follow their queries."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.core.errors import ConfigError
from shoal.core.model_spec import LayerSpec, ModelSpec, RopeSpec
from shoal.core.split import Range, cut, shards, split_by_weights, whole

weights_lists = st.lists(st.floats(0, 100), min_size=1, max_size=8).filter(lambda w: sum(w) > 0.01)


def spec_of(
    num_heads: int, num_kv_heads: int, ffn_size: int = 1536, vocab_size: int = 1000
) -> ModelSpec:
    return ModelSpec(
        architecture="Test",
        num_layers=2,
        hidden_size=64,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=16,
        ffn_size=ffn_size,
        vocab_size=vocab_size,
        norm_eps=1e-5,
        layers=(LayerSpec(rope=RopeSpec()),) * 2,
        max_positions=128,
        attention_scale=0.25,
        tied_embeddings=False,
    )


@given(st.integers(0, 5000), weights_lists, st.sampled_from([1, 16, 32, 256]))
def test_a_cut_covers_everything_once_in_whole_granules(
    total: int, weights: list[float], granule: int
) -> None:
    ranges = cut(total, weights, granule)
    assert len(ranges) == len(weights)
    assert ranges[0].start == 0
    assert ranges[-1].stop == total
    for before, after in itertools.pairwise(ranges):
        assert before.stop == after.start
        assert before.stop % granule == 0 or before.stop == total


@given(st.integers(1, 5000), weights_lists)
def test_no_rank_is_a_whole_unit_off_its_share(total: int, weights: list[float]) -> None:
    for weight, own in zip(weights, cut(total, weights), strict=True):
        share = Fraction(total) * Fraction(weight) / Fraction(sum(weights))
        assert abs(len(own) - share) < Fraction(1001, 1000)
        assert weight or not len(own)


@pytest.mark.parametrize("weights", [[], [0.0, 0.0], [-1.0, 2.0], [float("nan")], [float("inf")]])
def test_weights_that_share_nothing_out_are_refused(weights: list[float]) -> None:
    with pytest.raises(ConfigError, match="give each rank a number"):
        cut(9, weights)


@given(
    st.sampled_from([(9, 3), (14, 2), (32, 8), (8, 8), (4, 1)]),
    st.integers(1, 1000),
    weights_lists,
)
def test_kv_heads_are_those_that_the_queries_read(
    heads: tuple[int, int], ffn_size: int, weights: list[float]
) -> None:
    spec = spec_of(*heads, ffn_size=ffn_size)
    split = split_by_weights(spec, weights)
    group = heads[0] // heads[1]
    owned: list[int] = []
    all_shards = shards(split, Range(0, 2), has_embedding=True, has_head=True)
    for shard in all_shards:
        kv_heads = shard.kv_heads(spec)
        mine = range(shard.heads.start, shard.heads.stop)
        owned += mine
        assert {head // group for head in mine} == set(range(kv_heads.start, kv_heads.stop))
        for local, head in enumerate(mine):
            assert kv_heads.start + (local + shard.head_offset(spec)) // group == head // group
    assert owned == list(range(heads[0]))
    assert [shard.is_first for shard in all_shards] == [True] + [False] * (len(weights) - 1)
    assert sum(len(shard.ffn) for shard in all_shards) == ffn_size
    assert sum(len(shard.vocab) for shard in all_shards) == 1000


def test_columns_make_up_for_what_rounding_heads_takes() -> None:
    spec = spec_of(2, 1, ffn_size=960)
    even, uneven = split_by_weights(spec, [1, 1]), split_by_weights(spec, [0.6, 0.4])
    assert [len(own) for own in even.ffn] == [480, 480]
    # One head each either way: the faster rank takes all of its surplus in columns.
    assert [len(own) for own in uneven.heads] == [1, 1]
    surplus = len(uneven.ffn[0]) / 960 - 0.6
    assert 0 < surplus < 0.02


def test_a_model_is_one_shard_of_itself() -> None:
    spec = spec_of(9, 3)
    (only,) = shards(split_by_weights(spec, [1]), Range(0, 2), has_embedding=True, has_head=True)
    assert only == whole(spec)


@given(st.integers(0, 300), st.integers(0, 300), st.sampled_from([1, 16, 32]))
def test_a_snapped_range_is_the_least_around_it(start: int, length: int, granule: int) -> None:
    own = Range(start, start + length)
    around = own.snapped(granule)
    assert around.holds(own)
    if length:
        assert around.start % granule == around.stop % granule == 0
        assert len(around) < length + 2 * granule
    else:
        assert not len(around)


def test_a_range_that_is_none_is_refused() -> None:
    for start, stop in ((-1, 2), (3, 2)):
        with pytest.raises(ConfigError, match="is no range"):
            Range(start, stop)
