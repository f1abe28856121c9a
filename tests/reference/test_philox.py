"""The noise: Random123's known answers, ranges computed alone, and a Gumbel distribution."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from shoal.model.philox import gumbel, key_words, noise_at, noise_range, philox_4x32_10

ONES = 0xFFFFFFFF
# Random123 1.14.0, tests/kat_vectors, the rows «philox4x32 10»: counter, key, result.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def keys(*seeds: int) -> torch.Tensor:
    return torch.tensor([key_words(seed) for seed in seeds])


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_known_answers(
    counter: tuple[int, ...], key: tuple[int, ...], answer: tuple[int, ...]
) -> None:
    words = philox_4x32_10([torch.tensor([w]) for w in counter], [torch.tensor([w]) for w in key])
    assert tuple(int(word) for word in words) == answer


def test_known_answers_together_broadcast() -> None:
    counters = [torch.tensor([kat[0][i] for kat in KNOWN_ANSWERS]) for i in range(4)]
    key = [torch.tensor([kat[1][i] for kat in KNOWN_ANSWERS]) for i in range(2)]
    words = torch.stack(philox_4x32_10(counters, key), dim=1)
    assert words.tolist() == [list(kat[2]) for kat in KNOWN_ANSWERS]


def test_inputs_are_left_alone() -> None:
    counter = [torch.full((3,), 7) for _ in range(4)]
    philox_4x32_10(counter, [torch.tensor([1]), torch.tensor([2])])
    assert all((word == 7).all() for word in counter)


@pytest.mark.parametrize("vocab_size", [1, 3, 4, 50, 49_153, 70_001])
def test_any_range_alone_is_a_slice_of_the_whole(vocab_size: int) -> None:
    key, positions = keys(1, 2**64 - 1), torch.tensor([0, 2**33 + 5])
    whole = noise_range(key, positions, 0, vocab_size)
    assert whole.shape == (2, vocab_size)
    cuts = sorted({0, 1, vocab_size // 3, vocab_size // 2 + 1, vocab_size - 1, vocab_size})
    for low, high in itertools.pairwise(cuts):
        part = noise_range(key, positions, low, high)
        assert torch.equal(part, whole[:, low:high])


def test_any_row_alone_is_a_row_of_the_batch() -> None:
    seeds, positions = range(100, 140), torch.arange(40)
    whole = noise_range(keys(*seeds), positions, 0, 1234)
    for row in (0, 17, 39):
        alone = noise_range(keys(seeds[row]), positions[row : row + 1], 0, 1234)
        assert torch.equal(alone[0], whole[row])


def test_single_ids_get_what_the_range_gives() -> None:
    whole = noise_range(keys(9), torch.tensor([3]), 0, 5000)[0]
    ids = torch.randperm(5000, generator=torch.Generator().manual_seed(0))[:777]
    alone = noise_at(keys(9).expand(777, 2), torch.full((777,), 3), ids)
    assert torch.equal(alone, whole[ids])


def test_every_part_of_the_name_matters() -> None:
    def noise(seed: int, position: int) -> torch.Tensor:
        return noise_range(keys(seed), torch.tensor([position]), 0, 64)[0]

    base = noise(5, 7)
    for other in (noise(6, 7), noise(5 + 2**32, 7), noise(5, 8), noise(5, 7 + 2**32)):
        assert not torch.isclose(base, other).any()
    assert len(base.unique()) == 64


def test_extreme_words_are_finite() -> None:
    values = gumbel(torch.tensor([0, 1, 2**31, ONES - 1, ONES]))
    assert values.isfinite().all()
    assert values[0] == pytest.approx(33 * math.log(2), rel=1e-5)
    assert (values.diff() <= 0).all()


def test_the_noise_is_gumbel() -> None:
    sample = noise_range(keys(11), torch.tensor([0]), 0, 200_000)[0].double().sort().values
    expected = torch.exp(-torch.exp(-sample))
    steps = torch.arange(1, len(sample) + 1) / len(sample)
    # Kolmogorov-Smirnov: 1.95 / sqrt(n) is passed by chance once in a thousand.
    assert (steps - expected).abs().max() < 1.95 / math.sqrt(len(sample))
