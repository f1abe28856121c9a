"""One replica: an engine's own state machine, and the pipeline its Steps run on.

`advance(now)` lets happen what is due by then; `next_s` says when something is. While the engine
only decodes, its next results are foreseen, and taken at once when their time is over or somebody
comes in (`engine/decode_run.py`); the same floats are added in the same order either way.

A sequence samples its own number, again and again: no two of them share a block by chance. Knows
nothing of routers or of why requests come.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import accumulate
from operator import add

from shoal.core.request import Output
from shoal.core.stats import EngineStats
from shoal.core.step import InstancesReady, RowResult, Step, StepFailure, StepResult
from shoal.engine.config import EngineConfig
from shoal.engine.decode_run import DecodeRun
from shoal.engine.events import (
    CompileGrammar,
    Effect,
    Emit,
    Event,
    KVEffect,
    RunStep,
    StepsDecoded,
    Submit,
    Tick,
)
from shoal.engine.prompt_ahead import PromptAhead
from shoal.engine.state import EngineState
from shoal.sim.cost import StepCost
from shoal.sim.pipeline import Pipeline, Work
from shoal.sim.records import ReplicaSample
from shoal.sim.voice import Report, Voice

Started = Callable[[int, float], None]
"""Told of a request's number when it goes into its first Step."""
HandOver = Callable[[KVEffect, float], None]
"""Told, and when."""

_SHORTEST_RUN = 4
_LONGEST_RUN = 128
"""Results foreseen at once: more would be in vain when somebody comes in before."""


@dataclass(frozen=True, slots=True)
class _Forecast:
    """When the next results come, the seconds of their Steps, and what of a prompt goes into the
    Step that follows each, if there is one."""

    run: DecodeRun
    times: list[float]
    seconds: list[float]
    chunks: list[int]


