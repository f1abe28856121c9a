"""From logits to tokens: Gumbel-max with noise that is a function of (seed, position, id).

The token is argmax(processed logits + noise), which is distributed as softmax(processed
logits) and depends on nothing but its own row: not on the batch, its order, or how rows or
vocabulary are split. Processing follows vLLM's order:

    raw logits → (logprobs) → grammar mask → logit bias → min_tokens' bans → penalties
               → temperature → min-p → top-k → top-p → + noise → argmax

Knows nothing of steps, scheduling or text. Shapes: N rows of the batch, R rows of a part of
it, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from shoal.core.request import SamplingParams, TokenLogprobs
from shoal.core.step import SequenceStart
from shoal.model import logits as process
from shoal.model.draw import AddNoise, add_noise, draw
from shoal.model.logits import to_device
from shoal.model.logprobs import HostCopy, PendingLogprobs

# vLLM's _SAMPLING_EPS: below it dividing by the temperature means nothing any more.
_GREEDY_BELOW = 1e-5


class SequenceSampler:
    """What sampling keeps of one sequence. Rebuilt from token ids it is what it was."""

    __slots__ = (
        "bans",
        "biases",
        "greedy",
        "output_counts_V",
        "prompt_len",
        "prompt_seen_V",
        "sampling",
    )

    def __init__(self, start: SequenceStart, *, vocab_size: int, device: torch.device) -> None:
        sampling = start.sampling
        self.sampling = sampling
        self.prompt_len = start.prompt_len
        self.greedy = sampling.temperature < _GREEDY_BELOW
        assert self.greedy or sampling.seed is not None, "the router draws missing seeds"
        stops = (*sampling.stop_token_ids, *(() if sampling.ignore_eos else start.eos_token_ids))
        self.bans = tuple({id_ for id_ in stops if 0 <= id_ < vocab_size})
        self.biases: dict[int, float] = {}
        for token_id, bias in sampling.logit_bias:
            if 0 <= token_id < vocab_size:
                self.biases[token_id] = self.biases.get(token_id, 0.0) + bias
        self.prompt_seen_V: Tensor | None = None
        self.output_counts_V: Tensor | None = None
        if _has_penalties(sampling):
            prompt, outputs = (
                torch.tensor([id_ for id_ in ids if 0 <= id_ < vocab_size], dtype=torch.int64)
                .bincount(minlength=vocab_size)
                .to(device)
                for ids in (
                    start.token_ids[: start.prompt_len],
                    start.token_ids[start.prompt_len :],
                )
            )
            self.prompt_seen_V, self.output_counts_V = prompt > 0, outputs.int()

    def append(self, token_id_1: Tensor) -> None:
        """Count one more output token: int64 [1], on the device, its value not looked at."""
        if self.output_counts_V is not None:
            one = torch.ones_like(token_id_1, dtype=torch.int32)
            self.output_counts_V.scatter_add_(0, token_id_1, one)

    def bans_at(self, position: int) -> tuple[int, ...]:
        """Token ids that may not stand at `position`, as min_tokens is not reached."""
        return self.bans if position - self.prompt_len < self.sampling.min_tokens else ()

    def is_plain_argmax(self, position: int) -> bool:
        """Whether the best raw logit decides (if no grammar has its say)."""
        touched = self.biases or self.output_counts_V is not None or self.bans_at(position)
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
) -> SampledBatch:
    """Choose the token of each row and append it to its sequence's state.

    On a CUDA device this never waits for it.

    Args:
        logits_NV: raw logits, fp32; not changed.
        positions: absolute position of the token to choose (`StepRow.end`).
        masks: allowed token ids (`StepRow.mask`).
        best_N: where each row's raw logits are largest, if that is known.
        noise: a faster way to add it, where there is one.
    """
    rows = [_Row(*row) for row in zip(sequences, positions, masks, strict=True)]
    plain = [row.is_plain for row in rows]
    if best_N is not None and all(plain):
        token_ids_N = best_N
    else:
        token_ids_N = _argmax_or(partial(_process, noise=noise), logits_NV, rows, plain)
    for i, sequence in enumerate(sequences):
        sequence.append(token_ids_N[i : i + 1])
    return SampledBatch(
        token_ids_N, HostCopy(token_ids_N), *_logprobs(logits_NV, token_ids_N, rows)
    )


def _argmax_or(
    otherwise: Callable[[Tensor, Sequence[_Row]], Tensor],
    logits_NV: Tensor,
    rows: Sequence[_Row],
    is_argmax: Sequence[bool],
) -> Tensor:
    """Token ids: of some rows by argmax, of the rest by `otherwise`, on a copy of them."""
    if all(is_argmax):
        return logits_NV.argmax(dim=-1)
    token_ids_N = torch.empty(len(rows), dtype=torch.int64, device=logits_NV.device)
    for kind in set(is_argmax):
        part = [i for i, this in enumerate(is_argmax) if this is kind]
        index_R = to_device(part, torch.int64, logits_NV.device)
        logits_RV = logits_NV.index_select(0, index_R)
        token_ids_N[index_R] = (
            logits_RV.argmax(dim=-1) if kind else otherwise(logits_RV, [rows[i] for i in part])
        )
    return token_ids_N


def _process(logits_RV: Tensor, rows: Sequence[_Row], noise: AddNoise) -> Tensor:
    """Tokens of rows that need more than an argmax of raw logits. Overwrites the logits."""
    process.finite_(logits_RV)
    masked = [(i, row.mask) for i, row in enumerate(rows) if row.mask is not None]
    if masked:
        process.apply_masks_(logits_RV, *zip(*masked, strict=True))
    biased = [(i, *item) for i, row in enumerate(rows) for item in row.sequence.biases.items()]
    if biased:
        process.add_biases_(logits_RV, *zip(*biased, strict=True))
    banned = [(i, id_) for i, row in enumerate(rows) for id_ in row.sequence.bans_at(row.position)]
    if banned:
        process.ban_(logits_RV, *zip(*banned, strict=True))
    _penalise(logits_RV, [row.sequence for row in rows])
    greedy = [row.sequence.greedy for row in rows]
    return _argmax_or(partial(_draw, noise=noise), logits_RV, rows, greedy)


def _draw(logits_RV: Tensor, rows: Sequence[_Row], noise: AddNoise) -> Tensor:
    sampling = [row.sequence.sampling for row in rows]
    return draw(logits_RV, sampling, [row.position for row in rows], noise)


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
    logits_NV: Tensor, token_ids_N: Tensor, rows: Sequence[_Row]
) -> tuple[tuple[int, ...], PendingLogprobs | None]:
    wanted = [
        (i, num_best)
        for i, row in enumerate(rows)
        if (num_best := row.sequence.sampling.logprobs) is not None
    ]
    if not wanted:
        return (), None
    index_R = to_device([i for i, _ in wanted], torch.int64, logits_NV.device)
    pending = PendingLogprobs(logits_NV[index_R], token_ids_N[index_R], [n for _, n in wanted])
    return tuple(i for i, _ in wanted), pending


def _has_penalties(sampling: SamplingParams) -> bool:
    return (
        sampling.repetition_penalty != 1.0
        or sampling.frequency_penalty != 0.0
        or sampling.presence_penalty != 0.0
    )
