"""Sampling against a plain numpy definition, against itself in other batches, and in law."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import torch

from shoal.core.logits import SAMPLED_AT_ONCE
from shoal.core.request import SamplingParams, TokenLogprobs
from shoal.core.split import Range
from shoal.core.step import SequenceStart
from shoal.model import draw as draw_module
from shoal.model.logprobs import prompt_logprobs
from shoal.model.philox import key_words, noise_range
from shoal.model.sampling import SequenceSampler, sample

CPU = torch.device("cpu")
EOS = 2
_MANY = 2 * SAMPLED_AT_ONCE + 22


def sequence(
    vocab_size: int,
    *,
    prompt: tuple[int, ...] = (1, 5, 5, 7),
    outputs: tuple[int, ...] = (),
    vocab: Range | None = None,
    **params: Any,
) -> SequenceSampler:
    params.setdefault("seed", 1234)
    vocab = Range(0, vocab_size) if vocab is None else vocab
    start = SequenceStart(
        token_ids=prompt + outputs,
        prompt_len=len(prompt),
        sampling=SamplingParams(**params),
        eos_token_ids=(EOS,),
    )
    return SequenceSampler(start, vocab=vocab, device=CPU)


def one(
    logits_V: torch.Tensor, state: SequenceSampler, position: int = 4, mask: bytes | None = None
) -> int:
    return sample(logits_V[None], [state], [position], [mask]).to_rows()[0][0]


def random_logits(rows: int, vocab_size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 3


def mask_of(allowed: set[int], vocab_size: int) -> bytes:
    bits = np.zeros(-(-vocab_size // 32) * 32, dtype=np.uint8)
    bits[list(allowed)] = 1
    return np.packbits(bits, bitorder="little").tobytes()


# ---- the definition, written without a care for speed ----------------------------------------


def naive_scores(
    logits_V: torch.Tensor,
    params: SamplingParams,
    prompt: tuple[int, ...],
    outputs: tuple[int, ...],
    position: int,
    mask: set[int] | None,
) -> np.ndarray:
    """Scores whose argmax is the token; float64 throughout."""
    x = logits_V.double().numpy().copy()
    if mask is not None:
        x[[i for i in range(len(x)) if i not in mask]] = -np.inf
    for token_id, bias in params.logit_bias:
        x[token_id] += bias
    if position - len(prompt) < params.min_tokens:
        banned = set(params.stop_token_ids) | (set() if params.ignore_eos else {EOS})
        kept = x.copy()
        kept[list(banned)] = -np.inf
        if kept.max() > -np.inf:
            x = kept
    for token_id in {*prompt, *outputs}:
        factor = params.repetition_penalty
        x[token_id] = x[token_id] / factor if x[token_id] > 0 else x[token_id] * factor
    for token_id in set(outputs):
        x[token_id] -= params.frequency_penalty * outputs.count(token_id)
        x[token_id] -= params.presence_penalty
    if params.temperature == 0:
        return x
    x = x / params.temperature
    if params.min_p:
        x[np.exp(x - x.max()) < params.min_p] = -np.inf
    if params.top_k and params.top_k < len(x):
        x[x < np.sort(x)[-params.top_k]] = -np.inf
    if params.top_p < 1:
        probabilities = np.exp(x - x.max())
        probabilities /= probabilities.sum()
        order = np.argsort(-x, kind="stable")
        before = np.cumsum(probabilities[order]) - probabilities[order]
        x[order[before >= params.top_p]] = -np.inf
    keys = torch.tensor([key_words(params.seed or 0)])
    noise_V = noise_range(keys, torch.tensor([position]), 0, len(x))[0]
    return x + noise_V.double().numpy()


def random_params(rng: random.Random) -> dict[str, Any]:
    """A random mix in which each feature is off about half of the time."""
    maybe: dict[str, Any] = {
        "temperature": rng.choice([0.0, 0.3, 1.0, 1.7]),
        "top_k": rng.choice([1, 3, 20, 10_000]),
        "top_p": rng.choice([0.05, 0.5, 0.9, 0.999]),
        "min_p": rng.choice([0.01, 0.2, 1.0]),
        "repetition_penalty": rng.choice([0.7, 1.3, 5.0]),
        "frequency_penalty": rng.choice([-1.0, 0.4, 2.0]),
        "presence_penalty": rng.choice([-2.0, 0.9]),
        "logit_bias": ((rng.randrange(100), 4.5), (EOS, 100.0), (100 + rng.randrange(9), -100.0)),
        "min_tokens": rng.choice([1, 50]),
        "stop_token_ids": (9, 11),
        "ignore_eos": True,
        "logprobs": rng.choice([0, 5]),
    }
    chosen = {name: value for name, value in maybe.items() if rng.random() < 0.5}
    return {**chosen, "seed": rng.getrandbits(64)}


@pytest.mark.parametrize("vocab_size", [257, 1501])
@pytest.mark.parametrize("seed", range(4))
def test_mixed_batches_against_the_definition(vocab_size: int, seed: int) -> None:
    rng = random.Random(seed)
    logits_NV = random_logits(_MANY, vocab_size, seed)
    prompts = [tuple(rng.choices(range(60), k=10)) for _ in range(_MANY)]
    outputs = [tuple(rng.choices(range(60), k=rng.randrange(9))) for _ in range(_MANY)]
    params = [random_params(rng) for _ in range(_MANY)]
    masks = [
        {EOS, 9, *rng.sample(range(vocab_size), rng.choice([1, 20]))} if i % 5 == 0 else None
        for i in range(_MANY)
    ]
    states = [
        sequence(vocab_size, prompt=p, outputs=o, **kw)
        for p, o, kw in zip(prompts, outputs, params, strict=True)
    ]
    positions = [len(p) + len(o) for p, o in zip(prompts, outputs, strict=True)]
    before = logits_NV.clone()
    mask_bytes = [None if mask is None else mask_of(mask, vocab_size) for mask in masks]
    got = [token for token, _ in sample(logits_NV, states, positions, mask_bytes).to_rows()]
    assert torch.equal(logits_NV, before), "raw logits were changed"
    for row, token in enumerate(got):
        scores = naive_scores(
            logits_NV[row],
            states[row].sampling,
            prompts[row],
            outputs[row],
            positions[row],
            masks[row],
        )
        # fp32 against float64: only a near tie may go the other way.
        assert scores[token] >= scores.max() - 1e-4, (row, token, params[row])


# ---- independence of the batch ---------------------------------------------------------------


@pytest.mark.parametrize("vocab_size", [1003, 4096])
def test_a_row_alone_and_among_31_others(vocab_size: int) -> None:
    rng = random.Random(7)
    params = [random_params(rng) for _ in range(32)]
    logits_NV = random_logits(32, vocab_size, 3)
    mask = mask_of(set(range(0, vocab_size, 3)), vocab_size)
    masks = [mask if i % 4 == 0 else None for i in range(32)]
    together: list[list[tuple[int, TokenLogprobs | None]]] = [[] for _ in range(32)]
    states = [sequence(vocab_size, **kw) for kw in params]
    for step in range(6):
        rows = sample(logits_NV.roll(step, 1), states, [4 + step] * 32, masks).to_rows()
        for row, result in enumerate(rows):
            together[row].append(result)
    for row in range(32):
        state = sequence(vocab_size, **params[row])
        alone = [
            sample(
                logits_NV[row : row + 1].roll(step, 1), [state], [4 + step], [masks[row]]
            ).to_rows()[0]
            for step in range(6)
        ]
        assert alone == together[row], params[row]


def test_noise_for_survivors_alone_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    logits_NV = random_logits(40, 3001)
    limits = [{"top_k": 50}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_k": 9, "top_p": 0.5}]

    def tokens() -> list[int]:
        states = [sequence(3001, seed=i, **limits[i % 4]) for i in range(40)]
        return [token for token, _ in sample(logits_NV, states, [9] * 40, [None] * 40).to_rows()]

    sparse = tokens()
    monkeypatch.setattr(draw_module, "_SPARSE_SHARE", 10**9)
    assert tokens() == sparse


def test_more_survivors_of_top_p_than_are_sorted_first() -> None:
    """A flat distribution over 5000 tokens: top-p 0.5 keeps half of them, by value."""
    logits_V = torch.linspace(0, 1e-3, 5000)[torch.randperm(5000)]
    kept = set(logits_V.topk(2503).indices.tolist())
    drawn = {one(logits_V, sequence(5000, seed=s, top_p=0.5)) for s in range(200)}
    assert drawn <= kept
    assert len(drawn) > 150


# ---- the distribution ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "survivors"),
    [({}, 12), ({"temperature": 0.6}, 12), ({"top_k": 5}, 5), ({"temperature": 2.0}, 12)],
)
def test_draws_follow_softmax(params: dict[str, Any], survivors: int) -> None:
    logits_V = torch.linspace(-1.5, 1.5, 12)[torch.tensor([3, 7, 0, 11, 5, 1, 9, 2, 10, 4, 8, 6])]
    num_draws = 20_000
    state = sequence(12, seed=42, **params)
    counts = torch.zeros(12)
    for first in range(0, num_draws, 500):
        batch = sample(
            logits_V.expand(500, -1), [state] * 500, range(first, first + 500), [None] * 500
        )
        counts += batch.token_ids_N.bincount(minlength=12)
    scaled = logits_V / params.get("temperature", 1.0)
    scaled[scaled < scaled.topk(survivors).values[-1]] = -math.inf
    expected = scaled.softmax(0) * num_draws
    kept = expected > 0
    assert counts[~kept].sum() == 0
    chi_square = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
    # 99.9 % of chi-square with 11 degrees of freedom.
    assert chi_square < 31.3


# ---- state -----------------------------------------------------------------------------------


def test_state_rebuilt_from_token_ids_continues_alike() -> None:
    params: dict[str, Any] = {
        "repetition_penalty": 1.2,
        "frequency_penalty": 0.7,
        "presence_penalty": 0.3,
        "min_tokens": 12,
        "temperature": 0.9,
        "top_p": 0.95,
    }
    logits_SV = random_logits(24, 301)
    state, outputs = sequence(301, **params), []
    for step in range(24):
        outputs.append(one(logits_SV[step], state, 4 + step))
    for cut in range(24):
        rebuilt, again = sequence(301, outputs=tuple(outputs[:cut]), **params), outputs[:cut]
        for step in range(cut, 24):
            again.append(one(logits_SV[step], rebuilt, 4 + step))
        assert again == outputs


def test_penalties_count_each_token_drawn() -> None:
    logits_V = torch.tensor([0.0, 0.0, 0.0, 3.0, 2.5])
    state = sequence(5, prompt=(1,), temperature=0, frequency_penalty=1.0)
    assert [one(logits_V, state, 1 + i) for i in range(5)] == [3, 4, 3, 4, 3]


def test_min_tokens_ends_and_ignore_eos_lifts_the_ban() -> None:
    logits_V = torch.zeros(300)
    logits_V[EOS], logits_V[9] = 5.0, 4.0
    state = sequence(300, temperature=0, min_tokens=2, stop_token_ids=(9, 70_000, -1))
    assert [one(logits_V, state, position) for position in (4, 5, 6)] == [0, 0, EOS]
    ignoring = sequence(300, temperature=0, min_tokens=2, ignore_eos=True)
    assert one(logits_V, ignoring, 4) == EOS


# ---- masks and edges -------------------------------------------------------------------------


@pytest.mark.parametrize("vocab_size", [7, 8, 33, 130])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_only_what_a_mask_allows(vocab_size: int, temperature: float) -> None:
    logits_NV = random_logits(50, vocab_size)
    allowed = {0, 3, vocab_size - 1}
    mask = mask_of(allowed, vocab_size)
    states = [sequence(vocab_size, seed=i, temperature=temperature) for i in range(50)]
    drawn = {token for token, _ in sample(logits_NV, states, [4] * 50, [mask] * 50).to_rows()}
    assert drawn == allowed


def test_a_mask_shorter_than_the_vocabulary_forbids_the_rest() -> None:
    logits_V = torch.arange(100.0)
    assert one(logits_V, sequence(100, temperature=0), mask=b"\xff\xff\xff\xff") == 31


def test_a_grammar_that_allows_only_eos_beats_min_tokens() -> None:
    state = sequence(64, min_tokens=10)
    assert one(torch.zeros(64), state, mask=mask_of({EOS}, 64)) == EOS


def test_a_mask_holds_where_all_it_allows_is_minus_infinity() -> None:
    logits_V = torch.zeros(64)
    logits_V[5] = -math.inf
    for temperature in (0.0, 1.0):
        assert one(logits_V, sequence(64, temperature=temperature), mask=mask_of({5}, 64)) == 5


def test_greedy_takes_the_lowest_id_of_equals() -> None:
    logits_V = torch.zeros(50)
    logits_V[[11, 30]] = 1.0
    assert one(logits_V, sequence(50, temperature=0)) == 11
    assert one(logits_V, sequence(50, temperature=0, presence_penalty=1.0)) == 11


def test_equals_at_a_cut_are_kept_together() -> None:
    logits_V = torch.zeros(400)
    logits_V[:4] = 5.0
    for limit in ({"top_k": 2}, {"top_p": 0.3}, {"min_p": 1.0}):
        drawn = {one(logits_V, sequence(400, seed=s, **limit)) for s in range(60)}
        assert drawn == {0, 1, 2, 3}


@pytest.mark.parametrize(
    "params", [{}, {"top_p": 0.9}, {"top_k": 4, "min_p": 0.1}, {"logprobs": 3}]
)
def test_extreme_logits_give_a_token_and_finite_logprobs(params: dict[str, Any]) -> None:
    inf = math.inf
    rows = torch.stack(
        [
            torch.full((40,), -inf),
            torch.full((40,), inf),
            torch.full((40,), math.nan),
            torch.tensor([-inf] * 39 + [0.0]),
            torch.tensor([0.0] * 20 + [inf] + [0.0] * 19),
            torch.full((40,), 3e38),
        ]
    )
    states = [sequence(40, **params) for _ in rows]
    result = sample(rows, states, [4] * len(rows), [None] * len(rows)).to_rows()
    tokens = [token for token, _ in result]
    assert all(0 <= token < 40 for token in tokens)
    assert tokens[3:5] == [39, 20]
    for _, logprobs in result:
        assert logprobs is None or math.isfinite(logprobs.logprob)


def test_ids_beyond_the_vocabulary_are_ignored() -> None:
    state = sequence(
        10,
        prompt=(3, 99, -5),
        temperature=0,
        presence_penalty=1.0,
        logit_bias=((50, 9.0), (-1, 9.0), (4, 1.0), (4, 1.5)),
        stop_token_ids=(88,),
        min_tokens=3,
    )
    logits_V = torch.zeros(10)
    logits_V[6] = 2.0
    assert one(logits_V, state, 3) == 4


# ---- logprobs --------------------------------------------------------------------------------


def test_logprobs_are_of_the_raw_logits() -> None:
    logits_NV = random_logits(3, 90)
    states = [
        sequence(90, temperature=0, logit_bias=((17, 100.0),), logprobs=2),
        sequence(90, temperature=0),
        sequence(90, temperature=3.0, top_k=50, logprobs=0),
    ]
    rows = sample(logits_NV, states, [4] * 3, [None] * 3).to_rows()
    expected_NV = logits_NV.double().log_softmax(-1)
    token, first = rows[0]
    assert token == 17
    assert first is not None
    assert first.token_id == 17
    assert first.logprob == pytest.approx(float(expected_NV[0, 17]), abs=1e-5)
    assert first.rank == int((expected_NV[0] > expected_NV[0, 17]).sum()) + 1
    assert [i for i, _ in first.top] == expected_NV[0].topk(2).indices.tolist()
    assert rows[1][1] is None
    token, third = rows[2]
    assert third is not None
    assert (third.token_id, third.top) == (token, ())
    assert third.logprob == pytest.approx(float(expected_NV[2, token]), abs=1e-5)


def test_prompt_logprobs_over_several_chunks() -> None:
    logits_NV = random_logits(150, 40)
    targets = [i % 40 for i in range(150)]
    rows = prompt_logprobs(logits_NV, targets, 4)
    expected_NV = logits_NV.double().log_softmax(-1)
    assert [row.token_id for row in rows] == targets
    for i in (0, 64, 149):
        assert rows[i].logprob == pytest.approx(float(expected_NV[i, targets[i]]), abs=1e-5)
        assert [t for t, _ in rows[i].top] == expected_NV[i].topk(4).indices.tolist()
    assert prompt_logprobs(logits_NV[:0], [], 4) == []