class SimulatedReplica:
    """
    Args:
        report: what it says, in order, perhaps a little later (`sim/voice.py`).
        runs: take runs of Steps at once.
        tells_late: then also tell what Steps one by one say at once, where that changes nothing.
        hand_over: told of KV that is lent or to be got.
    """

    def __init__(
        self,
        config: EngineConfig,
        cost: StepCost,
        report: Report,
        started: Started,
        hand_over: HandOver,
        *,
        runs: bool,
        tells_late: bool,
    ) -> None:
        self._config = config
        self._started, self._runs = started, runs
        self._voice = Voice(report, keeps=runs and tells_late)
        self._hand_over = hand_over
        self._state = EngineState(config)
        self._pipeline = Pipeline(config.routes, len(config.instance_blocks), cost)
        self._incarnation = 0
        self._forecast: _Forecast | None = None
        self._numbers: dict[str, int] = {}  # of requests, by id
        self._raced: set[str] = set()  # of those, whose next token is waited for
        self._results: dict[int, RowResult] = {}  # of a row that samples, by sequence
        self._stalls_until_s = self._result_s = -math.inf
        self._unheard: list[Event] = []  # what it was told while it stalls

    @property
    def next_s(self) -> float | None:
        """When `advance` is next worth a call."""
        if self._forecast is not None:
            return self._forecast.times[-1]
        step_s, deadline = self._pipeline.next_s, self._state.next_deadline()
        if step_s is None or deadline is None:
            when = deadline if step_s is None else step_s
        else:
            when = min(step_s, deadline)
        if self._unheard:
            return self._stalls_until_s
        return when if when is None else max(when, self._stalls_until_s)

    def stats(self) -> EngineStats:
        return self._state.stats()

    def sample(self, now: float) -> ReplicaSample:
        """How it stands, if all but a run that is foreseen has been taken; that goes on."""
        run, stats, stations = self._forecast, self._state.stats(), self._pipeline.stations
        seconds = () if run is None else run.seconds[: bisect_right(run.times, now)]
        num_blocks, num_tokens = stats.num_blocks_used, stats.output_tokens
        if run is not None:
            num_blocks += run.run.num_new_blocks(len(seconds))
            num_tokens += len(seconds) * len(run.run.lengths)
        return ReplicaSample(
            running=stats.num_running,
            waiting=stats.num_waiting,
            kv_share=num_blocks / stats.num_blocks,
            queued=tuple(len(station.queue) for station in stations),
            output_tokens=num_tokens,
            # As if each had been added when it ended: only one instance foresees any.
            busy_s=tuple(reduce(add, seconds, station.busy_s) for station in stations),
        )

    @property
    def busy_s(self) -> tuple[float, ...]:
        """Of each instance, in Steps that have ended."""
        return tuple(station.busy_s for station in self._pipeline.stations)

    def check_integrity(self) -> None:
        """For tests."""
        self._state.check_integrity()

    # --- what happens ---

    def advance(self, now: float) -> None:
        """Let happen what is due."""
        self._listen(now)
        self._catch_up(now)
        self._look_ahead()

    def catch_up(self, now: float) -> None:
        """The same, and what it has said is told."""
        due = self.next_s if self._forecast is None else self._forecast.times[0]
        if due is not None and due <= now:
            self.advance(now)
        self._voice.tell()

    def race(self, number: int | None, now: float) -> bool:
        """Another replica goes on with a request; if it is here, each token counts from now on."""
        raced = [name for name, each in self._numbers.items() if each == number]
        if raced:
            self._raced.update(raced)
            self.advance(now)
        return bool(raced)

    def stall(self, seconds: float, now: float) -> None:
        """It does nothing for so long, and then goes on."""
        self._listen(now)
        self._catch_up(now)
        self._pipeline.delay(seconds)
        self._stalls_until_s = max(self._stalls_until_s, now) + seconds
        self._look_ahead()

    def _listen(self, now: float) -> None:
        """To what it was told while it stalled, once that is over."""
        if now >= self._stalls_until_s:
            unheard, self._unheard = self._unheard, []
            for event in unheard:
                self.tell(event, self._stalls_until_s)

    def _catch_up(self, now: float) -> None:
        if now < self._stalls_until_s:
            return
        self._take_run(now)
        while (when := self._pipeline.next_s) is not None and when <= now:
            at, work = self._pipeline.step()
            if work is not None:
                is_back, self._result_s = self._result_s < self._stalls_until_s, at
                self._handle(self._result_of(work), at)
                if is_back:
                    self._voice.tell()
        deadline = self._state.next_deadline()
        if deadline is not None and deadline <= now:
            self._carry_out(self._state.handle(Tick(), now), (now,))

    def tell(self, event: Event, now: float) -> None:
        """Whatever is not a result; what was due before comes first."""
        self._listen(now)
        if now < self._stalls_until_s:
            self._unheard.append(event)
            return
        self._catch_up(now)
        if isinstance(event, Submit):
            seed = event.request.sampling.seed
            assert seed is not None, "a request's seed is its number"
            self._numbers[event.request.request_id] = seed
        self._handle(event, now)
        self._look_ahead()

    def slow_down(self, instance: int | None, speed: float, now: float) -> None:
        """From its next Step on; None: all instances."""
        self._catch_up(now)
        stations = self._pipeline.stations
        for station in stations if instance is None else [stations[instance]]:
            station.speed = speed
        self._look_ahead()

    def fail(self, instance: int, now: float) -> None:
        """An instance is lost, with its KV and all Steps in flight."""
        self._catch_up(now)
        self._forecast = None
        self._pipeline.clear()
        self._results.clear()
        failure = StepFailure(
            step_id=None,
            reason="simulated",
            incarnation=self._incarnation,
            lost=(instance,),
            down=(instance,),
        )
        self._incarnation += 1
        self._handle(failure, now)
        self._look_ahead()

    def restore(self, instance: int, now: float) -> None:
        """A lost instance is back, empty."""
        self.tell(InstancesReady((instance,)), now)

    # --- one thing at a time ---

    def _handle(self, event: Event, now: float) -> None:
        effects = self._state.handle(event, now)
        effects += self._state.handle(Tick(), now)
        self._carry_out(effects, (now,))

    def _carry_out(self, effects: Sequence[Effect], times: Sequence[float]) -> None:
        """
        Args:
            times: when the tokens came; Steps are handed out at the last one.
        """
        outputs, of_kv = list[Output](), list[KVEffect]()
        for effect in effects:
            if isinstance(effect, Emit):
                outputs.append(effect.output)
            elif isinstance(effect, RunStep):
                self._note_rows(effect.step, times[-1])
                self._pipeline.submit(effect.step, times[-1])
            else:
                assert not isinstance(effect, CompileGrammar), "no request has a grammar"
                of_kv.append(effect)
        self._tell_outputs(outputs, times)
        for each in of_kv:
            self._hand_over(each, times[-1])

    def _tell_outputs(self, outputs: list[Output], times: Sequence[float]) -> None:
        for output in outputs:
            if output.finish is not None:
                self._numbers.pop(output.request_id, None)
                self._raced.discard(output.request_id)
        if outputs:
            computed = self._state.tally.computed
            self._voice.say(outputs, times, computed, at_once=bool(self._raced))

    def _note_rows(self, step: Step, now: float) -> None:
        for sequence_id in step.released:
            self._results.pop(sequence_id, None)
        for row in step.rows:
            if row.start_state is not None:
                number = row.start_state.sampling.seed
                assert number is not None
                self._results[row.sequence_id] = RowResult(number)
                self._started(number, now)

    def _result_of(self, work: Work) -> StepResult:
        step, results = work.step, self._results
        rows = [results[row.sequence_id] if row.samples else _NOTHING for row in step.rows]
        return StepResult(
            step_id=step.step_id,
            rows=tuple(rows),
            incarnation=step.incarnation,
            compute_s=work.compute_s,
        )

    # --- runs of decode Steps ---

    def _look_ahead(self) -> None:
        self._forecast = None
        # Of the first result after a stall the router hears at once: others may have gone on.
        if not self._runs or self._raced or self._result_s < self._stalls_until_s:
            return
        run = self._state.decode_run()
        if run is not None and run.num_steps >= _SHORTEST_RUN:
            forecast = self._foresee(run)
            if len(forecast.times) >= _SHORTEST_RUN:
                self._forecast = forecast

    def _foresee(self, run: DecodeRun) -> _Forecast:
        """Of the Steps in flight, then of those that will follow them."""
        (station,) = self._pipeline.stations
        first_s = self._pipeline.next_s
        assert first_s is not None
        waiting = [self._pipeline.seconds(work.load, 0, 0) for work in station.queue]
        seconds, num_steps = [station.seconds, *waiting], min(run.num_steps, _LONGEST_RUN)
        chunks = list[int]()
        if run.prompt is None:
            seconds += self._pipeline.decodes(run.lengths, num_steps - len(seconds))
        else:
            chunks = self._foresee_chunks(run, run.prompt, num_steps, seconds)
            del seconds[len(chunks) :]  # of Steps that the last chunk may go into
        times = list(accumulate(seconds[1:], initial=first_s))
        return _Forecast(run, times, seconds, chunks)

    def _foresee_chunks(
        self, run: DecodeRun, prompt: PromptAhead, most: int, seconds: list[float]
    ) -> list[int]:
        """One for each result; what the Steps that hold them take is added."""
        chunks, lengths = list[int](), list(run.lengths)
        while len(chunks) < most:
            start = prompt.start
            chunk = prompt.next_chunk(seconds[len(chunks)])
            if chunk is None:
                break
            seconds.append(self._pipeline.mixed(lengths, start, chunk))
            chunks.append(chunk)
            lengths = [each + 1 for each in lengths]
        return chunks

    def _take_run(self, now: float) -> None:
        """Results of the run that came back by now, if there are enough to be taken at once."""
        forecast, self._forecast = self._forecast, None
        if forecast is None:
            return
        count = bisect_right(forecast.times, now)
        if count <= self._config.steps_per_route:
            return
        times, seconds = forecast.times[:count], forecast.seconds[:count]
        (station,) = self._pipeline.stations
        for each in seconds:
            station.busy_s += each
        self._pipeline.clear()
        token_ids = tuple(self._numbers[each] for each in forecast.run.request_ids)
        decoded = StepsDecoded(token_ids, tuple(seconds), tuple(forecast.chunks[:count]))
        effects = self._state.handle(decoded, times[-1])
        self._carry_out(effects, times)


_NOTHING = RowResult()
