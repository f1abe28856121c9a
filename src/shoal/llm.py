"""The offline Python API.

    with LLM("smollm2-135m") as llm:
        (completion,) = llm.generate("The capital of France is", SamplingParams(max_tokens=8))
        print(completion.text)

The engine runs in a thread of this process; detokenising happens in the caller's.
"""

from __future__ import annotations

import atexit
import itertools
import logging
import operator
import random
import reprlib
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from queue import SimpleQueue
from typing import Any, SupportsIndex

from shoal.assembly import LoadedEngine, Progress, Say, load_engine
from shoal.core.clock import MonotonicClock
from shoal.core.errors import ConfigError, InvalidRequestError, UnavailableError
from shoal.core.options import EngineOptions
from shoal.core.plan import ReplicaPlan
from shoal.core.request import (
    ErrorInfo,
    GenerateRequest,
    Output,
    SamplingParams,
    seed_of_choice,
)
from shoal.core.split import KVSplit
from shoal.core.stats import EngineStats
from shoal.engine.events import Cancel, Submit
from shoal.engine.loop import EngineLoop
from shoal.model.generation_config import read_default_sampling
from shoal.model.spec import read_spec
from shoal.model.store import resolve
from shoal.plan_file import Parallelism, PlanFile, plan_table, read_plan
from shoal.text.completion import Choice, Chunk, Completion, CompletionStream
from shoal.text.text_stream import TextStream
from shoal.text.tokenizer import Tokenizer, load_tokenizer

__all__ = ["LLM", "Choice", "Chunk", "Completion"]

Messages = Sequence[Mapping[str, Any]]

_NO_LIMIT = 1 << 31
_DEFAULT_MODEL = "smollm2-135m"
_log = logging.getLogger(__name__)


