"""Steps of a model's shape on this device, timed: what the cost model's constants are fitted to.

    weights    random; as many layers as no cache holds
    Steps      one token of several sequences, near and far into their context; chunks of prompts,
               alone and beside others' tokens, as served Steps hold them: a few tokens up
               through all layers, and through the last half: a layer's part is told from the rest

A slow device leaves out long chunks, so that Steps fit the time there is.

They run as served ones do: the same loading, kernels, runner, threads, and a lab's slowness. A time
is the median of several. Knows nothing of formulas.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from shoal.core.model_spec import ModelSpec
from shoal.core.options import EngineOptions
from shoal.core.plan import Hop
from shoal.core.request import SamplingParams
from shoal.core.split import Range, whole
from shoal.core.step import BLOCK_SIZE, SequenceStart, Step, StepRow
from shoal.core.step_times import StepTaken
from shoal.kernels import KVCache
from shoal.model.random_source import RandomSource
from shoal.worker.kv_pool import token_bytes
from shoal.worker.launch import load_worker
from shoal.worker.runner import Worker
from shoal.worker.speed import Speed

_UNCACHED_WEIGHTS = 100_000_000
"""So many are no longer in any cache, however few bits they have."""
_MOST_TABLE_WEIGHTS = 1 << 27
_LEAST_LAYERS = 2
_FAR = 1024
_DECODES = ((1, 32), (4, 32), (8, 32), (16, 32), (1, _FAR), (4, _FAR))
"""Sequences, and the context of each."""
_PROMPTS = ((0, 8), (0, 16), (0, 32), (_FAR - 32, 32), (0, 64), (0, 128), (0, 256), (0, 512))
"""Positions before a chunk, and its tokens."""
_MIXED = ((4, 32, 8), (4, 32, 24))
"""Sequences that get a token, the context of each, and tokens of somebody's prompt."""
_LEAST_CHUNK = 64
"""Up to so many tokens run however slow a device is, and say how slow."""
_BLOCKS_OF_CONTEXT = _FAR // BLOCK_SIZE
_NUM_BLOCKS = 4 * _BLOCKS_OF_CONTEXT
_MOST_ROUNDS, _IN_A_ROW = 5, 2
"""Rounds go through all Steps: a machine that is slow for some seconds is so to all of them."""

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Calibration:
    """Measured Steps.

    Attributes:
        spec: of what ran: a few layers of the model, and of its vocabulary.
        precision: of its weights and activations, as the engine says it.
    """

    spec: ModelSpec
    precision: str
    taken: tuple[StepTaken, ...]


