"""One completion on its way: the engine's outputs in, text out, for a caller that waits.

Knows nothing of engines or prompts; whoever made the request gives it an inbox.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from queue import SimpleQueue

from shoal.core.clock import Clock
from shoal.core.request import GenerateRequest, Output, TokenLogprobs
from shoal.text.text_stream import TextStream


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


class CompletionStream:
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
                self.cancel()

    def cancel(self) -> None:
        """Let the engine drop it; nothing happens if it has ended."""
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
                self.cancel()
            finish = "stop"
        elif output.stop_token_id in self._request.sampling.stop_token_ids:
            self._stop_reason = output.stop_token_id
        return Chunk(text, output.token_ids[: delta.num_tokens], finish)
