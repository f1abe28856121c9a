"""The engine: requests in, Steps out, results in, tokens out. No I/O, no clock, no torch.

    Submit ──► NEW ──► WAITING ──► RUNNING ──► FINISHED
            (grammar)  ▲─ preempted ─┘

`handle(event, now)` returns effects. A driver feeds it every event it has, then a `Tick`,
upon which Steps are handed out until `max_steps_in_flight` are. Results come back in order;
those that overrun a stop are discarded. Every request gets exactly one Output with `finish`.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from shoal.core.errors import (
    InvalidRequestError,
    QueueFullError,
    RequestError,
    RequestTimeoutError,
)
from shoal.core.request import ErrorInfo, FinishReason, GenerateRequest, Output, TokenLogprobs
from shoal.core.stats import EngineStats
from shoal.core.step import RowResult, Step, StepFailure, StepResult, StepRow
from shoal.engine.blocks import root_name
from shoal.engine.config import EngineConfig
from shoal.engine.events import (
    Cancel,
    CompileGrammar,
    Effect,
    Emit,
    Event,
    GrammarFailed,
    GrammarReady,
    GrammarStarted,
    RunStep,
    Submit,
    Tick,
)
from shoal.engine.pace import CompletionPace
from shoal.engine.scheduler import Rows, Scheduler
from shoal.engine.sequence import GrammarMatcher, Sequence, Status


@dataclass(frozen=True, slots=True)
class _InFlight:
    step_id: int
    rows: Rows


class EngineState:
    """All that one replica knows of its requests."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._scheduler = Scheduler(config)
        self._sequences: dict[str, Sequence] = {}
        # Those that time alone may end: looked at with every Tick, so not all of them.
        self._timed: dict[str, Sequence] = {}
        self._in_flight: deque[_InFlight] = deque()
        self._released: list[int] = []
        self._incarnation = 0
        self._next_step_id = 0
        self._num_submitted = 0
        self._pace = CompletionPace()
        self._counters = {"prompt": 0, "cached": 0, "output": 0, "steps": 0}
        self._busy_s = 0.0

    # --- seen from outside ---

    @property
    def num_unfinished(self) -> int:
        return len(self._sequences)

    @property
    def num_steps_in_flight(self) -> int:
        return len(self._in_flight)

    def next_deadline(self) -> float | None:
        """When a Tick is due even if nothing happens."""
        deadlines = (sequence.next_deadline for sequence in self._timed.values())
        return min((deadline for deadline in deadlines if deadline is not None), default=None)

    def stats(self) -> EngineStats:
        pool = self._scheduler.pool
        return EngineStats(
            num_running=len(self._scheduler.running),
            num_waiting=len(self._sequences) - len(self._scheduler.running),
            num_blocks=pool.num_blocks,
            num_blocks_used=pool.num_blocks - pool.num_free,
            prompt_tokens=self._counters["prompt"],
            cached_tokens=self._counters["cached"],
            output_tokens=self._counters["output"],
            preemptions=self._scheduler.num_preemptions,
            steps=self._counters["steps"],
            busy_s=self._busy_s,
        )

    def check_integrity(self) -> None:
        """Raises AssertionError if the books don't balance; for tests and idle time."""
        self._scheduler.check_integrity()
        known = {id(sequence) for sequence in self._sequences.values()}
        for sequence in [*self._scheduler.waiting, *self._scheduler.running]:
            assert id(sequence) in known
        if not self._sequences and not self._in_flight:
            assert self._scheduler.pool.num_free == self._config.num_blocks

    # --- events ---

    def handle(self, event: Event, now: float) -> list[Effect]:
        match event:
            case Submit(request):
                return self._submit(request, now)
            case Cancel(request_id):
                return self._end_by_id(request_id, "cancelled", now)
            case GrammarStarted(request_id):
                return self._grammar_started(request_id, now)
            case GrammarReady(request_id, matcher):
                return self._grammar_ready(request_id, matcher, now)
            case GrammarFailed(request_id, error):
                return self._end_by_id(request_id, "error", now, error)
            case StepResult():
                return self._step_done(event, now)
            case StepFailure():
                return self._step_failed(event, now)
            case Tick():
                return [*self._expire(now), *self._hand_out()]

    def _submit(self, request: GenerateRequest, now: float) -> list[Effect]:
        try:
            self._refuse_if_wrong(request)
        except RequestError as error:
            return [_refusal(request.request_id, error)]
        sequence = self._new_sequence(request, now)
        self._sequences[request.request_id] = sequence
        if sequence.deadline is not None:
            self._timed[request.request_id] = sequence
        self._counters["prompt"] += sequence.prompt_len
        if (reason := _already_over(sequence)) is not None:
            return self._end(sequence, reason, now)
        if request.sampling.grammar is None:
            self._scheduler.add(sequence)
            return []
        self._timed[request.request_id] = sequence
        return [CompileGrammar(request.request_id, request.sampling.grammar, request.output_ids)]

    def _grammar_started(self, request_id: str, now: float) -> list[Effect]:
        """Only now does its time run: others may have been compiled before it."""
        if (sequence := self._sequences.get(request_id)) is not None:
            sequence.matcher_deadline = now + self._config.grammar_timeout_s
        return []

    def _grammar_ready(self, request_id: str, matcher: GrammarMatcher, now: float) -> list[Effect]:
        sequence = self._sequences.get(request_id)
        if sequence is None or sequence.status is not Status.NEW:
            return []
        sequence.matcher = matcher
        try:
            sequence.follow_grammar()
        except Exception as error:  # noqa: BLE001 - a library's failure ends one request only
            return self._end(sequence, "error", now, _grammar_failure(error))
        self._scheduler.add(sequence)
        return []

    def _step_done(self, result: StepResult, now: float) -> list[Effect]:
        if result.incarnation != self._incarnation:
            return []
        step = self._in_flight.popleft()
        assert step.step_id == result.step_id, "workers return Steps in order"
        self._counters["steps"] += 1
        self._busy_s += result.compute_s
        effects: list[Effect] = []
        for (sequence, row), row_result in zip(step.rows, result.rows, strict=True):
            self._scheduler.note_returned(sequence)
            if sequence.status is Status.FINISHED:
                self._note_gone(sequence)
            else:
                effects += self._take_row(sequence, row, row_result, now)
        return effects

    def _step_failed(self, failure: StepFailure, now: float) -> list[Effect]:
        """Abandon everything in flight; its requests go on from what they have."""
        if failure.incarnation != self._incarnation:
            return []
        self._incarnation += 1
        self._next_step_id = 0
        self._released.clear()
        abandoned, self._in_flight = self._in_flight, deque()
        effects: list[Effect] = []
        for step in abandoned:
            for sequence, _row in step.rows:
                sequence.num_pending = 0
                sequence.num_failures += step.step_id == failure.step_id
                sequence.ever_sent = False
                self._scheduler.note_returned(sequence)
        self._scheduler.restart()
        for sequence in list(self._sequences.values()):
            if sequence.num_failures > self._config.max_step_failures:
                error = RequestError(f"the model failed on this request: {failure.reason}")
                effects += self._end(sequence, "error", now, ErrorInfo.of(error))
        return effects

    def _expire(self, now: float) -> list[Effect]:
        effects: list[Effect] = []
        for sequence in list(self._timed.values()):
            if sequence.deadline is not None and now >= sequence.deadline:
                error: RequestError = RequestTimeoutError(
                    f"the request ran past its limit of {sequence.request.timeout_s:g} s with "
                    f"{sequence.num_output} tokens produced; raise the limit or lower max_tokens",
                    code="timeout",
                )
            elif (due := sequence.next_deadline) is not None and now >= due:
                error = InvalidRequestError(
                    f"the schema took more than {self._config.grammar_timeout_s:g} s to compile; "
                    f"simplify it",
                    code="grammar_timeout",
                    param="response_format",
                )
            else:
                continue
            effects += self._end(sequence, "error", now, ErrorInfo.of(error))
        return effects

    def _hand_out(self) -> list[Effect]:
        effects: list[Effect] = []
        while len(self._in_flight) < self._config.max_steps_in_flight:
            rows = self._scheduler.fill(self._next_step_id)
            if not rows:
                break
            step = Step(
                step_id=self._next_step_id,
                incarnation=self._incarnation,
                rows=tuple(row for _, row in rows),
                released=tuple(self._released),
            )
            self._released.clear()
            self._next_step_id += 1
            self._in_flight.append(_InFlight(step.step_id, rows))
            effects.append(RunStep(step))
        return effects

    # --- one request ---

    def _refuse_if_wrong(self, request: GenerateRequest) -> None:
        config = self._config
        if request.request_id in self._sequences:
            raise InvalidRequestError(
                f"request id {request.request_id!r} is in use", code="duplicate_request_id"
            )
        if not request.prompt_ids:
            raise InvalidRequestError(
                "the prompt is empty; it needs at least one token",
                code="empty_prompt",
                param="prompt",
            )
        if len(request.prompt_ids) >= config.max_model_len:
            raise InvalidRequestError(
                f"the prompt has {len(request.prompt_ids)} tokens; this model's context is "
                f"{config.max_model_len} tokens, prompt and output together; shorten the prompt",
                code="context_length_exceeded",
                param="prompt",
            )
        if len(self._sequences) >= config.max_num_seqs + config.max_waiting:
            raise QueueFullError(
                f"{len(self._sequences)} requests are running or waiting, which is the limit; "
                f"try again later",
                code="queue_full",
                retry_after_s=self._pace.seconds_per_completion(),
            )
        token_ids = (*request.prompt_ids, *request.output_ids)
        if min(token_ids) < 0 or max(token_ids) >= config.vocab_size:
            raise InvalidRequestError(
                f"token ids lie between {min(token_ids)} and {max(token_ids)}; this model's "
                f"vocabulary is 0 to {config.vocab_size - 1}",
                code="invalid_token_id",
                param="prompt",
            )

    def _new_sequence(self, request: GenerateRequest, now: float) -> Sequence:
        config = self._config
        max_tokens = request.sampling.max_tokens or config.max_model_len
        self._num_submitted += 1
        return Sequence(
            request,
            sequence_id=self._num_submitted,
            now=now,
            max_len=min(len(request.prompt_ids) + max_tokens, config.max_model_len),
            eos_token_ids=config.eos_token_ids,
            root=root_name(config.model_digest, request.salt),
        )

    def _take_row(
        self, sequence: Sequence, row: StepRow, result: RowResult, now: float
    ) -> list[Effect]:
        if result.prompt_logprobs:
            sequence.add_prompt_logprobs(row, result.prompt_logprobs)
        if not row.samples:
            return []
        sequence.num_failures = 0
        assert result.token_id is not None
        sequence.num_pending -= 1
        sequence.token_ids.append(result.token_id)
        self._scheduler.publish(sequence)
        self._counters["output"] += 1
        finish, error = self._verdict(sequence, result.token_id)
        effect = self._news(sequence, result.token_id, result.logprobs, finish, error)
        if finish is not None:
            self._retire(sequence, now)
        return [effect]

    def _verdict(
        self, sequence: Sequence, token_id: int
    ) -> tuple[FinishReason | None, ErrorInfo | None]:
        """Whether this token is the sequence's last, and why."""
        if sequence.stops_at(token_id):
            return "stop", None
        if len(sequence.token_ids) >= sequence.max_len:
            return "length", None
        try:
            return (None if sequence.follow_grammar(token_id) else "stop"), None
        except Exception as error:  # noqa: BLE001 - a library's failure ends one request only
            return "error", _grammar_failure(error)

    def _news(
        self,
        sequence: Sequence,
        token_id: int,
        logprobs: TokenLogprobs | None,
        finish: FinishReason | None,
        error: ErrorInfo | None,
    ) -> Effect:
        first = sequence.num_output == 1 + len(sequence.request.output_ids)
        if first:
            self._counters["cached"] += sequence.num_cached_tokens or 0
        output = Output(
            request_id=sequence.request.request_id,
            token_ids=(token_id,),
            logprobs=() if logprobs is None else (logprobs,),
            prompt_logprobs=sequence.take_prompt_logprobs(),
            finish=finish,
            stop_token_id=token_id if finish == "stop" else None,
            error=error,
            num_cached_tokens=sequence.num_cached_tokens if first else None,
        )
        return Emit(output)

    def _end_by_id(
        self, request_id: str, finish: FinishReason, now: float, error: ErrorInfo | None = None
    ) -> list[Effect]:
        sequence = self._sequences.get(request_id)
        return [] if sequence is None else self._end(sequence, finish, now, error)

    def _end(
        self, sequence: Sequence, finish: FinishReason, now: float, error: ErrorInfo | None = None
    ) -> list[Effect]:
        self._retire(sequence, now)
        request_id = sequence.request.request_id
        return [Emit(Output(request_id=request_id, finish=finish, error=error))]

    def _retire(self, sequence: Sequence, now: float) -> None:
        del self._sequences[sequence.request.request_id]
        self._timed.pop(sequence.request.request_id, None)
        self._scheduler.remove(sequence)
        self._pace.note_completion(now)
        self._note_gone(sequence)

    def _note_gone(self, sequence: Sequence) -> None:
        if sequence.in_flight == 0 and sequence.ever_sent:
            self._released.append(sequence.sequence_id)


def _already_over(sequence: Sequence) -> FinishReason | None:
    """Whether a continued request had already reached its end when it was cut."""
    if sequence.num_output and sequence.stops_at(sequence.token_ids[-1]):
        return "stop"
    return "length" if len(sequence.token_ids) >= sequence.max_len else None


def _grammar_failure(error: Exception) -> ErrorInfo:
    if isinstance(error, RequestError):
        return ErrorInfo.of(error)
    return ErrorInfo.of(RequestError(f"following the schema failed: {error}"))


def _refusal(request_id: str, error: RequestError) -> Effect:
    return Emit(Output(request_id=request_id, finish="error", error=ErrorInfo.of(error)))
