"""Sampling over ranges of the vocabulary gives what one rank gives: tokens, logprobs, states."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from ranks import on_ranks, random_cut
from test_sampling import EOS, mask_of, random_logits, random_params, sequence

from shoal.comm import Group, NativeReduce
from shoal.core.request import TokenLogprobs
from shoal.core.split import Range, cut
from shoal.model.logprobs import prompt_logprobs
from shoal.model.sampling import sample

Rows = list[tuple[int, TokenLogprobs | None]]


def run(
    logits_SNV: torch.Tensor,
    params: list[dict[str, Any]],
    masks: list[bytes | None],
    vocab: Range | None = None,
    group: Group | None = None,
) -> list[Rows]:
    """Some steps of a batch, on one rank or on all of it."""
    size = logits_SNV.shape[2]
    held = Range(0, size) if vocab is None else vocab
    states = [sequence(size, vocab=held, **each) for each in params]
    steps = []
    for step, logits_NV in enumerate(logits_SNV):
        part = logits_NV[:, held.start : held.stop].contiguous()
        positions = [4 + step] * len(params)
        batch = sample(part, states, positions, masks, vocab=held, group=group)
        steps.append(batch.to_rows())
    return steps


def on_split(
    ranges: tuple[Range, ...],
    logits_SNV: torch.Tensor,
    params: list[dict[str, Any]],
    masks: list[bytes | None] | None = None,
) -> list[Rows]:
    """What every rank of a split got: the same."""
    masks = masks or [None] * len(params)
    got = on_ranks(
        len(ranges), lambda rank, group: run(logits_SNV, params, masks, ranges[rank], group)
    )
    assert all(each == got[0] for each in got)
    return got[0]


def assert_alike(got: list[Rows], expected: list[Rows]) -> None:
    for rows, wanted in zip(got, expected, strict=True):
        assert [token for token, _ in rows] == [token for token, _ in wanted]
        for (_, ours), (_, theirs) in zip(rows, wanted, strict=True):
            assert (ours is None) == (theirs is None)
            if ours is not None and theirs is not None:
                assert_same_logprobs(ours, theirs)


def assert_same_logprobs(ours: TokenLogprobs, theirs: TokenLogprobs) -> None:
    assert (ours.token_id, ours.rank) == (theirs.token_id, theirs.rank)
    assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-5)
    values = [value for _, value in theirs.top]
    if len(set(values)) == len(values):  # which of equals come last is open
        assert [token for token, _ in ours.top] == [token for token, _ in theirs.top]
    assert [value for _, value in ours.top] == pytest.approx(values, abs=1e-5)


@pytest.mark.parametrize("vocab_size", [61, 1501])
@pytest.mark.parametrize("seed", range(3))
def test_random_parameters_on_random_splits(vocab_size: int, seed: int) -> None:
    rng = random.Random(100 * vocab_size + seed)
    params = [random_params(rng) for _ in range(40)]
    mask = mask_of({EOS, 9, *rng.sample(range(vocab_size), 20)}, vocab_size)
    only_eos = mask_of({EOS}, vocab_size)
    masks = [(mask, only_eos, None, None, None)[i % 5] for i in range(40)]
    logits = random_logits(3 * 40, vocab_size, seed).view(3, 40, vocab_size)
    expected = run(logits, params, masks)
    for size in (2, 3, 4):
        ranges = random_cut(vocab_size, size, rng)
        assert_alike(on_split(ranges, logits, params, masks), expected)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 8.0])
def test_cuts_of_flat_and_of_peaked_rows(scale: float) -> None:
    limits: list[dict[str, Any]] = [
        {"top_p": 0.5},
        {"top_p": 0.999999},
        {"top_k": 40},
        {"top_k": 700, "top_p": 0.9},
        {"min_p": 0.05},
        {"min_p": 0.9, "top_p": 0.6},
        {"top_k": 5, "min_p": 0.01, "top_p": 0.99},
        {},
    ]
    params = [{**limits[i % 8], "seed": i} for i in range(64)]
    logits = random_logits(64, 5003, 5)[None] * scale
    expected = run(logits, params, [None] * 64)
    for ranges in (cut(5003, (1, 1)), cut(5003, (0.7, 0.0, 0.3)), cut(5003, (1, 20, 1, 5))):
        assert_alike(on_split(ranges, logits, params), expected)


def test_equals_on_several_ranks() -> None:
    """The lowest id wins, and those that tie with a cut stay, wherever they are."""
    logits_V = torch.zeros(400)
    logits_V[[90, 110, 210, 399]] = 5.0
    params: list[dict[str, Any]] = [{"temperature": 0}, {"temperature": 0, "presence_penalty": 1.0}]
    for limit in ({"top_k": 2}, {"top_p": 0.3}, {"min_p": 1.0}):
        params += [{"seed": seed, **limit} for seed in range(30)]
    logits = logits_V.expand(1, len(params), 400)
    got = on_split(cut(400, (1, 1, 1)), logits, params)
    assert_alike(got, run(logits, params, [None] * len(params)))
    tokens = [token for token, _ in got[0]]
    assert tokens[:2] == [90, 90]
    assert set(tokens[2:]) == {90, 110, 210, 399}


@pytest.mark.parametrize(
    "params", [{"temperature": 0}, {}, {"top_p": 0.9}, {"top_k": 4, "min_p": 0.1}, {"logprobs": 3}]
)
def test_extreme_logits(params: dict[str, Any]) -> None:
    inf = math.inf
    rows = [torch.full((40,), value) for value in (-inf, inf, math.nan, 3e38)]
    rows += [torch.tensor([-inf] * 39 + [0.0]), torch.tensor([0.0] * 30 + [inf] + [0.0] * 9)]
    logits, many = torch.stack(rows)[None], [params] * len(rows)
    expected = run(logits, many, [None] * len(rows))
    for ranges in (cut(40, (1, 1)), (Range(0, 0), Range(0, 33), Range(33, 33), Range(33, 40))):
        assert_alike(on_split(ranges, logits, many), expected)


def test_a_mask_that_allows_nothing_gives_what_one_rank_gives() -> None:
    logits = random_logits(2, 100)[None]
    params: list[dict[str, Any]] = [{"temperature": 0}, {"top_p": 0.5}]
    expected = run(logits, params, [b"", b""])
    assert_alike(on_split(cut(100, (1, 1)), logits, params, [b"", b""]), expected)


@pytest.mark.parametrize("ranges", [cut(90, (1, 1)), (Range(0, 0), Range(0, 81), Range(81, 90))])
def test_prompt_logprobs(ranges: tuple[Range, ...]) -> None:
    logits_NV, targets = random_logits(150, 90), [i % 90 for i in range(150)]

    def on_rank(rank: int, group: Group) -> list[TokenLogprobs]:
        held = ranges[rank]
        part = logits_NV[:, held.start : held.stop]
        return prompt_logprobs(part, targets, 12, vocab=held, group=group)

    for got in on_ranks(len(ranges), on_rank):
        for ours, theirs in zip(got, prompt_logprobs(logits_NV, targets, 12), strict=True):
            assert_same_logprobs(ours, theirs)


class Counting:
    """A group that adds up what its rank hands over."""

    native: NativeReduce | None = None

    def __init__(self, group: Group) -> None:
        self._group = group
        self.rank, self.size = group.rank, group.size
        self.sizes: list[int] = []

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        self.sizes.append(tensor.nbytes)
        return self._group.all_gather(tensor)

    def all_reduce(self, tensor: torch.Tensor) -> None:
        self._group.all_reduce(tensor)

    def abort(self) -> None:
        self._group.abort()

    def reset(self, incarnation: int) -> None:
        self._group.reset(incarnation)

    def close(self) -> None:
        self._group.close()


@pytest.mark.parametrize(
    ("params", "most"),
    [
        ({"temperature": 0}, [16]),
        ({}, [16]),
        ({"top_k": 40}, [8 * 50, 16]),
        ({"top_p": 0.9}, [8 * 258, 16]),
        ({"min_p": 0.1}, [8 * 3, 16]),
    ],
)
def test_what_is_sent_is_small(params: dict[str, Any], most: list[int]) -> None:
    """One candidate a row; the best few where there is a cut; never the logits of a model's row."""
    vocab_size = 49_152
    logits, ranges = random_logits(1, vocab_size)[None] * 2, cut(vocab_size, (1, 1))

    def on_rank(rank: int, group: Group) -> list[int]:
        counting = Counting(group)
        run(logits, [params], [None], ranges[rank], counting)
        return counting.sizes

    assert on_ranks(2, on_rank) == [most, most]
