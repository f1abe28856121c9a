"""From logits to tokens: Gumbel-max with noise that is a function of (seed, position, id).

The token is argmax(processed logits + noise), which is distributed as softmax(processed
logits) and depends on nothing but its own row: not on the batch, its order, or how rows or
vocabulary are split. Processing follows vLLM's order:

    raw logits → (logprobs) → grammar mask → logit bias → min_tokens' bans → penalties
               → temperature → min-p → top-k → top-p → + noise → argmax

A rank that has logits of some token ids processes those; what concerns all of them is for its
`Vocabulary` to settle. Knows nothing of steps, scheduling or text. Shapes: N rows of the batch,
R rows of a part of it, V token ids held here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from shoal.comm import Group
from shoal.core.logits import SAMPLED_AT_ONCE
from shoal.core.request import SamplingParams, TokenLogprobs
from shoal.core.split import Range
from shoal.core.step import SequenceStart
from shoal.model import logits as process
from shoal.model.draw import AddNoise, add_noise, perturb_
from shoal.model.logits import to_device
from shoal.model.logprobs import HostCopy, PendingLogprobs
from shoal.model.vocab_parallel import vocabulary_of
from shoal.model.vocabulary import Vocabulary

# vLLM's _SAMPLING_EPS: below it dividing by the temperature means nothing any more.
_GREEDY_BELOW = 1e-5


class SequenceSampler:
    """What sampling keeps of one sequence. Rebuilt from token ids it is what it was.

    Args:
        vocab: token ids whose logits it is used on; ids are never relative to it.
    """

    __slots__ = (
        "bans",
        "biases",
        "greedy",
        "num_stops",
        "output_counts_V",
        "prompt_len",
        "prompt_seen_V",
        "sampling",
        "vocab",
    )

    def __init__(self, start: SequenceStart, *, vocab: Range, device: torch.device) -> None:
        sampling = start.sampling
        self.sampling = sampling
        self.vocab = vocab
        self.prompt_len = start.prompt_len
        self.greedy = sampling.temperature < _GREEDY_BELOW
        assert self.greedy or sampling.seed is not None, "the router draws missing seeds"
        stops = {*sampling.stop_token_ids, *(() if sampling.ignore_eos else start.eos_token_ids)}
        self.num_stops = len(stops)
        self.bans = tuple(id_ for id_ in stops if id_ in vocab)
        self.biases: dict[int, float] = {}
        for token_id, bias in sampling.logit_bias:
            if token_id in vocab:
                self.biases[token_id] = self.biases.get(token_id, 0.0) + bias
        self.prompt_seen_V: Tensor | None = None
        self.output_counts_V: Tensor | None = None
        if _has_penalties(sampling):
            prompt, outputs = (
                torch.tensor([id_ - vocab.start for id_ in ids if id_ in vocab], dtype=torch.int64)
                .bincount(minlength=len(vocab))
                .to(device)
                for ids in (
                    start.token_ids[: start.prompt_len],
                    start.token_ids[start.prompt_len :],
                )
            )
            self.prompt_seen_V, self.output_counts_V = prompt > 0, outputs.int()

    def append(self, token_id_1: Tensor) -> None:
        """Count one more output token: int64 [1], on the device, its value not looked at."""
        if self.output_counts_V is not None and len(self.vocab):
            column_1 = token_id_1 - self.vocab.start
            inside_1 = (column_1 >= 0) & (column_1 < len(self.vocab))
            column_1 = column_1.clamp_(0, len(self.vocab) - 1)
            self.output_counts_V.scatter_add_(0, column_1, inside_1.int())

    def bans_at(self, position: int) -> tuple[int, ...]:
        """Token ids held here that may not stand at `position`, as min_tokens is not reached."""
        return self.bans if self.has_bans_at(position) else ()

    def has_bans_at(self, position: int) -> bool:
        """Whether there are any, here or on another rank."""
        return self.num_stops > 0 and position - self.prompt_len < self.sampling.min_tokens

    def is_plain_argmax(self, position: int) -> bool:
        """Whether the best raw logit decides (if no grammar has its say): on all ranks alike."""
        touched = (
            self.sampling.logit_bias
            or self.output_counts_V is not None
            or self.has_bans_at(position)
        )
        return self.greedy and not touched


@dataclass(frozen=True, slots=True)
class SampledBatch:
    """Tokens on the device (int64 [N]), with what the host will want to know of them."""

    token_ids_N: Tensor
    host_copy: HostCopy
    logprob_rows: tuple[int, ...]
    logprobs: PendingLogprobs | None

    def to_rows(self) -> list[tuple[int, TokenLogprobs | None]]:
        """Token id and logprobs (where asked for) of each row; waits for the device."""
        token_ids: list[int] = self.host_copy.wait()[0].tolist()
        found: dict[int, TokenLogprobs] = {}
        if self.logprobs is not None:
            found = dict(zip(self.logprob_rows, self.logprobs.rows(), strict=True))
        return [(token_id, found.get(row)) for row, token_id in enumerate(token_ids)]


@dataclass(frozen=True, slots=True)
class _Row:
    sequence: SequenceSampler
    position: int
    mask: bytes | None

    @property
    def is_plain(self) -> bool:
        return self.mask is None and self.sequence.is_plain_argmax(self.position)


def sample(
    logits_NV: Tensor,
    sequences: Sequence[SequenceSampler],
    positions: Sequence[int],
    masks: Sequence[bytes | None],
    best_N: Tensor | None = None,
    noise: AddNoise = add_noise,
    *,
    vocab: Range | None = None,
    group: Group | None = None,
) -> SampledBatch:
    """Choose the token of each row and append it to its sequence's state.

    On a CUDA device this never waits for it, unless ranks have to settle a top-p cut.

    Args:
        logits_NV: raw logits, fp32; not changed.
        positions: absolute position of the token to choose (`StepRow.end`).
        masks: allowed token ids (`StepRow.mask`), of the whole vocabulary.
        best_N: where each row's raw logits are largest, if that is known.
        noise: a faster way to add it, where there is one.
        vocab: token ids that the logits are of, and the sequences' states.
        group: the ranks that have the others, with the same rows, which get the same tokens;
            None: there are none.
    """
    vocabulary = vocabulary_of(vocab, group)
    rows = [_Row(*row) for row in zip(sequences, positions, masks, strict=True)]
    plain = [row.is_plain for row in rows]
    if best_N is not None and all(plain):
        picked = vocabulary.pick(logits_NV, best_N)
    else:
        otherwise = partial(_process, noise=noise, vocabulary=vocabulary)
        picked = _pick_or(otherwise, logits_NV, rows, plain, vocabulary)
    token_ids_N = vocabulary.chosen(picked)
    for i, sequence in enumerate(sequences):
        sequence.append(token_ids_N[i : i + 1])
    return SampledBatch(
        token_ids_N, HostCopy(token_ids_N), *_logprobs(logits_NV, token_ids_N, rows, vocabulary)
    )


def _pick_or(
    otherwise: Callable[[Tensor, Sequence[_Row]], Tensor],
    logits_NV: Tensor,
    rows: Sequence[_Row],
    is_best: Sequence[bool],
    vocabulary: Vocabulary,
) -> Tensor:
    """Candidates: of some rows their best logit, of the rest by `otherwise`, on a copy of them."""
    if all(is_best):
        return vocabulary.pick(logits_NV)
    picked_N: Tensor | None = None
    for kind, part in _parts(is_best):
        index_R = to_device(part, torch.int64, logits_NV.device)
        logits_RV = logits_NV.index_select(0, index_R)
        picked_R = (
            vocabulary.pick(logits_RV) if kind else otherwise(logits_RV, [rows[i] for i in part])
        )
        if picked_N is None:
            picked_N = picked_R.new_empty((len(rows), *picked_R.shape[1:]))
        picked_N[index_R] = picked_R
    assert picked_N is not None
    return picked_N


def _parts(is_best: Sequence[bool]) -> Iterator[tuple[bool, list[int]]]:
    """Rows of a kind, as many as are sampled from at once."""
    for kind in sorted(set(is_best)):
        every = [i for i, this in enumerate(is_best) if this is kind]
        for start in range(0, len(every), SAMPLED_AT_ONCE):
            yield kind, every[start : start + SAMPLED_AT_ONCE]


def _process(
    logits_RV: Tensor, rows: Sequence[_Row], noise: AddNoise, vocabulary: Vocabulary
) -> Tensor:
    """Candidates of rows that need more than their best raw logit. Overwrites the logits."""
    first_id = vocabulary.first_id
    process.finite_(logits_RV)
    masks = {i: row.mask for i, row in enumerate(rows) if row.mask is not None}
    if masks:
        process.apply_masks_(logits_RV, list(masks), list(masks.values()), first_id)
    biases = [(i, row.sequence.biases) for i, row in enumerate(rows)]
    biased = [(i, id_ - first_id, bias) for i, own in biases for id_, bias in own.items()]
    if biased:
        process.add_biases_(logits_RV, *zip(*biased, strict=True))
    if any(row.sequence.has_bans_at(row.position) for row in rows):
        bans = [(i, row.sequence.bans_at(row.position)) for i, row in enumerate(rows)]
        banned = [(i, id_ - first_id) for i, own in bans for id_ in own]
        where = [i for i, _ in banned], [column for _, column in banned]
        process.ban_(logits_RV, *where, vocabulary.everywhere)
    _penalise(logits_RV, [row.sequence for row in rows])
    greedy = [row.sequence.greedy for row in rows]
    otherwise = partial(_draw, noise=noise, vocabulary=vocabulary)
    return _pick_or(otherwise, logits_RV, rows, greedy, vocabulary)


def _draw(
    logits_RV: Tensor, rows: Sequence[_Row], noise: AddNoise, vocabulary: Vocabulary
) -> Tensor:
    sampling = [row.sequence.sampling for row in rows]
    positions = [row.position for row in rows]
    perturb_(logits_RV, sampling, positions, noise, vocabulary.first_id, vocabulary.cutoff)
    return vocabulary.pick(logits_RV)


def _penalise(logits_RV: Tensor, sequences: Sequence[SequenceSampler]) -> None:
    states = [
        (i, sequence.sampling, sequence.prompt_seen_V, sequence.output_counts_V)
        for i, sequence in enumerate(sequences)
        if sequence.prompt_seen_V is not None and sequence.output_counts_V is not None
    ]
    if not states:
        return
    rows, params, seen, counts = zip(*states, strict=True)
    index_P = to_device(rows, torch.int64, logits_RV.device)
    logits_PV = logits_RV[index_P]
    process.penalise_(
        logits_PV,
        torch.stack(seen),
        torch.stack(counts),
        [param.repetition_penalty for param in params],
        [param.frequency_penalty for param in params],
        [param.presence_penalty for param in params],
    )
    logits_RV[index_P] = logits_PV


def _logprobs(
    logits_NV: Tensor, token_ids_N: Tensor, rows: Sequence[_Row], vocabulary: Vocabulary
) -> tuple[tuple[int, ...], PendingLogprobs | None]:
    wanted = [
        (i, num_best)
        for i, row in enumerate(rows)
        if (num_best := row.sequence.sampling.logprobs) is not None
    ]
    if not wanted:
        return (), None
    index_R = to_device([i for i, _ in wanted], torch.int64, logits_NV.device)
    pending = PendingLogprobs(
        logits_NV[index_R], token_ids_N[index_R], [n for _, n in wanted], vocabulary
    )
    return tuple(i for i, _ in wanted), pending


def _has_penalties(sampling: SamplingParams) -> bool:
    return (
        sampling.repetition_penalty != 1.0
        or sampling.frequency_penalty != 0.0
        or sampling.presence_penalty != 0.0
    )
