"""Wires one engine: reads, loads, sizes, assembles. Used by `LLM` and the engine process.

Knows every room; decides nothing itself. Importing it loads no torch; calling it does.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from shoal.core.clock import MonotonicClock
from shoal.core.errors import ConfigError
from shoal.core.model_spec import ModelSpec
from shoal.core.options import EngineOptions
from shoal.core.request import Grammar
from shoal.core.stats import EngineInfo
from shoal.engine.config import EngineConfig
from shoal.engine.loop import EngineLoop, Report
from shoal.engine.sequence import GrammarMatcher
from shoal.engine.state import EngineState
from shoal.executor.inproc import InprocExecutor
from shoal.model.spec import read_spec

Say = Callable[[str], None]
Progress = Callable[[int, int], None]

_CPU_STEP_TOKENS = 512
_CUDA_STEP_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class LoadedEngine:
    """An engine ready to run: call `loop.run()` in some thread."""

    loop: EngineLoop
    executor: InprocExecutor
    info: EngineInfo


def load_engine(
    options: EngineOptions, report: Report, *, say: Say, progress: Progress
) -> LoadedEngine:
    """Wire an engine: read, load, size, assemble.

    Raises:
        ModelError, DeviceError, ConfigError: what the user can mend.
    """
    started_s = time.perf_counter()
    path = Path(options.model_path)
    spec = read_spec(path)
    _check_limits(options, spec)
    say(f"model      {path.name} ({spec.architecture}, {spec.num_layers} layers)")
    from shoal.worker.launch import launch_worker  # the one import that loads torch

    say(f"imports    {time.perf_counter() - started_s:.1f} s")
    launched = launch_worker(options, spec, say=say, progress=progress)
    config = EngineConfig(
        num_blocks=launched.num_blocks,
        max_model_len=launched.max_model_len,
        vocab_size=spec.vocab_size,
        eos_token_ids=spec.eos_token_ids,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=_step_tokens(options, launched.device_type),
        max_waiting=options.max_waiting,
        max_steps_in_flight=options.max_steps_in_flight,
        prefix_caching=options.enable_prefix_caching,
        model_digest=f"{options.fingerprint}/{launched.digest}",
    )
    executor = InprocExecutor(launched.worker)
    loop = EngineLoop(
        EngineState(config),
        executor,
        compile_grammar=_LazyGrammars(path, spec),
        threads=ThreadPoolExecutor(2, thread_name_prefix="shoal-grammar"),
        report=report,
        clock=MonotonicClock(),
    )
    info = EngineInfo(
        max_model_len=config.max_model_len,
        num_kv_blocks=config.num_blocks,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_waiting=config.max_waiting,
        device=launched.device,
        dtype=launched.dtype,
        load_s=time.perf_counter() - started_s,
    )
    return LoadedEngine(loop, executor, info)


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


def _step_tokens(options: EngineOptions, device_type: str) -> int:
    default = _CUDA_STEP_TOKENS if device_type == "cuda" else _CPU_STEP_TOKENS
    return options.max_num_batched_tokens or max(default, options.max_num_seqs)