class LLM:
    """One model, used from this process: on one device in it, or on workers of its own.

    Args:
        model: a catalogue name, a local folder, a .gguf file or a Hugging Face id; None: the one
            that the plan names, else smollm2-135m.
        plan: a plan file with one replica, or what `read_plan` made of one.
        tensor_parallel_size, pipeline_parallel_size: without a plan: devices that share every
            layer, and stages that the layers are cut into.
        kv_split: what of KV each device that shares a layer keeps: its heads, or some tokens.
        options: further `EngineOptions` by name (dtype, device, max_model_len, ...).
        say: takes lines about loading; silent by default.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        plan: str | Path | PlanFile | None = None,
        tensor_parallel_size: int = 1,
        pipeline_parallel_size: int = 1,
        kv_split: KVSplit = "heads",
        revision: str | None = None,
        token: str | None = None,
        chat_template: str | None = None,
        say: Say = lambda line: None,
        progress: Progress = lambda done, total: None,
        **options: Any,
    ) -> None:
        # First of all, so that a wrong one does not wait for a download to be told.
        file = read_plan(Path(plan)) if isinstance(plan, str | Path) else plan
        defaults: dict[str, Any] = {"max_waiting": _NO_LIMIT}
        if file is not None and file.max_num_seqs is not None:
            defaults["max_num_seqs"] = file.max_num_seqs
        engine_options = EngineOptions(model_path="", **{**defaults, **options})
        parallelism = Parallelism(
            file=file,
            tensor_parallel_size=tensor_parallel_size,
            pipeline_parallel_size=pipeline_parallel_size,
            kv_split=kv_split,
            device=engine_options.device,
            num_threads=engine_options.num_threads,
        )
        named = model or (parallelism.file and parallelism.file.model) or _DEFAULT_MODEL
        resolved = resolve(named, revision=revision, token=token, progress=progress)
        # What the model's makers recommend, and an end that comes in reasonable time.
        recommended = read_default_sampling(resolved.path)
        self._default_params = SamplingParams(max_tokens=256, **recommended)
        self._tokenizer = load_tokenizer(resolved.path, chat_template=chat_template)
        self._inboxes: dict[str, SimpleQueue[Output]] = {}
        self._ids = itertools.count()
        self._rng = random.SystemRandom()
        self._clock = MonotonicClock()
        self._stats = EngineStats()
        engine = load_engine(
            replace(
                engine_options, model_path=str(resolved.path), fingerprint=resolved.fingerprint
            ),
            self._report,
            say=say,
            progress=progress,
            replica=_one_replica(parallelism, resolved.path, say),
        )
        self._info = engine.info
        self._lock = threading.Lock()
        self._engine: LoadedEngine | None = engine
        self._closed: ErrorInfo | None = None
        self._thread = threading.Thread(
            target=self._run, args=(engine.loop,), name="shoal-engine", daemon=True
        )
        self._thread.start()
        # A Step that runs when the interpreter goes would take the process down with SIGABRT.
        atexit.register(self.close)

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the engine and free the device; what still runs ends in UnavailableError."""
        with self._lock:
            engine, self._engine = self._engine, None
        if engine is None:
            return
        atexit.unregister(self.close)
        engine.loop.stop()
        self._thread.join()
        engine.executor.close()

    @property
    def tokenizer(self) -> Tokenizer:
        return self._tokenizer

    @property
    def stats(self) -> EngineStats:
        """What the engine last said of itself."""
        return self._stats

    @property
    def max_model_len(self) -> int:
        return self._info.max_model_len

    @property
    def has_chat_template(self) -> bool:
        return self._tokenizer.chat_template is not None

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        output_ids: Sequence[Sequence[int]] | None = None,
    ) -> list[Completion]:
        """Complete prompts (texts or token ids), all at once.

        Args:
            params: one for all, or one for each prompt; by default the sampling that the
                checkpoint's generation_config.json recommends, and 256 tokens.
            output_ids: for each prompt, output tokens already produced elsewhere: generation
                goes on exactly after them (same seed, penalties, limits and grammar state).
        """
        prompt_ids = [self._encode(prompt) for prompt in _as_list(prompts)]
        each = _one_each(params or self._default_params, len(prompt_ids))
        committed = _one_each_prompt(output_ids, len(prompt_ids))
        started: list[list[CompletionStream]] = []
        try:
            for ids, sampling, done in zip(prompt_ids, each, committed, strict=True):
                started.append(self._start(ids, sampling, done))
            return [
                Completion(prompt_ids=ids, choices=tuple(stream.result() for stream in streams))
                for ids, streams in zip(prompt_ids, started, strict=True)
            ]
        except BaseException:
            # One was refused, or the caller was interrupted: nobody will read the others.
            for stream in itertools.chain.from_iterable(started):
                stream.cancel()
            raise

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Completion]:
        """Answer one conversation, or several at once."""
        if not messages:
            return []
        conversations = [messages] if isinstance(messages[0], Mapping) else messages
        return self.generate([self.render(each) for each in conversations], params)  # type: ignore[arg-type]

    def stream(
        self,
        prompt: str | Sequence[int] | None = None,
        params: SamplingParams | None = None,
        *,
        messages: Messages | None = None,
    ) -> Iterator[Chunk]:
        """Chunks of one completion as they come; leaving early cancels it."""
        ids = self.render(messages) if messages is not None else self._encode(prompt or "")
        (stream,) = self._start(tuple(ids), replace(params or self._default_params, n=1), ())
        return stream.chunks()

    def render(self, messages: Messages) -> tuple[int, ...]:
        """Token ids of a conversation, ready for the answer."""
        template = self._tokenizer.require_chat_template()
        text = template.render(messages, now=datetime.now().astimezone())
        return tuple(self._tokenizer.encode(text, add_special_tokens=False))

    # --- one request ---

    def _encode(self, prompt: str | Sequence[int]) -> tuple[int, ...]:
        if isinstance(prompt, str):
            return tuple(self._tokenizer.encode(prompt))
        return _token_ids(prompt, "prompt")

    def _start(
        self, prompt_ids: tuple[int, ...], params: SamplingParams, output_ids: tuple[int, ...]
    ) -> list[CompletionStream]:
        if output_ids and params.n > 1:
            raise InvalidRequestError(
                f"output_ids continue one completion, but n is {params.n}; use n=1", param="n"
            )
        seed = self._rng.getrandbits(63) if params.seed is None else params.seed
        return [
            self._submit(
                GenerateRequest(
                    request_id=f"llm-{next(self._ids)}",
                    prompt_ids=prompt_ids,
                    output_ids=output_ids,
                    sampling=replace(params, n=1, seed=seed_of_choice(seed, index)),
                ),
                index,
            )
            for index in range(params.n)
        ]

    def _submit(self, request: GenerateRequest, index: int) -> CompletionStream:
        inbox: SimpleQueue[Output] = SimpleQueue()
        text = TextStream(self._tokenizer, request.sampling, request.prompt_ids, request.output_ids)
        with self._lock:
            # Under the lock, so that an inbox is either refused here or emptied by `_run`.
            if self._closed is not None:
                raise self._closed.to_exception()
            if self._engine is None:
                raise _CLOSED.to_exception()
            self._inboxes[request.request_id] = inbox
            self._engine.loop.post(Submit(request))
        return CompletionStream(request, index, inbox, text, self._cancel, self._clock)

    def _run(self, loop: EngineLoop) -> None:
        """The engine's thread: however it ends, everyone who waits for it hears of it."""
        end = _CLOSED
        try:
            loop.run()
        except BaseException as error:  # noqa: BLE001 -- logged, and raised in every caller
            _log.exception("the engine's thread died")
            end = _died(error)
        finally:
            with self._lock:
                self._closed = end
                waiting, self._inboxes = self._inboxes, {}
            for request_id, inbox in waiting.items():
                inbox.put(Output(request_id=request_id, finish="error", error=end))

    def _report(self, outputs: list[Output], stats: EngineStats) -> None:
        self._stats = stats
        for output in outputs:
            inbox = self._inboxes.get(output.request_id)
            if inbox is not None:
                inbox.put(output)
            if output.finish is not None:
                self._inboxes.pop(output.request_id, None)

    def _cancel(self, request_id: str) -> None:
        with self._lock:
            if self._inboxes.pop(request_id, None) is not None and self._engine is not None:
                self._engine.loop.post(Cancel(request_id))


