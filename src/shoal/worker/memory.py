"""Memory that could be allocated now: the device's, and what limits leave of it.

    machine      what is available
    container    the process's control group, and those it lies in
    process      `ulimit -v`, `ulimit -d`

Knows nothing of what it is for.
"""

from __future__ import annotations

import resource
from pathlib import Path

import psutil
import torch

from shoal.core.control_groups import memory_room, text

_UNLIMITED = 1 << 62


def free_memory_bytes(device: torch.device) -> int:
    """Memory that could be allocated now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    available = int(psutil.virtual_memory().available)
    _, group_room = memory_room(Path("/"))
    rooms = [available, _process_room_bytes()]
    return min(rooms if group_room is None else [*rooms, group_room])


def _process_room_bytes() -> int:
    """Memory left under this process's own limits (`ulimit -v`, `ulimit -d`)."""
    fields = dict(line.split(":", 1) for line in text(Path("/proc/self/status")).splitlines())
    rooms = [_UNLIMITED]
    for limit, used in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        most, _ = resource.getrlimit(limit)
        if most != resource.RLIM_INFINITY and used in fields:
            rooms.append(max(most - 1024 * int(fields[used].split()[0]), 0))
    return min(rooms)
