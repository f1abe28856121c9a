"""Step → logits → tokens, on one device: a whole model, or one rank's part of it.

    first hop of a route   token ids     → hidden states     for the next hop
    others                 hidden states → hidden states
    last hop               hidden states → tokens            of the rows that sample

A token still in flight is taken from the tensor its Step sampled, so on an asynchronous device
no result has to reach the host before the next Step is launched; one that was sampled elsewhere
is noted before. Knows nothing of queues, requests or where Steps come from. Shapes: T new
tokens, R rows, S rows that sample, E hidden.
"""

from __future__ import annotations

import itertools
import time
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.comm import Group
from shoal.core.plan import Hop, Route
from shoal.core.request import TokenLogprobs
from shoal.core.split import Range
from shoal.core.step import Step, StepRow
from shoal.kernels import KVCache
from shoal.model.decoder import Decoder
from shoal.model.draw import add_noise
from shoal.model.logprobs import prompt_logprobs
from shoal.model.packed_decoder import PackedDecoder
from shoal.model.sampling import SampledBatch, SequenceSampler, sample
from shoal.worker.batch import HostBatches, make_batch, to_device
from shoal.worker.graphs import DecodeGraphs
from shoal.worker.kv_pool import KVPool
from shoal.worker.launched import LaunchedStep

# Steps whose sampled tokens may still be named; far more than are ever in flight on all routes.
_STEPS_REMEMBERED = 256
_PROMPT_LOGPROB_ROWS = 64


@dataclass(frozen=True, slots=True)
class _Sampled:
    """Tokens a Step sampled, and which of its rows they belong to.

    On a CPU they are kept as a list: a small tensor that outlives its Step's large ones holds the
    heap open between them.
    """

    token_ids_S: Tensor | list[int]
    index_of_row: dict[int, int]

    @property
    def on_host(self) -> list[int]:
        assert isinstance(self.token_ids_S, list)
        return self.token_ids_S

    @property
    def on_device(self) -> Tensor:
        return torch.as_tensor(self.token_ids_S)


@dataclass(frozen=True, slots=True)
class _Sequence:
    sampler: SequenceSampler
    token_ids: tuple[int, ...]
    prompt_len: int


