"""The engine: requests in, Steps out, results in, tokens out. No I/O, no clock, no torch.

    Submit ──► NEW ──► WAITING ──► RUNNING ──► FINISHED
            (grammar)  ▲─ preempted ─┘

`handle(event, now)` returns effects. A driver feeds it every event it has, then a `Tick`,
upon which Steps are handed out until enough are in flight on every route. Results that overrun a
stop are discarded; when workers fail, sequences go on from what came back. Every request gets
exactly one Output with `finish`.
"""

from __future__ import annotations

from shoal.core.errors import (
    InvalidRequestError,
    QueueFullError,
    RequestError,
)
from shoal.core.kv import KVArrived
from shoal.core.request import ErrorInfo, FinishReason, GenerateRequest, Output, TokenLogprobs
from shoal.core.stats import EngineStats
from shoal.core.step import BLOCK_SIZE, InstancesReady, RowResult, StepFailure, StepResult, StepRow
from shoal.engine.config import EngineConfig
from shoal.engine.decode_run import DecodeRun, decoding_of, find_run, note_run, take_run
from shoal.engine.events import (
    Cancel,
    CompileGrammar,
    DrainInstance,
    Effect,
    Emit,
    EndLease,
    Event,
    GrammarFailed,
    GrammarReady,
    GrammarStarted,
    InstancesSlow,
    Lend,
    LendPrefix,
    Receive,
    RunStep,
    StepsDecoded,
    Submit,
    Tick,
)
from shoal.engine.flight import Flight
from shoal.engine.intake import already_over, grammar_failure, new_sequence, refuse_if_wrong
from shoal.engine.pace import CompletionPace
from shoal.engine.recovery import blame, recover
from shoal.engine.route_moves import RouteMoves
from shoal.engine.scheduler import Scheduler
from shoal.engine.sequence import GrammarMatcher, Sequence, Status
from shoal.engine.tally import Tally
from shoal.engine.time_limits import TimeLimits
from shoal.engine.transfers import Transfers
from shoal.policy.batching import Seats


