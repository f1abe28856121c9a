"""Step → logits → tokens, on one device.

Steps come in order. A token still in flight is taken from the tensor its Step sampled, so
on an asynchronous device no result has to reach the host before the next Step is launched.
Knows nothing of queues, requests or where Steps come from. Shapes: T new tokens, R rows,
S rows that sample, D hidden.
"""

from __future__ import annotations

import itertools
import time
from array import array
from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.core.request import TokenLogprobs
from shoal.core.step import RowResult, Step, StepResult, StepRow
from shoal.model.decoder import Decoder
from shoal.model.draw import add_noise
from shoal.model.logprobs import prompt_logprobs
from shoal.model.packed_decoder import PackedDecoder
from shoal.model.sampling import SampledBatch, SequenceSampler, sample
from shoal.worker.batch import HostBatches, make_batch, to_device
from shoal.worker.graphs import DecodeGraphs
from shoal.worker.kv_pool import KVPool

# Steps whose sampled tokens may still be named; far more than are ever in flight.
_STEPS_REMEMBERED = 32
_PROMPT_LOGPROB_ROWS = 64


@dataclass(frozen=True, slots=True)
class _Sampled:
    """Tokens a Step sampled, and which of its rows they belong to."""

    token_ids_S: Tensor
    index_of_row: dict[int, int]

    @property
    def on_host(self) -> list[int]:
        return self.token_ids_S.tolist()


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
        device: torch.device,
    ) -> None:
        self._step = step
        self._sampled = sampled
        self._prompt_logprobs_of = prompt_logprobs_of
        self._started_s = started_s
        self._finished: torch.cuda.Event | None = None
        if device.type == "cuda" and sampled is None:
            # Without it a long prompt's chunks would all count as done and queue up.
            self._finished = torch.cuda.current_stream(device).record_event()

    @property
    def done(self) -> bool:
        if self._finished is not None:
            return bool(self._finished.query())  # type: ignore[no-untyped-call]
        return self._sampled is None or self._sampled.host_copy.done

    def wait(self) -> StepResult:
        if self._finished is not None:
            self._finished.synchronize()
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

    def __init__(self, decoder: Decoder | PackedDecoder, kv: KVPool) -> None:
        self._decoder = decoder
        self._kv = kv
        self._sequences: dict[int, _Sequence] = {}
        self._sampled: OrderedDict[int, _Sampled] = OrderedDict()
        self._graphs: DecodeGraphs | None = None
        self._host_batches = HostBatches()

    @torch.inference_mode()
    def record_graphs(self, *, max_num_seqs: int, max_model_len: int) -> int:
        """Record decode steps as CUDA graphs, where the kernels allow; how many there are."""
        if isinstance(self._decoder, PackedDecoder) or not self._decoder.fits_cuda_graphs:
            return 0
        torch.cuda.set_device(self._kv.device)
        self._graphs = DecodeGraphs(
            self._decoder, self._kv, max_num_seqs=max_num_seqs, max_model_len=max_model_len
        )
        self._graphs.record_all()
        return len(self._graphs.sizes)

    def reset(self) -> None:
        """Forget every sequence; KV is overwritten when it is used again."""
        self._sequences.clear()
        self._sampled.clear()
        self._host_batches = HostBatches()

    @torch.inference_mode()
    def launch(self, step: Step) -> LaunchedStep:
        """Run a Step as far as the host is concerned."""
        started_s = time.perf_counter()
        if self._kv.device.type == "cuda":
            torch.cuda.set_device(self._kv.device)  # each thread has its own
        for sequence_id in step.released:
            self._sequences.pop(sequence_id, None)
            self._host_batches.forget(sequence_id)
        for row in step.rows:
            self._note_start(row)
        found: dict[int, tuple[TokenLogprobs, ...]] = {}
        if isinstance(self._decoder, PackedDecoder):
            out = self._decoder.step(
                self._host_token_ids(step),
                self._host_batches.make(step),
                self._kv.cache,
                array("q", _samples(step)),
            )
            found = self._prompt_logprobs(step, out.hidden_TE)
            sampled = self._sample(step, out.logits_NV, out.best_N)
        elif self._graphs is not None and self._graphs.take(step):
            batch = make_batch(step, self._kv.device)
            sampled = self._sample(step, self._graphs.logits(self._token_ids(step), batch))
        else:
            hidden_TD = self.hidden_states(step)
            found = self._prompt_logprobs(step, hidden_TD)
            sampled = self._sample(step, self._logits(step, hidden_TD))
        return LaunchedStep(step, sampled, found, started_s, self._kv.device)

    @torch.inference_mode()
    def hidden_states(self, step: Step) -> Tensor:
        """Hidden states [T, D] of a Step's tokens; writes their KV. Nothing is sampled."""
        if isinstance(self._decoder, PackedDecoder):
            rows = self._host_batches.make(step)
            return self._decoder.forward(self._host_token_ids(step), rows, self._kv.cache)
        token_ids_T = self._token_ids(step)
        batch = make_batch(step, self._kv.device)
        return self._decoder.forward(token_ids_T, batch, self._kv.cache)

    @torch.inference_mode()
    def logits(self, hidden_ND: Tensor) -> Tensor:
        """fp32 logits [N, V] of the tokens that follow."""
        return self._decoder.logits(hidden_ND)

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

    def _host_token_ids(self, step: Step) -> array[int]:
        """The same where the device is the host: what was sampled is known."""
        token_ids: list[int] = []
        for row in step.rows:
            token_ids += row.token_ids
            if (ref := row.token_ref) is not None:
                sampled = self._sampled[ref.step_id]
                token_ids.append(sampled.on_host[sampled.index_of_row[ref.row]])
        return array("q", token_ids)

    def _logits(self, step: Step, hidden_TD: Tensor) -> Tensor | None:
        """fp32 logits [S, V] of the rows that sample."""
        samples = _samples(step)
        if not samples:
            return None
        last_S = to_device(torch.tensor(samples), self._kv.device)
        return self._decoder.logits(hidden_TD[last_S])

    def _sample(
        self, step: Step, logits_SV: Tensor | None, best_S: Tensor | None = None
    ) -> SampledBatch | None:
        if logits_SV is None or len(logits_SV) == 0:
            return None
        rows = [(i, row) for i, row in enumerate(step.rows) if row.samples]
        sampled = sample(
            logits_SV,
            [self._sequences[row.sequence_id].sampler for _, row in rows],
            [row.end for _, row in rows],
            [row.mask for _, row in rows],
            best_S,
            self._decoder.add_noise if isinstance(self._decoder, PackedDecoder) else add_noise,
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


def _samples(step: Step) -> list[int]:
    """The last token of each row that samples: indices into the Step's tokens."""
    ends = itertools.accumulate(row.num_tokens for row in step.rows)
    return [end - 1 for end, row in zip(ends, step.rows, strict=True) if row.samples]
