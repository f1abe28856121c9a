"""The offline Python API.

    with LLM("smollm2-135m") as llm:
        (completion,) = llm.generate("The capital of France is", SamplingParams(max_tokens=8))
        print(completion.text)

The engine runs in a thread of this process; detokenising happens in the caller's.
"""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from queue import SimpleQueue
from typing import Any

from shoal.assembly import Progress, Say, load_engine
from shoal.core.clock import Clock, MonotonicClock
from shoal.core.errors import InvalidRequestError
from shoal.core.options import EngineOptions
from shoal.core.request import (
    GenerateRequest,
    Output,
    SamplingParams,
    TokenLogprobs,
    seed_of_choice,
)
from shoal.core.stats import EngineStats
from shoal.engine.events import Cancel, Submit
from shoal.model.generation_config import read_default_sampling
from shoal.model.store import resolve
from shoal.text.text_stream import TextStream
from shoal.text.tokenizer import Tokenizer, load_tokenizer

Messages = Sequence[Mapping[str, Any]]

_NO_LIMIT = 1 << 31


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of one streamed completion; the last has `finish_reason`."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One of a prompt's `n` completions.

    Attributes:
        token_ids: all output tokens, a stop token among them.
        finish_reason: "stop" or "length".
        stop_reason: the stop string or token id that ended it; None for EOS or length.
        ttft_s, latency_s: from submission to the first and to the last token.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    stop_reason: str | int | None
    logprobs: tuple[TokenLogprobs, ...]
    prompt_logprobs: tuple[TokenLogprobs, ...]
    num_cached_tokens: int
    ttft_s: float
    latency_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What a prompt gave; the attributes of the first choice are at hand."""

    prompt_ids: tuple[int, ...]
    choices: tuple[Choice, ...]

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.choices[0].token_ids

    @property
    def finish_reason(self) -> str:
        return self.choices[0].finish_reason


class LLM:
    """One model on one device, in this process.

    Args:
        model: a catalogue name, a local folder, a .gguf file or a Hugging Face id.
        options: further `EngineOptions` by name (dtype, device, max_model_len, ...).
        say: takes lines about loading; silent by default.
    """

    def __init__(
        self,
        model: str = "smollm2-135m",
        *,
        revision: str | None = None,
        token: str | None = None,
        chat_template: str | None = None,
        say: Say = lambda line: None,
        progress: Progress = lambda done, total: None,
        **options: Any,
    ) -> None:
        resolved = resolve(model, revision=revision, token=token, progress=progress)
        # What the model's makers recommend, and an end that comes in reasonable time.
        self._default_params = SamplingParams(
            **{"max_tokens": 256, **read_default_sampling(resolved.path)}
        )
        self._tokenizer = load_tokenizer(resolved.path, chat_template=chat_template)
        self._inboxes: dict[str, SimpleQueue[Output]] = {}
        self._ids = itertools.count()
        self._rng = random.SystemRandom()
        self._clock = MonotonicClock()
        self._stats = EngineStats()
        engine_options = EngineOptions(
            model_path=str(resolved.path),
            fingerprint=resolved.fingerprint,
            **{"max_waiting": _NO_LIMIT, **options},
        )
        self._engine = load_engine(engine_options, self._report, say=say, progress=progress)
        self._thread = threading.Thread(
            target=self._engine.loop.run, name="shoal-engine", daemon=True
        )
        self._thread.start()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the engine and free the device."""
        self._engine.loop.stop()
        self._thread.join()
        self._engine.executor.close()

    @property
    def tokenizer(self) -> Tokenizer:
        return self._tokenizer

    @property
    def stats(self) -> EngineStats:
        """What the engine last said of itself."""
        return self._stats

    @property
    def max_model_len(self) -> int:
        return self._engine.info.max_model_len

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
        committed = output_ids or [()] * len(prompt_ids)
        started = [
            self._start(ids, sampling, tuple(done))
            for ids, sampling, done in zip(prompt_ids, each, committed, strict=True)
        ]
        return [
            Completion(prompt_ids=ids, choices=tuple(stream.result() for stream in streams))
            for ids, streams in zip(prompt_ids, started, strict=True)
        ]

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Completion]:
        """Answer one conversation, or several at once."""
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
        return tuple(prompt)

    def _start(
        self, prompt_ids: tuple[int, ...], params: SamplingParams, output_ids: tuple[int, ...]
    ) -> list[_Stream]:
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

    def _submit(self, request: GenerateRequest, index: int) -> _Stream:
        inbox: SimpleQueue[Output] = SimpleQueue()
        self._inboxes[request.request_id] = inbox
        self._engine.loop.post(Submit(request))
        text = TextStream(self._tokenizer, request.sampling, request.prompt_ids, request.output_ids)
        return _Stream(request, index, inbox, text, self._cancel, self._clock)

    def _report(self, outputs: list[Output], stats: EngineStats) -> None:
        self._stats = stats
        for output in outputs:
            inbox = self._inboxes.get(output.request_id)
            if inbox is not None:
                inbox.put(output)
            if output.finish is not None:
                self._inboxes.pop(output.request_id, None)

    def _cancel(self, request_id: str) -> None:
        self._inboxes.pop(request_id, None)
        self._engine.loop.post(Cancel(request_id))


