"""Step → logits → tokens, on one device.

Steps come in order. A token still in flight is taken from the tensor its Step sampled, so
on an asynchronous device no result has to reach the host before the next Step is launched.
Knows nothing of queues, requests or where Steps come from. Shapes: T new tokens, R rows,
S rows that sample, D hidden.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.core.request import TokenLogprobs
from shoal.core.step import RowResult, Step, StepResult, StepRow
from shoal.model.decoder import Decoder
from shoal.model.logprobs import prompt_logprobs
from shoal.model.sampling import SampledBatch, SequenceSampler, sample
from shoal.worker.batch import make_batch, to_device
from shoal.worker.kv_pool import KVPool

# Steps whose sampled tokens may still be named; far more than are ever in flight.
_STEPS_REMEMBERED = 32
_PROMPT_LOGPROB_ROWS = 64


@dataclass(frozen=True, slots=True)
class _Sampled:
    """Tokens a Step sampled, and which of its rows they belong to."""

    token_ids_S: Tensor
    index_of_row: dict[int, int]


@dataclass(frozen=True, slots=True)
class _Sequence:
    sampler: SequenceSampler
    token_ids: tuple[int, ...]
    prompt_len: int


class LaunchedStep:
    """A Step the device works on."""

    def __init__(
        self,
        step: Step,
        sampled: SampledBatch | None,
        prompt_logprobs_of: dict[int, tuple[TokenLogprobs, ...]],
        started_s: float,
    ) -> None:
        self._step = step
        self._sampled = sampled
        self._prompt_logprobs_of = prompt_logprobs_of
        self._started_s = started_s

    @property
    def done(self) -> bool:
        return self._sampled is None or self._sampled.host_copy.done

    def wait(self) -> StepResult:
        tokens = iter([] if self._sampled is None else self._sampled.to_rows())
        rows = []
        for i, row in enumerate(self._step.rows):
            token_id, logprobs = next(tokens) if row.samples else (None, None)
            rows.append(RowResult(token_id, logprobs, self._prompt_logprobs_of.get(i, ())))
        return StepResult(
            step_id=self._step.step_id,
            incarnation=self._step.incarnation,
            rows=tuple(rows),
            compute_s=time.perf_counter() - self._started_s,
        )


class Worker:
    """Holds a model, its KV and what sampling keeps of each sequence."""

    def __init__(self, decoder: Decoder, kv: KVPool) -> None:
        self._decoder = decoder
        self._kv = kv
        self._sequences: dict[int, _Sequence] = {}
        self._sampled: OrderedDict[int, _Sampled] = OrderedDict()

    def reset(self) -> None:
        """Forget every sequence; KV is overwritten when it is used again."""
        self._sequences.clear()
        self._sampled.clear()

    @torch.inference_mode()
    def launch(self, step: Step) -> LaunchedStep:
        """Run a Step as far as the host is concerned."""
        started_s = time.perf_counter()
        for sequence_id in step.released:
            self._sequences.pop(sequence_id, None)
        for row in step.rows:
            self._note_start(row)
        token_ids_T = self._token_ids(step)
        batch = make_batch(step, self._kv.device)
        hidden_TD = self._decoder.forward(token_ids_T, batch, self._kv.cache)
        found = self._prompt_logprobs(step, hidden_TD)
        return LaunchedStep(step, self._sample(step, hidden_TD), found, started_s)

    def _note_start(self, row: StepRow) -> None:
        start = row.start_state
        if start is not None:
            sampler = SequenceSampler(
                start, vocab_size=self._decoder.spec.vocab_size, device=self._kv.device
            )
            self._sequences[row.sequence_id] = _Sequence(sampler, start.token_ids, start.prompt_len)

    def _token_ids(self, step: Step) -> Tensor:
        """int64 [T]; tokens in flight are copied on the device."""
        token_ids: list[int] = []
        places: dict[int, list[tuple[int, int]]] = {}
        for row in step.rows:
            token_ids += row.token_ids
            if (ref := row.token_ref) is not None:
                index = self._sampled[ref.step_id].index_of_row[ref.row]
                places.setdefault(ref.step_id, []).append((len(token_ids), index))
                token_ids.append(0)
        token_ids_T = to_device(torch.tensor(token_ids), self._kv.device)
        for step_id, pairs in places.items():
            there, here = (
                to_device(torch.tensor(side), self._kv.device) for side in zip(*pairs, strict=True)
            )
            token_ids_T[there] = self._sampled[step_id].token_ids_S[here]
        return token_ids_T

    def _sample(self, step: Step, hidden_TD: Tensor) -> SampledBatch | None:
        rows = [(i, row) for i, row in enumerate(step.rows) if row.samples]
        if not rows:
            return None
        ends = torch.tensor([row.num_tokens for row in step.rows]).cumsum(0) - 1
        last_S = to_device(ends[[i for i, _ in rows]], self._kv.device)
        sampled = sample(
            self._decoder.logits(hidden_TD[last_S]),
            [self._sequences[row.sequence_id].sampler for _, row in rows],
            [row.end for _, row in rows],
            [row.mask for _, row in rows],
        )
        self._sampled[step.step_id] = _Sampled(
            sampled.token_ids_N, {i: index for index, (i, _) in enumerate(rows)}
        )
        while len(self._sampled) > _STEPS_REMEMBERED:
            self._sampled.popitem(last=False)
        return sampled

    def _prompt_logprobs(
        self, step: Step, hidden_TD: Tensor
    ) -> dict[int, tuple[TokenLogprobs, ...]]:
        found: dict[int, tuple[TokenLogprobs, ...]] = {}
        offset = 0
        for i, row in enumerate(step.rows):
            sequence = self._sequences[row.sequence_id]
            top_n = sequence.sampler.sampling.prompt_logprobs
            targets = sequence.token_ids[row.start + 1 : min(row.end + 1, sequence.prompt_len)]
            if top_n is not None and targets:
                hidden = hidden_TD[offset : offset + len(targets)]
                found[i] = self._score(hidden, targets, top_n)
            offset += row.num_tokens
        return found

    def _score(
        self, hidden_TD: Tensor, targets: tuple[int, ...], top_n: int
    ) -> tuple[TokenLogprobs, ...]:
        # In parts: the logits of a whole chunk would take far more memory than its KV.
        scored: list[TokenLogprobs] = []
        for first in range(0, len(targets), _PROMPT_LOGPROB_ROWS):
            part = slice(first, first + _PROMPT_LOGPROB_ROWS)
            scored += prompt_logprobs(self._decoder.logits(hidden_TD[part]), targets[part], top_n)
        return tuple(scored)
