"""The live driver of `EngineState`: one thread, one queue, one executor.

Whatever happens (a request, a result, a compiled grammar) is posted to the queue from any
thread; the loop handles all that is there, ticks, and carries out the effects. Nothing here
waits for anything but the queue. Knows nothing of where workers or clients are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Executor as ThreadPool
from queue import Empty, SimpleQueue

from shoal.core.clock import Clock
from shoal.core.errors import RequestError
from shoal.core.record import Recorder
from shoal.core.request import ErrorInfo, Grammar, Output
from shoal.core.stats import EngineStats
from shoal.core.step import StepFailure, StepResult
from shoal.engine.carrier import KVCarrier
from shoal.engine.events import (
    CompileGrammar,
    Effect,
    Emit,
    Event,
    GrammarFailed,
    GrammarReady,
    GrammarStarted,
    RunStep,
    Tick,
)
from shoal.engine.sequence import GrammarMatcher
from shoal.engine.state import EngineState
from shoal.executor import Executor

log = logging.getLogger(__name__)

Compile = Callable[[Grammar, tuple[int, ...]], GrammarMatcher]
Report = Callable[[list[Output], EngineStats], None]

HEARTBEAT_S = 1.0
MAX_FAILURES_IN_A_ROW = 20


class EngineLoop:
    """Drives one engine until `stop`.

    Args:
        state: the engine.
        executor: where its Steps run; told to post its results here.
        compile_grammar: makes a matcher; runs on `threads`, may raise RequestError.
        threads: a small pool for compiling.
        report: told of new outputs, and at least every `HEARTBEAT_S` of the stats; it is
            called from the loop's thread and must not block.
        carrier: of KV, between this engine and others; None: there are no others.
        recorder: told of every event and what was decided.
    """

    def __init__(
        self,
        state: EngineState,
        executor: Executor,
        *,
        compile_grammar: Compile,
        threads: ThreadPool,
        report: Report,
        clock: Clock,
        carrier: KVCarrier | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        self._state = state
        self._executor = executor
        self._compile_grammar = compile_grammar
        self._threads = threads
        self._report = report
        self._clock = clock
        self._carrier = carrier
        self._recorder = recorder
        self._events: SimpleQueue[Event | None] = SimpleQueue()
        self._failures_in_a_row = 0
        executor.listen(self.post)

    def post(self, event: Event) -> None:
        """Tell the engine something; from any thread."""
        self._events.put(event)

    def stop(self) -> None:
        """Let `run` return; what is unfinished is dropped."""
        self._events.put(None)

    def run(self) -> None:
        """Handle events until `stop`, or until the device fails at everything."""
        while True:
            events, stopping = self._wait()
            if stopping or self._device_is_lost(events):
                return
            now = self._clock.now()
            effects: list[Effect] = []
            for event in [*events, Tick()]:
                decided = self._state.handle(event, now)
                if self._recorder is not None:
                    self._recorder.note(now, event, decided)
                effects += decided
            self._carry_out(effects)

    def _wait(self) -> tuple[list[Event], bool]:
        """All events that are there; at least one, unless a deadline or heartbeat is due."""
        timeout_s = HEARTBEAT_S
        deadline = self._state.next_deadline()
        if deadline is not None:
            timeout_s = min(timeout_s, max(deadline - self._clock.now(), 0.0))
        events: list[Event] = []
        try:
            event = self._events.get(timeout=timeout_s)
            while event is not None:
                events.append(event)
                event = self._events.get_nowait()
        except Empty:
            return events, False
        return events, True

    def _device_is_lost(self, events: list[Event]) -> bool:
        """After some device errors nothing works again but a new process.

        Workers that are started again are not such errors: their executor counts them.
        """
        for event in events:
            if isinstance(event, StepFailure):
                self._failures_in_a_row += not event.down
            elif isinstance(event, StepResult):
                self._failures_in_a_row = 0
        if self._failures_in_a_row < MAX_FAILURES_IN_A_ROW:
            return False
        log.critical("%d Steps in a row failed: giving up", self._failures_in_a_row)
        return True

    def _carry_out(self, effects: list[Effect]) -> None:
        outputs: list[Output] = []
        for effect in effects:
            match effect:
                case RunStep(step):
                    self._executor.submit(step)
                case Emit(output):
                    outputs.append(output)
                case CompileGrammar():
                    self._threads.submit(self._compile, effect)
                case _:
                    assert self._carrier is not None, "only who has a carrier is asked for KV"
                    self._carrier.carry_out(effect)
        self._report(outputs, self._state.stats())

    def _compile(self, wanted: CompileGrammar) -> None:
        self.post(GrammarStarted(wanted.request_id))
        try:
            matcher = self._compile_grammar(wanted.grammar, wanted.prefix_ids)
        except RequestError as error:
            self.post(GrammarFailed(wanted.request_id, ErrorInfo.of(error)))
        except Exception as error:
            # A request must end even if the grammar library breaks in a new way.
            log.exception("compiling a grammar failed")
            failure = RequestError(f"the schema could not be compiled: {error}")
            self.post(GrammarFailed(wanted.request_id, ErrorInfo.of(failure)))
        else:
            self.post(GrammarReady(wanted.request_id, matcher))