def calibrate(
    spec: ModelSpec,
    options: EngineOptions,
    *,
    speed: float = 1.0,
    budget_s: float = 10.0,
    say: Say = lambda line: None,
) -> Calibration:
    """Steps of random weights on the device of `options`, in its precision and on its threads.

    Args:
        options: `model_path` is not read.
        speed: of a lab's device.
        budget_s: for all Steps; the short ones still run once and again.

    Raises:
        DeviceError, ConfigError: the device has no memory for a layer, or no such precision.
    """
    small = shallow(spec)
    depths = [Range(first, small.num_layers) for first in (0, small.num_layers // 2)]
    token = token_bytes(small, whole(small), torch.float32)  # or less, if KV is narrower
    options = replace(
        options,
        fingerprint="",
        max_model_len=min(_FAR, small.max_positions),
        kv_cache_memory_bytes=_NUM_BLOCKS * BLOCK_SIZE * token,
    )
    loaded = load_worker(
        options,
        small,
        routes=tuple((Hop(0, layers),) for layers in depths),
        say=say,
        progress=lambda done, total: None,
        source=RandomSource(small),
    )
    _fill(loaded.worker.kv)
    clock = _Steps(loaded.worker, Speed(speed))
    began_s = time.perf_counter()
    every = list(step_kinds(small))
    known = max((rows for rows in every if _num_tokens(rows) <= _LEAST_CHUNK), key=_num_tokens)
    seconds = statistics.mean(clock.seconds(0, known, from_hidden=False))
    able = affordable(every, seconds / _num_tokens(known), budget_s)
    kinds = [(route, layers, rows) for rows in able for route, layers in enumerate(depths)]
    times: list[list[float]] = [[] for _ in kinds]
    for _ in range(_MOST_ROUNDS):
        for (route, layers, rows), taken_s in zip(kinds, times, strict=True):
            taken_s += clock.seconds(route, rows, from_hidden=layers.start > 0)
        if time.perf_counter() - began_s > budget_s:
            break
    taken = tuple(
        StepTaken(layers, tuple((row.start, row.num_tokens, row.samples) for row in rows), each)
        for (_, layers, rows), each in zip(kinds, map(statistics.median, times), strict=True)
    )
    return Calibration(small, loaded.facts.dtype, taken)


def affordable(
    kinds: Sequence[tuple[StepRow, ...]], token_s: float, budget_s: float
) -> list[tuple[StepRow, ...]]:
    """Without the longest chunks, until a round of all is likely to fit.

    Args:
        token_s: that a Step takes for each of its tokens, about.
    """
    sizes = [_num_tokens(rows) for rows in kinds]
    # Each once more, untimed, and again through half of the layers.
    token_s *= (1 + _IN_A_ROW) * 1.5
    most = max(sizes)
    while most > _LEAST_CHUNK and token_s * sum(n for n in sizes if n <= most) > budget_s:
        most = max(size for size in sizes if size < most)
    return [rows for rows, size in zip(kinds, sizes, strict=True) if size <= most]


def _num_tokens(rows: Sequence[StepRow]) -> int:
    return sum(row.num_tokens for row in rows)


def shallow(spec: ModelSpec) -> ModelSpec:
    """The same with as many layers, and as much vocabulary, as it takes to measure them."""
    heads = spec.num_heads * (spec.head_dim + spec.value_dim)
    layer = spec.hidden_size * (heads + 2 * spec.num_kv_heads * spec.head_dim + 3 * spec.ffn_size)
    wanted = max(_LEAST_LAYERS, math.ceil(_UNCACHED_WEIGHTS / layer))
    num_layers = min(spec.num_layers, wanted)
    most_words = max(_MOST_TABLE_WEIGHTS // spec.hidden_size // BLOCK_SIZE * BLOCK_SIZE, BLOCK_SIZE)
    return replace(
        spec,
        num_layers=num_layers,
        layers=spec.layers[:num_layers],
        vocab_size=min(spec.vocab_size, most_words),
    )


class _Steps:
    """Runs a Step again and again."""

    def __init__(self, worker: Worker, speed: Speed) -> None:
        self._worker, self._speed = worker, speed
        self._num_steps = 0

    def seconds(self, route: int, rows: Sequence[StepRow], *, from_hidden: bool) -> Iterator[float]:
        """Of some Steps alike, after one that is not timed."""
        self._worker.reset()
        hidden_TE = None
        if from_hidden:
            hidden_TE = self._worker.zeros(sum(row.num_tokens for row in rows))
        self._run(route, rows, hidden_TE)
        bare = [replace(row, start_state=None) for row in rows]
        for _ in range(_IN_A_ROW):
            yield self._run(route, bare, hidden_TE)

    def _run(self, route: int, rows: Sequence[StepRow], hidden_TE: Tensor | None) -> float:
        step = Step(step_id=self._num_steps, route=route, rows=tuple(rows))
        self._num_steps += 1
        began_s = time.perf_counter()
        self._speed.begin()
        self._worker.launch(step, 0, hidden_TE).wait()
        self._speed.pay()
        return time.perf_counter() - began_s


def step_kinds(spec: ModelSpec) -> Iterator[tuple[StepRow, ...]]:
    """The rows of each Step."""
    longest = min(_FAR, spec.max_positions)
    for batch, context in _DECODES:
        if context <= longest:
            yield tuple(_row(n, batch, context - 1, 1) for n in range(batch))
    for start, count in _PROMPTS:
        if start + count <= longest:
            yield (_row(0, 1, start, count),)
    for batch, context, count in _MIXED:
        if max(context, count) <= longest:
            rows = [_row(n, batch + 1, context - 1, 1) for n in range(batch)]
            yield (*rows, _row(batch, batch + 1, 0, count, samples=False))


def _row(number: int, batch: int, start: int, count: int, *, samples: bool = True) -> StepRow:
    """One of a batch that shares out the blocks."""
    first = number * (_NUM_BLOCKS // batch)
    blocks = tuple(first + n for n in range(-(-(start + count) // BLOCK_SIZE)))
    opening = SequenceStart(
        token_ids=(0,), prompt_len=1, sampling=SamplingParams(temperature=0.0), eos_token_ids=()
    )
    return StepRow(
        sequence_id=number,
        start=start,
        token_ids=(0,) * count,
        block_ids=(blocks,),
        samples=samples,
        start_state=opening,
    )


def _fill(kv: KVCache) -> None:
    """Memory that was never written is no memory yet."""
    for layer in kv.layers:
        layer.keys_NBHD.fill_(1)
        layer.values_NBHD.fill_(1)
        for scales in (layer.key_scales_NBH, layer.value_scales_NBH):
            if scales is not None:
                scales.fill_(1)
