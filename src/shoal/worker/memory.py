"""Memory that could be allocated now: the device's, and what limits leave of it.

    machine      what is available
    container    the process's control group, and those it lies in
    process      `ulimit -v`, `ulimit -d`

Knows nothing of what it is for.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

_UNLIMITED = 1 << 62
_GROUPS = Path("/sys/fs/cgroup")


def free_memory_bytes(device: torch.device) -> int:
    """Memory that could be allocated now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    available = int(psutil.virtual_memory().available)
    return min(available, _cgroup_room_bytes(), _process_room_bytes())


def _process_room_bytes() -> int:
    """Memory left under this process's own limits (`ulimit -v`, `ulimit -d`)."""
    fields = dict(line.split(":", 1) for line in _read_text("/proc/self/status").splitlines())
    rooms = [_UNLIMITED]
    for limit, used in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        most, _ = resource.getrlimit(limit)
        if most != resource.RLIM_INFINITY and used in fields:
            rooms.append(max(most - 1024 * int(fields[used].split()[0]), 0))
    return min(rooms)


def _cgroup_room_bytes() -> int:
    """Memory left under the limits of control groups; effectively unlimited without one."""
    rooms = [_UNLIMITED]
    for folder, limit_file, used_file in _groups():
        limit, used = _read_number(folder / limit_file), _read_number(folder / used_file)
        if limit is not None and used is not None:
            rooms.append(max(limit - used + _file_cache_bytes(folder / "memory.stat"), 0))
    return min(rooms)


def _groups() -> Iterator[tuple[Path, str, str]]:
    """The process's own group and those around it, in both versions of the interface.

    In a container the paths are often the host's, and only the outermost folder is there.
    """
    for line in _read_text("/proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, files = _GROUPS, ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            root, files = _GROUPS / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        folder = root / path.lstrip("/")
        yield folder, *files
        while folder != root:
            folder = folder.parent
            yield folder, *files


def _file_cache_bytes(path: Path) -> int:
    """Files the container has read count as used, and are let go when memory is wanted."""
    try:
        fields = dict(line.split(" ", 1) for line in path.read_text().splitlines())
        prefix = "total_" if "total_active_file" in fields else ""  # with the groups inside it
        return int(fields[f"{prefix}inactive_file"]) + int(fields[f"{prefix}active_file"])
    except (OSError, ValueError, KeyError):
        return 0


def _read_number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _read_text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