class EngineState:
    """All that one replica knows of its requests.

    Attributes:
        tally: of Steps that came back.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._scheduler = Scheduler(config)
        self._sequences: dict[str, Sequence] = {}
        self._limits = TimeLimits(config.grammar_timeout_s)
        self._transfers = Transfers(config, self._scheduler)
        self._moves = RouteMoves(config, self._scheduler)
        self._flight = Flight(config)
        self._seats = Seats(config.batching, config.max_num_seqs)
        self._num_submitted = 0
        self._pace = CompletionPace()
        self._counters = {"prompt": 0, "cached": 0, "output": 0}
        self.tally = Tally()

    # --- seen from outside ---

    @property
    def num_unfinished(self) -> int:
        return len(self._sequences)

    @property
    def num_steps_in_flight(self) -> int:
        return len(self._flight)

    def next_deadline(self) -> float | None:
        """When a Tick is due even if nothing happens."""
        if not (self._limits or self._transfers or self._moves or self._seats.next_s):
            return None
        deadlines = (
            self._limits.next_deadline(),
            self._transfers.next_deadline(),
            self._moves.next_deadline(),
            self._seats.next_s,
        )
        return min((deadline for deadline in deadlines if deadline is not None), default=None)

    def stats(self) -> EngineStats:
        pools = self._scheduler.pools.of_instance
        fullest = min(pools, key=lambda pool: pool.num_free / pool.num_blocks)
        return EngineStats(
            num_running=len(self._scheduler.running),
            num_waiting=len(self._sequences) - len(self._scheduler.running),
            num_blocks=fullest.num_blocks,
            num_blocks_used=fullest.num_blocks - fullest.num_free,
            prompt_tokens=self._counters["prompt"],
            cached_tokens=self._counters["cached"],
            output_tokens=self._counters["output"],
            preemptions=self._scheduler.num_preemptions,
            computed=self.tally.computed,
            busy_s=self.tally.busy_s,
            recovering=bool(self._scheduler.places.down),
            route_moves=self._moves.num_moved,
            copied_tokens=self._moves.num_copied_tokens,
            instances=self._scheduler.places.stats(self._scheduler.running),
            slow=self._scheduler.places.slow,
        )

    def decode_run(self) -> DecodeRun | None:
        """Results that may be taken at once (`StepsDecoded`)."""
        if self._limits or self._transfers or self._seats.next_s:
            return None
        return find_run(self._config, self._scheduler, self._flight)

    def check_integrity(self) -> None:
        """Raises AssertionError if the books don't balance; for tests and idle time."""
        self._scheduler.check_integrity(
            lambda instance: [*self._transfers.held(instance), *self._moves.held(instance)]
        )
        known = {id(sequence) for sequence in self._sequences.values()}
        for sequence in [*self._scheduler.waiting, *self._scheduler.running]:
            assert id(sequence) in known
        if not (self._sequences or self._flight or self._transfers or self._moves):
            assert all(p.num_free == p.num_blocks for p in self._scheduler.pools.of_instance)

    # --- events ---

    def handle(self, event: Event, now: float) -> list[Effect]:
        match event:  # what comes with every Step first
            case Tick():
                effects = self._transfers.expire(now)
                for late, error in self._limits.late(now):
                    effects += self._end(late, "error", now, error)
                effects += self._moves.advance(now)
                return [*effects, *self._hand_out(now), *self._transfers.loans.grow()]
            case StepResult():
                return self._step_done(event, now)
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
            case StepFailure():
                return self._step_failed(event, now)
            case StepsDecoded():
                return self._steps_decoded(event)
            case InstancesReady(instances):
                return self._instances_ready(instances)
            case Lend(lease_id, request_id, ttl_s, ahead):
                sequence = self._sequences.get(request_id)
                return self._transfers.loans.lend(lease_id, sequence, now + ttl_s, ahead=ahead)
            case LendPrefix(lease_id, names, ttl_s):
                return self._transfers.loans.lend_prefix(lease_id, names, now + ttl_s)
            case EndLease(lease_id):
                return self._transfers.loans.end(lease_id)
            case Receive(offer, ttl_s):
                return self._transfers.receive(offer, now + ttl_s)
            case KVArrived():
                return [*self._moves.arrived(event), *self._transfers.arrived(event)]
            case DrainInstance(instance, is_drained):
                self._moves.drain(instance, is_drained)
                return []
            case InstancesSlow(times):
                self._scheduler.places.slow_down(times)
                return []

    def _submit(self, request: GenerateRequest, now: float) -> list[Effect]:
        try:
            refuse_if_wrong(request, self._config)
            self._refuse_if_no_room(request)
        except RequestError as error:
            return [_refusal(request.request_id, error)]
        self._num_submitted += 1
        sequence = new_sequence(request, self._config, arrival=self._num_submitted, now=now)
        self._sequences[request.request_id] = sequence
        if sequence.deadline is not None:
            self._limits.follow(sequence)
        self._counters["prompt"] += sequence.prompt_len
        if (reason := already_over(sequence)) is not None:
            return self._end(sequence, reason, now)
        if request.sampling.grammar is None:
            self._scheduler.add(sequence)
            return []
        return [CompileGrammar(request.request_id, request.sampling.grammar, request.output_ids)]

    def _grammar_started(self, request_id: str, now: float) -> list[Effect]:
        """Only now does its time run: others may have been compiled before it."""
        if (sequence := self._sequences.get(request_id)) is not None:
            sequence.matcher_deadline = now + self._config.grammar_timeout_s
            self._limits.follow(sequence)
        return []

    def _grammar_ready(self, request_id: str, matcher: GrammarMatcher, now: float) -> list[Effect]:
        sequence = self._sequences.get(request_id)
        if sequence is None or sequence.status is not Status.NEW:
            return []
        sequence.matcher = matcher
        try:
            sequence.follow_grammar()
        except Exception as error:  # noqa: BLE001 - a library's failure ends one request only
            return self._end(sequence, "error", now, grammar_failure(error))
        self._scheduler.add(sequence)
        return []

    def _step_done(self, result: StepResult, now: float) -> list[Effect]:
        if result.incarnation != self._flight.incarnation:
            return []
        batch = self._flight.take(result)
        self._scheduler.chunks.took(batch, result.compute_s)
        self.tally.note([batch.prompts], [result.compute_s])
        effects: list[Effect] = []
        for (sequence, row), row_result in zip(batch.rows, result.rows, strict=True):
            self._scheduler.note_returned(sequence, row)
            if sequence.status is not Status.FINISHED:
                effects += self._take_row(sequence, row, row_result, now)
        return effects

    def _steps_decoded(self, run: StepsDecoded) -> list[Effect]:
        num_steps, decoding = len(run.compute_s), decoding_of(self._scheduler)
        note_run(self._scheduler, self._flight, self.tally, run)
        steps = take_run(self._scheduler, self._flight, run)
        self._counters["output"] += num_steps * len(decoding)
        outputs = (
            Output(request_id=each.request.request_id, token_ids=(token_id,) * num_steps)
            for each, token_id in zip(decoding, run.token_ids, strict=True)
        )
        return [*map(Emit, outputs), *map(RunStep, steps)]

    def _step_failed(self, failure: StepFailure, now: float) -> list[Effect]:
        """Abandon everything in flight; its requests go on from what they have."""
        if failure.incarnation != self._flight.incarnation:
            return []
        abandoned, self._scheduler.has_suspects = self._flight.abandon(), True
        blame(self._scheduler, abandoned, failure, now)
        self._scheduler.places.down.update(failure.down)
        everywhere = range(len(self._config.instance_blocks))
        recover(self._scheduler, abandoned, everywhere if failure.lost is None else failure.lost)
        effects = [*self._transfers.end_all(), *self._moves.end_all()]
        for sequence in list(self._sequences.values()):
            if sequence.num_failures > self._config.max_step_failures:
                error = RequestError(f"the model failed on this request: {failure.reason}")
                effects += self._end(sequence, "error", now, ErrorInfo.of(error))
        return effects

    def _instances_ready(self, instances: tuple[int, ...]) -> list[Effect]:
        self._scheduler.places.down.difference_update(instances)
        self._scheduler.leave_unusable()
        self._moves.look_soon()
        return []

    def _hand_out(self, now: float) -> list[Effect]:
        """A Step for each route in turn, until none has room or rows."""
        effects: list[Effect] = []
        scheduler, flight, before = self._scheduler, self._flight, -1
        scheduler.max_running = self._seats.open(
            self._num_submitted, len(scheduler.running), len(scheduler.waiting), now
        )
        while (progress := flight.next_step_id + scheduler.num_admissions) != before:
            before = progress
            for route in scheduler.routes():
                if not flight.has_room(route):
                    continue
                batch = scheduler.fill(route, flight.next_step_id)
                if batch.rows:
                    effects.append(RunStep(flight.hand_out(batch, scheduler.take_released())))
        return effects

    # --- one request ---

    def _refuse_if_no_room(self, request: GenerateRequest) -> None:
        if request.request_id in self._sequences:
            raise InvalidRequestError(
                f"request id {request.request_id!r} is in use", code="duplicate_request_id"
            )
        if len(self._sequences) >= self._config.max_num_seqs + self._config.max_waiting:
            raise QueueFullError(
                f"{len(self._sequences)} requests are running or waiting, which is the limit; "
                f"try again later",
                code="queue_full",
                retry_after_s=self._pace.seconds_per_completion(),
            )

    def _take_row(
        self, sequence: Sequence, row: StepRow, result: RowResult, now: float
    ) -> list[Effect]:
        if result.prompt_logprobs:
            sequence.add_prompt_logprobs(row, result.prompt_logprobs)
        if not row.samples:
            return []
        sequence.num_failures = sequence.num_losses = 0
        assert result.token_id is not None
        sequence.num_pending -= 1
        sequence.token_ids.append(result.token_id)
        if len(sequence.token_ids) % BLOCK_SIZE == 0:
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
            return "error", grammar_failure(error)

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
        self._limits.forget(sequence.request.request_id)
        self._scheduler.remove(sequence)
        self._pace.note_completion(now)


def _refusal(request_id: str, error: RequestError) -> Effect:
    return Emit(Output(request_id=request_id, finish="error", error=ErrorInfo.of(error)))
