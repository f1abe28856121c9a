"""Short turns change how long a worker keeps a core, and nothing else of it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import TypeVar

import pytest

from shoal.worker.turns import take_short_turns

T = TypeVar("T")

pytestmark = pytest.mark.skipif(not hasattr(os, "sched_getscheduler"), reason="Linux alone")


def in_a_thread(run: Callable[[], T]) -> T:
    """What it asks for ends with the thread."""
    got: list[T] = []
    thread = threading.Thread(target=lambda: got.append(run()))
    thread.start()
    thread.join()
    return got[0]


def test_priority_and_policy_stay() -> None:
    def ask() -> tuple[int, int]:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 7)
        take_short_turns()
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id()), os.sched_getscheduler(0)

    assert in_a_thread(ask) == (7, os.SCHED_OTHER)


def test_a_policy_that_somebody_chose_is_left_alone() -> None:
    def ask() -> tuple[bool, int]:
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        return take_short_turns(), os.sched_getscheduler(0)

    assert in_a_thread(ask) == (False, os.SCHED_BATCH)
