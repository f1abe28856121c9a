"""How a worker's threads share cores with others: many short turns instead of few long ones.

Ranks wait for each other many times a step. Where they share cores (a lab's, or with whatever else
runs), one that is woken is let in when the turn of who has the core is over: milliseconds by
default. A thread that asks for short turns is let in at once, and gets no more of the core for it.
Linux 6.12 and later; before, the wish is ignored. Knows nothing of what the threads do.
"""

from __future__ import annotations

import ctypes
import platform
import sys

_TURN_NS = 100_000
"""The shortest that Linux takes."""
_CALLS = {"x86_64": (314, 315), "aarch64": (274, 275)}
"""Numbers of sched_setattr and sched_getattr, which the C library has no functions for."""
_SCHED_OTHER = 0


class _Attributes(ctypes.Structure):
    """`struct sched_attr` of linux/sched/types.h, its first version."""

    _fields_ = (
        ("size", ctypes.c_uint32),
        ("policy", ctypes.c_uint32),
        ("flags", ctypes.c_uint64),
        ("nice", ctypes.c_int32),
        ("priority", ctypes.c_uint32),
        ("runtime_ns", ctypes.c_uint64),
        ("deadline_ns", ctypes.c_uint64),
        ("period_ns", ctypes.c_uint64),
    )


def take_short_turns() -> bool:
    """For this thread and those that it starts from now on; whether the kernel took the wish."""
    calls = _CALLS.get(platform.machine())
    if sys.platform != "linux" or calls is None:
        return False
    set_attributes, get_attributes = calls
    system_call = ctypes.CDLL(None).syscall
    wanted = _Attributes()
    size = ctypes.sizeof(wanted)
    if system_call(get_attributes, 0, ctypes.byref(wanted), size, 0) != 0:
        return False
    if wanted.policy != _SCHED_OTHER:
        return False  # whoever gave it another has reasons
    wanted.runtime_ns = _TURN_NS
    return bool(system_call(set_attributes, 0, ctypes.byref(wanted), 0) == 0)
