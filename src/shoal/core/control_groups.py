"""Limits of control groups: how many CPUs and how much memory they leave.

The process's own group and those around it, in both versions of the interface. Knows nothing of
what they are good for.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_GROUPS = "sys/fs/cgroup"
_NO_LIMIT = 1 << 60


def quota_cpus(root: Path) -> float | None:
    """CPUs' worth of time that the tightest group allows; None: all."""
    found = [_quota(folder) for folder in _groups(root, "cpu")]
    return min((each for each in found if each is not None), default=None)


def memory_room(root: Path) -> tuple[int | None, int | None]:
    """The tightest group's limit, and what is left of it; None: there is none."""
    limits, rooms = [], []
    for folder in _groups(root, "memory"):
        limit = _number(folder / "memory.max") or _number(folder / "memory.limit_in_bytes")
        used = _number(folder / "memory.current") or _number(folder / "memory.usage_in_bytes")
        if limit is not None and limit < _NO_LIMIT:
            limits.append(limit)
            rooms.append(max(limit - (used or 0) + _reclaimable(folder), 0))
    return min(limits, default=None), min(rooms, default=None)


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """In a container the paths are often the host's, and only the outermost folder is there."""
    for line in text(root / "proc/self/cgroup").splitlines():
        _, _, named = line.partition(":")
        controllers, _, path = named.partition(":")
        if controllers and controller not in controllers.split(","):
            continue
        top = root / _GROUPS / controller if controllers else root / _GROUPS
        folder = top / path.lstrip("/")
        yield folder
        while folder != top and top in folder.parents:
            folder = folder.parent
            yield folder


def _quota(folder: Path) -> float | None:
    quota, _, period = text(folder / "cpu.max").partition(" ")
    if not quota:
        quota, period = text(folder / "cpu.cfs_quota_us"), text(folder / "cpu.cfs_period_us")
    if not quota.isdigit() or not period.isdigit() or period == "0":
        return None  # "max", and -1 in version 1
    return int(quota) / int(period)


def _reclaimable(folder: Path) -> int:
    """Files that were read count as used, and are let go when memory is wanted."""
    fields = dict(
        line.split(" ", 1) for line in text(folder / "memory.stat").splitlines() if " " in line
    )
    prefix = "total_" if "total_active_file" in fields else ""
    names = (f"{prefix}inactive_file", f"{prefix}active_file")
    return sum(int(fields[name]) for name in names if fields.get(name, "").isdigit())


def _number(path: Path) -> int | None:
    found = text(path)
    return int(found) if found.isdigit() else None


def text(path: Path) -> str:
    """Of a small file; "": it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
