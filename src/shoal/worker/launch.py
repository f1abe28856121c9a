"""From options to a worker that is ready: device, weights, KV, a first Step.

Says what it does in lines a newcomer understands. Knows nothing of requests.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from shoal.core.errors import ConfigError
from shoal.core.model_spec import ModelSpec
from shoal.core.options import EngineOptions
from shoal.core.request import SamplingParams
from shoal.core.step import BLOCK_SIZE, SequenceStart, Step, StepRow
from shoal.model.decoder import Decoder
from shoal.model.packed_decoder import PackedDecoder
from shoal.model.weights import load_decoder
from shoal.worker.compute import Compute, choose_compute
from shoal.worker.device import choose_device, kv_budget_bytes
from shoal.worker.kv_pool import KVPool, allocate, num_blocks_for, token_bytes
from shoal.worker.peak import step_bytes
from shoal.worker.runner import Worker

_STEP_TOKENS = 2048  # of the largest Step on a GPU, unless the options say

Say = Callable[[str], None]
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchedWorker:
    """A worker, and what it turned out to be able to carry."""

    worker: Worker
    num_blocks: int
    max_model_len: int
    device: str
    device_type: str
    dtype: str
    kernels: str
    digest: str


def launch_worker(
    options: EngineOptions, spec: ModelSpec, *, say: Say, progress: Progress
) -> LaunchedWorker:
    """Load a model and get it to run.

    Raises:
        DeviceError, ModelError, ConfigError: what the user can mend.
    """
    if options.num_threads is not None:
        torch.set_num_threads(options.num_threads)
    choice = choose_device(options.device)
    compute = choose_compute(options, spec, choice.device)
    started_s = time.perf_counter()
    decoder = load_decoder(
        Path(options.model_path),
        spec,
        device=choice.device,
        dtype=compute.dtype,
        kernels=compute.kernels,
        quantize=compute.quantize,
        fingerprint=options.fingerprint,
        progress=progress,
    )
    say(f"precision  {_precision(decoder, compute)} on {choice.device} ({choice.label})")
    say(f"kernels    {compute.label}")
    say(_weights_line(decoder, time.perf_counter() - started_s))
    kv = _allocate_kv(options, spec, decoder, compute.kv_dtype)
    max_model_len = _max_model_len(options, spec, kv.num_blocks)
    say(_kv_line(kv, max_model_len, options.max_num_seqs))
    worker = Worker(decoder, kv)
    started_s = time.perf_counter()
    _warm_up(worker)
    say(f"warm-up    {time.perf_counter() - started_s:.1f} s")
    started_s = time.perf_counter()
    num_graphs = worker.record_graphs(
        max_num_seqs=options.max_num_seqs, max_model_len=max_model_len
    )
    if num_graphs:
        say(f"graphs     {num_graphs} of decode steps, {time.perf_counter() - started_s:.1f} s")
    return LaunchedWorker(
        worker=worker,
        num_blocks=kv.num_blocks,
        max_model_len=max_model_len,
        device=choice.label,
        device_type=choice.device.type,
        dtype=_precision(decoder, compute),
        kernels=compute.label,
        digest=compute.digest,
    )


def _precision(decoder: Decoder | PackedDecoder, compute: Compute) -> str:
    kv_name = str(compute.kv_dtype).removeprefix("torch.")
    return (
        decoder.precision if kv_name == decoder.precision else f"{decoder.precision}, KV {kv_name}"
    )


def _allocate_kv(
    options: EngineOptions, spec: ModelSpec, decoder: Decoder | PackedDecoder, dtype: torch.dtype
) -> KVPool:
    longest = options.max_model_len or spec.max_positions
    device = decoder.device
    budget = options.kv_cache_memory_bytes
    if budget is None:
        measured = None
        if device.type == "cuda" and isinstance(decoder, Decoder):
            num_tokens = options.max_num_batched_tokens or max(_STEP_TOKENS, options.max_num_seqs)
            measured = step_bytes(
                decoder, dtype, num_tokens=num_tokens, max_num_seqs=options.max_num_seqs
            )
        budget = kv_budget_bytes(
            device, options.device_share, longest * token_bytes(spec, dtype), measured
        )
    num_blocks = num_blocks_for(spec, dtype, budget)
    if options.kv_cache_memory_bytes is None:
        # More than twice what every sequence at full length takes would hardly be used.
        useful = 2 * options.max_num_seqs * (longest // BLOCK_SIZE + 1)
        num_blocks = min(num_blocks, useful)
    return allocate(spec, num_blocks, dtype, device)


def _max_model_len(options: EngineOptions, spec: ModelSpec, num_blocks: int) -> int:
    room = num_blocks * BLOCK_SIZE
    if options.max_model_len is None:
        return min(spec.max_positions, room)
    if options.max_model_len > spec.max_positions:
        raise ConfigError(
            f"--max-model-len is {options.max_model_len}; this model was made for "
            f"{spec.max_positions} tokens at most; lower it, or leave it out"
        )
    if options.max_model_len > room:
        raise ConfigError(
            f"--max-model-len is {options.max_model_len}, but the KV cache holds {room} tokens; "
            f"lower it, or raise --kv-cache-memory-bytes"
        )
    return options.max_model_len


def _warm_up(worker: Worker) -> None:
    """A prompt and a decode step, so that the first request does not pay for first touches."""
    start = SequenceStart(
        token_ids=(0, 0), prompt_len=2, sampling=SamplingParams(temperature=0.0), eos_token_ids=()
    )
    prompt = StepRow(
        sequence_id=0, start=0, token_ids=(0, 0), block_ids=(0,), samples=True, start_state=start
    )
    decode = StepRow(sequence_id=0, start=2, token_ids=(0,), block_ids=(0,), samples=True)
    for step_id, row in enumerate((prompt, decode)):
        worker.launch(Step(step_id=step_id, rows=(row,))).wait()
    worker.reset()


def _weights_line(decoder: Decoder | PackedDecoder, seconds: float) -> str:
    size = decoder.weight_bytes
    return f"weights    {_size(size)}, loaded in {seconds:.1f} s"


def _kv_line(kv: KVPool, max_model_len: int, max_num_seqs: int) -> str:
    tokens = kv.num_blocks * BLOCK_SIZE
    at_full_length = min(tokens // max_model_len, max_num_seqs)
    line = (
        f"KV cache   {_size(kv.size_bytes)} for {tokens:,} tokens: {at_full_length} requests of "
        f"{max_model_len:,} tokens at once"
    )
    if at_full_length == max_num_seqs:
        return line
    most = min(max_num_seqs, kv.num_blocks)
    return f"{line}, or {most} of {kv.num_blocks // most * BLOCK_SIZE:,}"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.0f} MB"
