"""From options to a worker that is ready: device, weights, KV, a first Step.

Of a whole model, or of one rank's part. Says what it does in lines a newcomer understands.
Knows nothing of requests.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from shoal.comm import Group
from shoal.core.logits import sampling_bytes
from shoal.core.model_spec import ModelSpec
from shoal.core.options import EngineOptions
from shoal.core.plan import Route
from shoal.core.request import SamplingParams
from shoal.core.split import Shard, whole
from shoal.core.step import SequenceStart, Step, StepRow
from shoal.kernels.cpu.step import Session
from shoal.model.decoder import Decoder
from shoal.model.packed_decoder import PackedDecoder
from shoal.model.sources import WeightSource
from shoal.model.weights import load_decoder
from shoal.wire.worker_messages import Loaded
from shoal.worker.capacity import kv_text, settle_max_model_len, size_text, useful_blocks
from shoal.worker.compute import Compute, choose_compute
from shoal.worker.dealing import expert_bytes
from shoal.worker.device import (
    choose_device,
    kv_budget_bytes,
    weights_budget_bytes,
)
from shoal.worker.disk_experts import disk_experts_text
from shoal.worker.disk_layers import disk_layers_text, plain_layers_text
from shoal.worker.kv_pool import allocate, num_blocks_for, token_bytes
from shoal.worker.memory import free_memory_bytes
from shoal.worker.peak import step_bytes
from shoal.worker.runner import Worker

_STEP_TOKENS = 2048  # of the largest Step on a GPU, unless the options say

Say = Callable[[str], None]
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class LoadedWorker:
    """A worker that has its weights and its KV, and what others must know of it."""

    worker: Worker
    decoder: Decoder | PackedDecoder
    facts: Loaded


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchedWorker:
    """A worker with all of a model, ready to run."""

    worker: Worker
    num_blocks: int
    kv_bytes: int
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
    loaded = load_worker(options, spec, say=say, progress=progress)
    facts = loaded.facts
    assert facts.num_blocks is not None, "a whole model has KV"
    max_model_len = settle_max_model_len(options, spec, facts.num_blocks)
    say(kv_text(facts.kv_bytes, facts.num_blocks, max_model_len, options.max_num_seqs))
    started_s = time.perf_counter()
    warm_up(loaded.worker)
    say(f"warm-up    {time.perf_counter() - started_s:.1f} s")
    started_s = time.perf_counter()
    num_graphs = loaded.worker.record_graphs(
        max_num_seqs=options.max_num_seqs, max_model_len=max_model_len
    )
    if num_graphs:
        say(f"graphs     {num_graphs} of decode steps, {time.perf_counter() - started_s:.1f} s")
    return LaunchedWorker(
        worker=loaded.worker,
        num_blocks=facts.num_blocks,
        kv_bytes=facts.kv_bytes,
        max_model_len=max_model_len,
        device=facts.device,
        device_type=facts.device_type,
        dtype=facts.dtype,
        kernels=facts.kernels,
        digest=facts.digest,
    )


def load_worker(
    options: EngineOptions,
    spec: ModelSpec,
    *,
    shard: Shard | None = None,
    group: Group | None = None,
    routes: tuple[Route, ...] | None = None,
    say: Say,
    progress: Progress,
    source: WeightSource | None = None,
) -> LoadedWorker:
    """Load a model, or one rank's part of it. Exchanges nothing with other ranks.

    Args:
        shard: its part; None: all of it.
        group: the ranks that share its layers.
        routes: of the replica; None: there is one, and all of it is here.
        source: of weights; None: the checkpoint that the options name.

    Raises:
        DeviceError, ModelError, ConfigError: what the user can mend.
    """
    if options.num_threads is not None:
        torch.set_num_threads(options.num_threads)
    choice = choose_device(options.device)
    shard = shard or whole(spec)
    compute = choose_compute(options, spec, choice.device)
    started_s = time.perf_counter()
    decoder = load_decoder(
        Path(options.model_path),
        spec,
        shard=shard,
        group=group,
        device=choice.device,
        dtype=compute.dtype,
        kernels=compute.kernels,
        quantize=compute.quantize,
        fingerprint=options.fingerprint,
        weights_memory_bytes=_weights_budget(options, spec, shard, choice.device),
        host_memory_bytes=weights_budget_bytes(torch.device("cpu"), options.device_share),
        progress=progress,
        source=source,
    )
    say(f"precision  {_precision(decoder, compute)} on {choice.device} ({choice.label})")
    say(f"kernels    {compute.label}")
    seconds = time.perf_counter() - started_s
    say(f"weights    {size_text(decoder.weight_bytes)}, loaded in {seconds:.1f} s")
    num_threads = options.num_threads or torch.get_num_threads()
    if isinstance(decoder, Decoder):
        disk = plain_layers_text(decoder, num_threads)
    else:
        assert isinstance(compute.kernels, Session), "a packed decoder runs in one"
        disk = disk_layers_text(decoder, compute.kernels, num_threads)
        disk = disk or disk_experts_text(decoder, compute.kernels)
    if disk:
        say(f"{'on disk' if choice.device.type == 'cpu' else 'on host'}    {disk}")
    num_blocks = _num_blocks(options, spec, decoder, compute.kv_dtype, is_alone=group is None)
    kv = allocate(spec, decoder.shard, num_blocks or 1, compute.kv_dtype, decoder.device)
    facts = Loaded(
        num_blocks=num_blocks,
        weight_bytes=decoder.weight_bytes,
        kv_bytes=kv.size_bytes,
        device=choice.label,
        device_type=choice.device.type,
        dtype=_precision(decoder, compute),
        kernels=compute.label,
        digest=compute.digest,
        disk=disk,
        **_expert_facts(options, decoder),
    )
    worker = Worker(
        decoder, kv, routes=routes, group=group, arithmetic=compute.arithmetic_on(choice)
    )
    return LoadedWorker(worker, decoder, facts)


def warm_up(worker: Worker, *, route: int = 0, num_hops: int = 1, hop: int = 0) -> None:
    """A prompt and a decode step, so that the first request does not pay for first touches.

    Every rank of an instance does it at once, as they reduce among each other.

    Args:
        route, num_hops, hop: one that the worker is on.
    """
    worker.compare()
    start = SequenceStart(
        token_ids=(0, 0), prompt_len=2, sampling=SamplingParams(temperature=0.0), eos_token_ids=()
    )
    blocks = ((0,),) * num_hops
    prompt = StepRow(
        sequence_id=0, start=0, token_ids=(0, 0), block_ids=blocks, samples=True, start_state=start
    )
    decode = StepRow(sequence_id=0, start=2, token_ids=(0,), block_ids=blocks, samples=True)
    for step_id, row in enumerate((prompt, decode)):
        step = Step(step_id=step_id, route=route, rows=(row,))
        hidden_TE = worker.zeros(step.num_tokens) if hop else None
        launched = worker.launch(step, hop, hidden_TE)
        if launched.hidden_TE is None and worker.has_stream:
            launched.wait()
    worker.reset()


def _expert_facts(options: EngineOptions, decoder: Decoder | PackedDecoder) -> dict[str, int]:
    """Half of what is free now may go to experts of other ranks."""
    size = expert_bytes(decoder)
    if not size:
        return {}
    free = int(free_memory_bytes(decoder.device) * options.device_share)
    return {"expert_bytes": size, "expert_room": free // 2 // size}


def _weights_budget(
    options: EngineOptions, spec: ModelSpec, shard: Shard, device: torch.device
) -> int:
    if options.weights_memory_bytes is not None:
        return options.weights_memory_bytes
    reserved = 0
    if device.type == "cuda":  # elsewhere, what is kept free beside weights is ample
        reserved = options.kv_cache_memory_bytes or 0
        reserved += sampling_bytes(spec, options.max_num_seqs) if shard.has_head else 0
    return weights_budget_bytes(device, options.device_share, reserved)


def _precision(decoder: Decoder | PackedDecoder, compute: Compute) -> str:
    kv_name = str(compute.kv_dtype).removeprefix("torch.")
    return (
        decoder.precision if kv_name == decoder.precision else f"{decoder.precision}, KV {kv_name}"
    )


def _num_blocks(
    options: EngineOptions,
    spec: ModelSpec,
    decoder: Decoder | PackedDecoder,
    dtype: torch.dtype,
    *,
    is_alone: bool,
) -> int | None:
    """KV blocks that there is room for.

    Args:
        is_alone: a Step can be measured without other ranks.
    """
    longest = options.max_model_len or spec.max_positions
    device, shard = decoder.device, decoder.shard
    if options.kv_cache_memory_bytes is not None:
        return num_blocks_for(spec, shard, dtype, options.kv_cache_memory_bytes)
    measured = None
    if device.type == "cuda" and isinstance(decoder, Decoder) and is_alone and _is_whole(shard):
        num_tokens = options.max_num_batched_tokens or max(_STEP_TOKENS, options.max_num_seqs)
        measured = step_bytes(
            decoder, dtype, num_tokens=num_tokens, max_num_seqs=options.max_num_seqs
        )
    full_length = longest * token_bytes(spec, shard, dtype)
    budget = kv_budget_bytes(device, options.device_share, full_length, measured)
    num_blocks = num_blocks_for(spec, shard, dtype, budget)
    return None if num_blocks is None else min(num_blocks, useful_blocks(options, spec))


def _is_whole(shard: Shard) -> bool:
    return shard.has_embedding and shard.has_head
