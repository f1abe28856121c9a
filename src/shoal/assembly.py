"""Wires one engine: reads, loads, sizes, assembles. Used by `LLM` and the engine process.

    one device       a worker in this process           executor/inproc.py
    a replica plan   workers in processes of their own  executor/local.py
                     or, for tests, in threads          executor/threads.py

Knows every room; decides nothing itself. Importing it loads no torch; calling it does.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from shoal.core.clock import MonotonicClock
from shoal.core.errors import ConfigError
from shoal.core.kv import KVPlace
from shoal.core.model_spec import ModelSpec
from shoal.core.options import EngineOptions
from shoal.core.plan import Hop, RankPlan, ReplicaPlan, Route, check
from shoal.core.record import Recorder
from shoal.core.request import Grammar
from shoal.core.split import Range
from shoal.core.stats import EngineInfo
from shoal.engine.carrier import KVCarrier, TellKV
from shoal.engine.config import EngineConfig
from shoal.engine.loop import EngineLoop, Report
from shoal.engine.sequence import GrammarMatcher
from shoal.engine.state import EngineState
from shoal.executor import Executor
from shoal.executor.capacity import Capacity
from shoal.executor.inproc import InprocExecutor
from shoal.executor.shares import rank_options
from shoal.executor.transfers import KVMover, OneWorkerMover, Order
from shoal.model.spec import read_spec
from shoal.policy.batching import step_tokens
from shoal.wire.kv_messages import ONLY_WORKER, KVKeys
from shoal.wire.messages import HostNet

if TYPE_CHECKING:
    from shoal.worker.launch import LaunchedWorker

Say = Callable[[str], None]
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class LoadedEngine:
    """An engine ready to run: call `loop.run()` in some thread."""

    loop: EngineLoop
    executor: Executor
    info: EngineInfo


def load_engine(
    options: EngineOptions,
    report: Report,
    *,
    say: Say,
    progress: Progress,
    replica: ReplicaPlan | None = None,
    hosts: Mapping[str, HostNet] | None = None,
    kv_keys: KVKeys | None = None,
    tell_kv: TellKV | None = None,
    in_threads: bool = False,
    record: tuple[str, str] | None = None,
) -> LoadedEngine:
    """Wire an engine: read, load, size, assemble.

    Args:
        replica: how the model is shared out; None: all of it on the device of `options`.
        hosts: of a lab, that the plan names.
        kv_keys: to exchange KV with workers of other replicas; `tell_kv` hears of it.
        in_threads: a plan's workers are threads of this process, for tests.
        record: folder and name of a recording of what the engine decides.

    Raises:
        ModelError, DeviceError, ConfigError: what the user can mend.
    """
    started_s = time.perf_counter()
    path = Path(options.model_path)
    spec = read_spec(path)
    _check_limits(options, spec)
    say(f"model      {path.name} ({spec.architecture}, {spec.num_layers} layers)")
    if replica is not None:
        check(replica, spec)
        options, replica = _one_device(options, replica)
    start = partial(_start_workers, kv_keys=kv_keys, in_threads=in_threads)
    workers = start(options, spec, replica, hosts or {}, say=say, progress=progress)
    capacity = workers.capacity
    moves_kv = workers.mover is not None and tell_kv is not None
    config = EngineConfig(
        instance_blocks=capacity.instance_blocks,
        rank_blocks=capacity.rank_blocks,
        kv_kinds=capacity.kv_kinds if moves_kv else (),
        max_model_len=capacity.max_model_len,
        vocab_size=spec.vocab_size,
        eos_token_ids=spec.eos_token_ids,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=_step_tokens(options, capacity, replica),
        batching=options.batching,
        tpot_target_s=options.tpot_target_s,
        max_waiting=options.max_waiting,
        max_steps_in_flight=options.max_steps_in_flight,
        prefix_caching=options.enable_prefix_caching,
        model_digest=f"{options.fingerprint}/{capacity.digest}",
        routes=_whole_route(spec) if replica is None else replica.routes,
    )
    carrier = None
    if workers.mover is not None and tell_kv is not None:
        carrier = KVCarrier(workers.mover, config.model_digest, tell_kv)
    recorder = None
    if record is not None:
        recorder = Recorder(Path(record[0]), record[1], what="engine", config=config)
    loop = EngineLoop(
        EngineState(config),
        workers.executor,
        compile_grammar=_LazyGrammars(path, spec),
        threads=ThreadPoolExecutor(2, thread_name_prefix="shoal-grammar"),
        report=report,
        clock=MonotonicClock(),
        carrier=carrier,
        recorder=recorder,
    )
    workers.when_lost(loop.stop)
    info = config.info(
        device=capacity.device,
        dtype=capacity.dtype,
        kv_block_bytes=capacity.block_bytes if carrier else 0,
        load_s=time.perf_counter() - started_s,
    )
    return LoadedEngine(loop, workers.executor, info)


@dataclass(frozen=True, slots=True)
class _Workers:
    """An executor, what it can carry, who is told if it can go on no more, and who moves its KV."""

    executor: Executor
    capacity: Capacity
    when_lost: Callable[[Callable[[], None]], None]
    mover: KVMover | None = None


def _start_workers(
    options: EngineOptions,
    spec: ModelSpec,
    replica: ReplicaPlan | None,
    hosts: Mapping[str, HostNet],
    *,
    kv_keys: KVKeys | None,
    in_threads: bool,
    say: Say,
    progress: Progress,
) -> _Workers:
    if replica is None:
        return _start_worker(options, spec, kv_keys, say, progress)
    if in_threads:
        from shoal.executor.threads import ThreadExecutor

        threads = ThreadExecutor(replica, options, spec, say=say, progress=progress)
        return _Workers(threads, threads.capacity, _ignore)
    from shoal.executor.local import LocalExecutor

    local = LocalExecutor(
        replica, options, spec, hosts=hosts, kv_keys=kv_keys, say=say, progress=progress
    )
    return _Workers(local, local.capacity, local.when_lost, local.mover)


def _start_worker(
    options: EngineOptions, spec: ModelSpec, kv_keys: KVKeys | None, say: Say, progress: Progress
) -> _Workers:
    """The one device of `options`, without a wire."""
    started_s = time.perf_counter()
    from shoal.worker.launch import launch_worker  # the one import that loads torch

    say(f"imports    {time.perf_counter() - started_s:.1f} s")
    launched = launch_worker(options, spec, say=say, progress=progress)
    capacity = Capacity(
        instance_blocks=(launched.num_blocks,),
        rank_blocks=((),),
        block_bytes=launched.kv_bytes // launched.num_blocks,
        max_model_len=launched.max_model_len,
        device=launched.device,
        device_type=launched.device_type,
        dtype=launched.dtype,
        digest=launched.digest,
        lines=(),
    )
    executor = InprocExecutor(launched.worker, Range(0, spec.num_layers))
    if kv_keys is None:
        return _Workers(executor, capacity, _ignore)
    return _Workers(executor, capacity, _ignore, _open_port(launched, spec, kv_keys, executor))


def _open_port(
    launched: LaunchedWorker, spec: ModelSpec, keys: KVKeys, executor: InprocExecutor
) -> KVMover:
    """Let a worker of this process exchange KV with those of other replicas."""
    from shoal.wire.mesh import Mesh
    from shoal.wire.worker_messages import LendBlocks
    from shoal.worker.transfer import KVPort

    mesh = Mesh(keys.of_worker[ONLY_WORKER])
    layers, heads = Range(0, spec.num_layers), Range(0, spec.num_kv_heads)
    port = KVPort(
        launched.worker.kv,
        layers,
        heads,
        mesh,
        heads_first=launched.worker.kv_heads_first,
        post=executor.between_steps,
        report=lambda pull_id, num_blocks: mover.pulled(pull_id, num_blocks),
    )

    def take(order: Order) -> None:
        if isinstance(order, LendBlocks):
            port.lend(order)
        else:
            executor.between_steps(partial(port.take, order))

    mover = OneWorkerMover(
        KVPlace(f"{keys.replica}/{ONLY_WORKER}", port.address, 0, layers, heads),
        send=take,
        arrived=executor.tell,
    )
    port.start()
    executor.close_too(port.close)
    return mover


def _ignore(_tell: Callable[[], None]) -> None:
    """Workers that live in this process are lost only with it."""


def _one_device(
    options: EngineOptions, replica: ReplicaPlan
) -> tuple[EngineOptions, ReplicaPlan | None]:
    """A plan of one device is that device's options, unless it is a lab's."""
    if len(replica.instances) > 1 or len(replica.instances[0].ranks) > 1:
        return options, replica
    (rank,) = replica.instances[0].ranks
    if rank != RankPlan(device=rank.device, num_threads=rank.num_threads):
        return options, replica
    return rank_options(options, replica, 0, 0), None


def _check_limits(options: EngineOptions, spec: ModelSpec) -> None:
    """What can be refused before seconds go into torch and the weights."""
    if (options.max_model_len or 0) > spec.max_positions:
        raise ConfigError(
            f"--max-model-len is {options.max_model_len}; this model was made for "
            f"{spec.max_positions} tokens at most; lower it, or leave it out"
        )
    if (options.max_num_batched_tokens or options.max_num_seqs) < options.max_num_seqs:
        raise ConfigError(
            f"--max-num-batched-tokens is {options.max_num_batched_tokens}, below --max-num-seqs "
            f"({options.max_num_seqs}), so a Step could not hold a token of every sequence; "
            f"raise the one or lower the other"
        )


def _whole_route(spec: ModelSpec) -> tuple[Route, ...]:
    return ((Hop(0, Range(0, spec.num_layers)),),)


class _LazyGrammars:
    """Compiles grammars; the tokenizer is read when the first one comes."""

    def __init__(self, path: Path, spec: ModelSpec) -> None:
        self._path = path
        self._spec = spec
        self._lock = threading.Lock()
        self._compile: Callable[[Grammar, tuple[int, ...]], GrammarMatcher] | None = None

    def __call__(self, grammar: Grammar, prefix_ids: tuple[int, ...]) -> GrammarMatcher:
        with self._lock:
            if self._compile is None:
                from shoal.text.grammar import GrammarCompiler
                from shoal.text.tokenizer import load_tokenizer

                compiler = GrammarCompiler(
                    load_tokenizer(self._path).json, self._spec.vocab_size, self._spec.eos_token_ids
                )
                self._compile = compiler.compile
        return self._compile(grammar, prefix_ids)


def _step_tokens(options: EngineOptions, capacity: Capacity, replica: ReplicaPlan | None) -> int:
    return options.max_num_batched_tokens or step_tokens(
        is_cuda=capacity.device_type == "cuda",
        num_stages=1 if replica is None else len(replica.stages),
        max_num_seqs=options.max_num_seqs,
    )
