"""What this machine has that a plan can name, asked of the system itself: no torch."""

from __future__ import annotations

import ctypes
import os


def num_cpus() -> int:
    """CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def num_cuda_devices() -> int:
    """NVIDIA GPUs that a process started here sees (CUDA_VISIBLE_DEVICES counts); 0 without."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value