_CLOSED = ErrorInfo(
    status=UnavailableError.status,
    code="closed",
    message="This LLM was closed; make a new one",
)


def _died(error: BaseException) -> ErrorInfo:
    return ErrorInfo(
        status=UnavailableError.status,
        code="engine_died",
        message=f"The engine died of {type(error).__name__}: {error}; make a new LLM",
    )


def _one_replica(parallelism: Parallelism, path: Path, say: Say) -> ReplicaPlan | None:
    """What it runs on; None: the one device that the options name."""
    if parallelism.is_plain:
        return None
    replicas = parallelism.replicas(read_spec(path))
    if len(replicas) > 1:
        raise ConfigError(
            f"the plan has {len(replicas)} replicas, and an LLM is one; keep one of them, or use "
            "`shoal serve --plan`"
        )
    for line in plan_table(replicas):
        say(line)
    return replicas[0]


def _as_list(prompts: Any) -> list[Any]:
    """One prompt (a text, or token ids) or several."""
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Iterable):
        raise _wrong_type("prompts", prompts)
    prompts = list(prompts)
    return [prompts] if prompts and isinstance(prompts[0], SupportsIndex) else prompts


def _token_ids(given: Any, name: str) -> tuple[int, ...]:
    """Token ids as ints, whatever library's ints they were."""
    try:
        return tuple(map(operator.index, given))
    except TypeError as error:
        raise _wrong_type(name, given) from error


def _wrong_type(name: str, given: Any) -> InvalidRequestError:
    shown = reprlib.repr(given)
    return InvalidRequestError(
        f"{name} holds {shown}; give a text or a list of token ids (ints)",
        code="invalid_value",
        param="prompt",
    )


def _one_each_prompt(
    output_ids: Sequence[Sequence[int]] | None, count: int
) -> list[tuple[int, ...]]:
    if output_ids is None:
        return [()] * count
    if len(output_ids) != count:
        raise InvalidRequestError(
            f"{len(output_ids)} lists of output_ids for {count} prompts; give one for each",
            code="invalid_value",
            param="output_ids",
        )
    return [_token_ids(done, "output_ids") for done in output_ids]


def _one_each(
    params: SamplingParams | Sequence[SamplingParams], count: int
) -> list[SamplingParams]:
    if isinstance(params, SamplingParams):
        return [params] * count
    if len(params) != count:
        raise InvalidRequestError(
            f"{len(params)} sampling parameters for {count} prompts; give one, or one for each"
        )
    return list(params)
