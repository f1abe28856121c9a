"""Whether an engine process is still worth waiting for.

Liveness is progress, not a pulse: an engine that says nothing is frozen, one whose Steps don't
come back hangs. One that was stopped by a signal will not go on by itself, and is not waited for as
long as one that may be starved of CPU or memory. Told the time, never asks for it; knows nothing of
processes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from shoal.core.errors import ConfigError
from shoal.core.stats import EngineStats


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchdogLimits:
    """How long an engine that is ready may be quiet; it speaks once a second even when idle.

    Attributes:
        silence_s: without any message; `stopped_s`: of a process that was stopped by a signal.
        step_s: with requests running, without a finished Step.
        grace_s: more, for what waits to be read if it was the router that slept.
    """

    silence_s: float = 10.0
    stopped_s: float = 3.0
    step_s: float = 120.0
    grace_s: float = 1.0

    def __post_init__(self) -> None:
        for name in ("silence_s", "stopped_s", "step_s"):
            value = getattr(self, name)
            if not value >= _LEAST_S:
                raise ConfigError(
                    f"{name} is {value}; engines speak once a second: give at least {_LEAST_S:g}"
                )


_LEAST_S = 2.0


class Watchdog:
    """Follows what one engine process says, from when it is ready."""

    def __init__(self, limits: WatchdogLimits, now: float) -> None:
        self._limits = limits
        self._heard_s = now
        self._num_steps = -1
        self._progress_s = now

    def heard(self, stats: EngineStats, now: float) -> None:
        self._heard_s = now
        # Workers being started again, or waiting for a link, are their executor's to follow.
        is_excused = stats.num_running == 0 or stats.recovering
        if stats.computed.steps != self._num_steps or is_excused:
            self._num_steps, self._progress_s = stats.computed.steps, now

    def complaint(self, now: float, is_stopped: Callable[[], bool]) -> str | None:
        """Why the process should be ended now, if it should.

        Args:
            is_stopped: by a signal; asked of one that is silent.
        """
        silent_s = now - self._heard_s
        if silent_s > self._limits.silence_s:
            return f"the engine did not answer for {self._limits.silence_s:g} s"
        if silent_s > self._limits.stopped_s and is_stopped():
            return f"the engine process was stopped, said nothing for {self._limits.stopped_s:g} s"
        if now - self._progress_s > self._limits.step_s:
            return f"the engine finished no Step for {self._limits.step_s:g} s"
        return None
