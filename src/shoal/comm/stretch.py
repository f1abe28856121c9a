"""A slower device than there is: a thread's own measured CPU time, stretched to a given speed.

    with speed 0.3                      CPU 3 ms → owes 7 ms, and sleeps them
    and it waited 2 ms for a core       owes 5 ms: it would have had a core of its own

What is stretched is work that ran, not a model of it; waiting and sleeping cost nothing more. For
the lab. Knows nothing of what is computed.
"""

from __future__ import annotations

import os
import threading
import time

from shoal.core.errors import ConfigError

_SMALLEST_SLEEP_NS = 200_000
"""Smaller debts add up first: a sleep is late by tens of microseconds."""


class Stretch:
    """Stretches what one thread computes between `begin` and `pay`; speed 1.0 costs nothing."""

    def __init__(self, speed: float = 1.0) -> None:
        self.set_speed(speed)
        self._began_ns: tuple[int, int] | None = None
        self._debt_ns = 0.0

    def set_speed(self, speed: float) -> None:
        """From any thread; holds from the next `begin` on."""
        self._owed_per_ns = 1 / checked_speed(speed) - 1

    def begin(self) -> None:
        self._began_ns = (time.thread_time_ns(), _core_wait_ns()) if self._owed_per_ns else None

    def pay(self) -> None:
        """Sleep off what was computed since `begin`; a sleep's own error is carried over."""
        if self._began_ns is None:
            return
        computed_ns, waited_ns = time.thread_time_ns(), _core_wait_ns()
        computed_ns, waited_ns = computed_ns - self._began_ns[0], waited_ns - self._began_ns[1]
        self._debt_ns += max(0.0, computed_ns * self._owed_per_ns - waited_ns)
        self._began_ns = None
        if self._debt_ns > _SMALLEST_SLEEP_NS:
            slept_from = time.monotonic_ns()
            time.sleep(self._debt_ns / 1e9)
            self._debt_ns -= time.monotonic_ns() - slept_from


def checked_speed(speed: float) -> float:
    """
    Raises:
        ConfigError: not in (0, 1].
    """
    if not 0 < speed <= 1:
        raise ConfigError(
            f"a worker's speed is {speed}; give a number above 0, and at most 1.0 (as it is)"
        )
    return speed


def _core_wait_ns() -> int:
    """How long this thread was ready to run and had no core; 0 where the kernel does not say."""
    try:
        file = os.open(f"/proc/self/task/{threading.get_native_id()}/schedstat", os.O_RDONLY)
    except OSError:
        return 0
    try:
        return int(os.read(file, 64).split()[1])
    except (OSError, IndexError, ValueError):
        return 0
    finally:
        os.close(file)
