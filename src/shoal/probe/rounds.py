"""How often something runs in a second: a mean over some time, as whoever uses it would see.

On a device of a lab what was computed is stretched, and the stretch counts. Knows nothing of what
runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from shoal.worker.speed import Speed


def per_second(run: Callable[[], object], seconds: float, speed: Speed) -> float:
    """
    Args:
        run: waits for its device; takes milliseconds, or sleeps that are owed cannot be kept apart.
    """
    run()  # first touches
    began_s, count = time.perf_counter(), 0
    while True:
        speed.begin()
        run()
        speed.pay()
        count += 1
        taken_s = time.perf_counter() - began_s
        if taken_s >= seconds:
            return count / taken_s
