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
from itertools import accumulate

from shoal.core.request import Output
from shoal.core.stats import Computed, EngineStats
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
from shoal.engine.state import EngineState
from shoal.sim.cost import StepCost
from shoal.sim.pipeline import Pipeline, Work

Report = Callable[[list[Output], Sequence[float], Computed], None]
"""Told of outputs, and when each of their tokens came."""
Started = Callable[[int, float], None]
"""Told of a request's number when it goes into its first Step."""
HandOver = Callable[[KVEffect, float], None]
"""Told, and when."""

_SHORTEST_RUN = 4
_LONGEST_RUN = 128
"""Results foreseen at once: more would be in vain when somebody comes in before."""


@dataclass(frozen=True, slots=True)
class _Forecast:
    """When the next results come, and the seconds of their Steps."""

    run: DecodeRun
    times: list[float]
    seconds: list[float]


class SimulatedReplica:
    """
    Args:
        runs: take runs of decode Steps at once.
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
    ) -> None:
        self._config = config
        self._report, self._started, self._runs = report, started, runs
        self._hand_over = hand_over
        self._state = EngineState(config)
        self._pipeline = Pipeline(config.routes, len(config.instance_blocks), cost)
        self._incarnation = 0
        self._forecast: _Forecast | None = None
        self._numbers: dict[str, int] = {}  # of requests, by id
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

    def is_quiet(self, now: float) -> bool:
        """Whether `advance` would change nothing."""
        if self._forecast is not None:
            return False
        due = self.next_s
        return due is None or due > now

    def stats(self) -> EngineStats:
        return self._state.stats()

    @property
    def queued(self) -> tuple[int, ...]:
        """Steps that wait, at each instance."""
        return tuple(len(station.queue) for station in self._pipeline.stations)

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
                self._result_s = at
                self._handle(self._result_of(work), at)
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
            match effect:
                case RunStep(step):
                    self._note_rows(step, times[-1])
                    self._pipeline.submit(step, times[-1])
                case Emit(output):
                    outputs.append(output)
                case CompileGrammar():
                    raise AssertionError("no request has a grammar")
                case _:
                    of_kv.append(effect)
        self._tell_outputs(outputs, times)
        for each in of_kv:
            self._hand_over(each, times[-1])

    def _tell_outputs(self, outputs: list[Output], times: Sequence[float]) -> None:
        for output in outputs:
            if output.finish is not None:
                self._numbers.pop(output.request_id, None)
        if outputs:
            self._report(outputs, times, self._state.tally.computed)

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
        if not self._runs or self._result_s < self._stalls_until_s:
            return
        run = self._state.decode_run()
        if run is not None and run.num_steps >= _SHORTEST_RUN:
            self._forecast = self._foresee(run)

    def _foresee(self, run: DecodeRun) -> _Forecast:
        """Of the Steps in flight, then of those that will follow them."""
        (station,) = self._pipeline.stations
        first_s = self._pipeline.next_s
        assert first_s is not None
        waiting = [self._pipeline.seconds(work.load, 0, 0) for work in station.queue]
        num_new = min(run.num_steps, _LONGEST_RUN) - len(waiting) - 1
        following = [*waiting, *self._pipeline.decodes(run.lengths, num_new)]
        times = list(accumulate(following, initial=first_s))
        return _Forecast(run, times, [station.seconds, *following])

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
        effects = self._state.handle(StepsDecoded(token_ids, tuple(seconds)), times[-1])
        self._carry_out(effects, times)


_NOTHING = RowResult()