class Worker:
    """Holds a model or a part of it, its KV, and what sampling keeps of each sequence.

    Args:
        routes: that Steps name; None: there is one, and all of it is here.
        group: the ranks that share the layers held here; None: this one has all of them.
        arithmetic: ranks that say the same make the same bits of the same numbers.
    """

    def __init__(
        self,
        decoder: Decoder | PackedDecoder,
        kv: KVPool,
        *,
        routes: tuple[Route, ...] | None = None,
        group: Group | None = None,
        arithmetic: str = "",
    ) -> None:
        self._decoder = decoder
        self._arithmetic = arithmetic
        self._kv = kv
        self._routes = routes or ((Hop(0, decoder.shard.layers),),)
        self._group = group
        self._sequences: dict[int, _Sequence] = {}
        self._sampled: OrderedDict[int, _Sampled] = OrderedDict()
        self._graphs: DecodeGraphs | None = None
        self._held: Range | None = None
        self._host_batches = HostBatches()

    def hold(self, blocks: Range) -> None:
        """Which of its instance's KV blocks are here, where ranks split KV by token ranges.

        Called once, before the first Step.
        """
        self._held = blocks
        self._host_batches = HostBatches(blocks)

    def compare(self) -> None:
        """Find out what its instance's ranks do differently; all come at once, before a Step."""
        self._decoder.compare(self._arithmetic)

    @torch.inference_mode()
    def record_graphs(self, *, max_num_seqs: int, max_model_len: int) -> int:
        """Record decode steps as CUDA graphs, where the kernels allow; how many there are."""
        is_whole = self._group is None and all(len(route) == 1 for route in self._routes)
        if isinstance(self._decoder, PackedDecoder) or not self._decoder.fits_cuda_graphs:
            return 0
        if not is_whole:
            return 0
        torch.cuda.set_device(self._kv.device)
        self._graphs = DecodeGraphs(
            self._decoder, self._kv, max_num_seqs=max_num_seqs, max_model_len=max_model_len
        )
        self._graphs.record_all()
        return len(self._graphs.sizes)

    @property
    def has_stream(self) -> bool:
        """Whether it keeps hidden states; else it runs experts for the ranks that do."""
        return self._decoder.shard.has_stream

    @property
    def kv_heads_first(self) -> bool:
        """Whether its kernels keep all tokens of a head in a block side by side."""
        return isinstance(self._decoder, PackedDecoder)

    @property
    def kv(self) -> KVCache:
        """Of the layers and heads held here."""
        return self._kv.cache

    def reset(self) -> None:
        """Forget every sequence; KV is overwritten when it is used again."""
        self._sequences.clear()
        self._sampled.clear()
        self._host_batches = HostBatches(self._held)

    def release(self, sequence_ids: Iterable[int]) -> None:
        """Forget sequences that no later Step names."""
        for sequence_id in sequence_ids:
            self._sequences.pop(sequence_id, None)
            self._host_batches.forget(sequence_id)

    def knows_tokens_of(self, step: Step) -> bool:
        """Whether all tokens that a Step names have been sampled here or noted."""
        refs = (row.token_ref for row in step.rows)
        return all(ref is None or ref.step_id in self._sampled for ref in refs)

    def note_tokens(self, step_id: int, token_ids: Sequence[int]) -> None:
        """What a Step sampled elsewhere, row by row (-1: nothing)."""
        sampled_S = to_device(torch.tensor(token_ids), self._kv.device)
        self._remember(step_id, sampled_S, {i: i for i in range(len(token_ids))})

    @torch.inference_mode()
    def launch(self, step: Step, hop: int = 0, hidden_TE: Tensor | None = None) -> LaunchedStep:
        """Run a Step's hop as far as the host is concerned.

        Args:
            hidden_TE: what the hop before gave; None on the first one.
        """
        started_s = time.perf_counter()
        if self._kv.device.type == "cuda":
            torch.cuda.set_device(self._kv.device)  # each thread has its own
        self.release(step.released)
        if not self.has_stream:
            self._decoder.serve(self._layers(step, hop))
            return LaunchedStep(step, None, {}, started_s, self._kv.device)
        num_hops = len(self._routes[step.route])
        if step.num_hops is not None or hop + 1 < num_hops:
            hidden_TE = self.hidden_states(step, hop, hidden_TE)
            goes_on = hop + 1 < (step.num_hops or num_hops)
            return LaunchedStep(
                step, None, {}, started_s, self._kv.device, hidden_TE if goes_on else None
            )
        for row in step.rows:
            self._note_start(row)
        found: dict[int, tuple[TokenLogprobs, ...]] = {}
        if isinstance(self._decoder, PackedDecoder):
            out = self._decoder.step(
                self._host_inputs(step, hidden_TE),
                self._host_batches.make(step, hop),
                self._kv.cache,
                array("q", _samples(step)),
                self._layers(step, hop),
            )
            found = self._prompt_logprobs(step, out.hidden_TE)
            sampled = self._sample(step, out.logits_NV, out.best_N)
        elif self._graphs is not None and self._graphs.take(step):
            batch = make_batch(step, self._kv.device)
            sampled = self._sample(step, self._graphs.logits(self._token_ids(step), batch))
        else:
            hidden_TE = self.hidden_states(step, hop, hidden_TE)
            found = self._prompt_logprobs(step, hidden_TE)
            sampled = self._sample(step, self._logits(step, hidden_TE))
        return LaunchedStep(step, sampled, found, started_s, self._kv.device)

    @torch.inference_mode()
    def hidden_states(self, step: Step, hop: int = 0, hidden_TE: Tensor | None = None) -> Tensor:
        """Hidden states [T, E] of a Step's tokens after a hop; writes their KV there."""
        layers = self._layers(step, hop)
        if isinstance(self._decoder, PackedDecoder):
            rows = self._host_batches.make(step, hop)
            inputs = self._host_inputs(step, hidden_TE)
            return self._decoder.forward(inputs, rows, self._kv.cache, layers)
        batch = make_batch(step, self._kv.device, hop, self._held)
        inputs_T = self._token_ids(step) if hidden_TE is None else self._here(hidden_TE)
        return self._decoder.forward(inputs_T, batch, self._kv.cache, layers)

    def zeros(self, num_tokens: int) -> Tensor:
        """Hidden states [T, E] as another hop might have sent them."""
        return torch.zeros(num_tokens, self._decoder.spec.hidden_size)

    @torch.inference_mode()
    def logits(self, hidden_NE: Tensor) -> Tensor:
        """fp32 logits [N, V] of the tokens that follow."""
        return self._decoder.logits(hidden_NE)

    def _layers(self, step: Step, hop: int) -> Range:
        return self._routes[step.route][hop].layers

    def _here(self, hidden_TE: Tensor) -> Tensor:
        """Activations of another device, as this one computes with them."""
        return hidden_TE.to(self._kv.device, self._decoder.hidden_dtype)

    def _host_inputs(self, step: Step, hidden_TE: Tensor | None) -> array[int] | Tensor:
        return self._host_token_ids(step) if hidden_TE is None else self._here(hidden_TE)

    def _note_start(self, row: StepRow) -> None:
        start = row.start_state
        if start is not None:
            vocab = self._decoder.shard.vocab
            sampler = SequenceSampler(start, vocab=vocab, device=self._kv.device)
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
            token_ids_T[there] = self._sampled[step_id].on_device[here]
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

    def _logits(self, step: Step, hidden_TE: Tensor) -> Tensor | None:
        """fp32 logits [S, V] of the rows that sample."""
        samples = _samples(step)
        if not samples:
            return None
        last_S = to_device(torch.tensor(samples), self._kv.device)
        return self._decoder.logits(hidden_TE[last_S])

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
            vocab=self._decoder.shard.vocab,
            group=self._group,
        )
        index_of_row = {i: index for index, (i, _) in enumerate(rows)}
        self._remember(step.step_id, sampled.token_ids_N, index_of_row)
        return sampled

    def _remember(self, step_id: int, token_ids_S: Tensor, index_of_row: dict[int, int]) -> None:
        if self._kv.device.type == "cpu":
            self._sampled[step_id] = _Sampled(token_ids_S.tolist(), index_of_row)
        else:
            self._sampled[step_id] = _Sampled(token_ids_S, index_of_row)
        while len(self._sampled) > _STEPS_REMEMBERED:
            self._sampled.popitem(last=False)

    def _prompt_logprobs(
        self, step: Step, hidden_TE: Tensor
    ) -> dict[int, tuple[TokenLogprobs, ...]]:
        found: dict[int, tuple[TokenLogprobs, ...]] = {}
        offset = 0
        for i, row in enumerate(step.rows):
            sequence = self._sequences[row.sequence_id]
            top_n = sequence.sampler.sampling.prompt_logprobs
            targets = sequence.token_ids[row.start + 1 : min(row.end + 1, sequence.prompt_len)]
            if top_n is not None and targets:
                hidden = hidden_TE[offset : offset + len(targets)]
                found[i] = self._score(hidden, targets, top_n)
            offset += row.num_tokens
        return found

    def _score(
        self, hidden_TE: Tensor, targets: tuple[int, ...], top_n: int
    ) -> tuple[TokenLogprobs, ...]:
        # In parts: the logits of a whole chunk would take far more memory than its KV.
        scored: list[TokenLogprobs] = []
        for first in range(0, len(targets), _PROMPT_LOGPROB_ROWS):
            part = slice(first, first + _PROMPT_LOGPROB_ROWS)
            scored += prompt_logprobs(
                self._decoder.logits(hidden_TE[part]),
                targets[part],
                top_n,
                vocab=self._decoder.shard.vocab,
                group=self._group,
            )
        return tuple(scored)


def _samples(step: Step) -> list[int]:
    """The last token of each row that samples: indices into the Step's tokens."""
    ends = itertools.accumulate(row.num_tokens for row in step.rows)
    return [end - 1 for end, row in zip(ends, step.rows, strict=True) if row.samples]