class _Stream:
    """One sequence on its way: engine outputs in, text out."""

    def __init__(
        self,
        request: GenerateRequest,
        index: int,
        inbox: SimpleQueue[Output],
        text: TextStream,
        cancel: Callable[[str], None],
        clock: Clock,
    ) -> None:
        self._request = request
        self._index = index
        self._inbox = inbox
        self._text = text
        self._cancel = cancel
        self._clock = clock
        self._submitted_s = clock.now()
        self._ttft_s = 0.0
        self._outputs: list[Output] = []
        self._stop_reason: str | int | None = None

    def chunks(self) -> Iterator[Chunk]:
        """Chunks until the end; leaving early cancels the request.

        Raises:
            RequestError: the request was refused or failed.
        """
        finished = False
        try:
            while not finished:
                chunk = self._take(self._inbox.get())
                finished = chunk.finish_reason is not None
                yield chunk
        finally:
            if not finished:
                self._cancel(self._request.request_id)

    def result(self) -> Choice:
        """Wait for the whole of it."""
        chunks = list(self.chunks())
        first = self._outputs[0]
        return Choice(
            index=self._index,
            text="".join(chunk.text for chunk in chunks),
            token_ids=tuple(token for chunk in chunks for token in chunk.token_ids),
            finish_reason=chunks[-1].finish_reason or "",
            stop_reason=self._stop_reason,
            logprobs=tuple(entry for output in self._outputs for entry in output.logprobs),
            prompt_logprobs=first.prompt_logprobs,
            num_cached_tokens=first.num_cached_tokens or 0,
            ttft_s=self._ttft_s,
            latency_s=self._clock.now() - self._submitted_s,
        )

    def _take(self, output: Output) -> Chunk:
        if output.error is not None:
            raise output.error.to_exception()
        if not self._outputs:
            self._ttft_s = self._clock.now() - self._submitted_s
        delta = self._text.push(output.token_ids, stop_token=output.finish == "stop")
        self._outputs.append(replace(output, logprobs=output.logprobs[: delta.num_tokens]))
        text, stop, finish = delta.text, delta.stop, output.finish
        if finish is not None and stop is None:
            last = self._text.finish()
            text, stop = text + last.text, last.stop
        if stop is not None:
            self._stop_reason = stop
            if finish is None:
                self._cancel(self._request.request_id)
            finish = "stop"
        elif output.stop_token_id in self._request.sampling.stop_token_ids:
            self._stop_reason = output.stop_token_id
        return Chunk(text, output.token_ids[: delta.num_tokens], finish)


def _as_list(prompts: Any) -> list[Any]:
    """One prompt (a text, or token ids) or several."""
    if isinstance(prompts, str) or (len(prompts) and isinstance(prompts[0], int)):
        return [prompts]
    return list(prompts)


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
