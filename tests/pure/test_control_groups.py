"""Limits of control groups, of both versions of the interface."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from shoal.core.control_groups import memory_room, quota_cpus

NO_LIMIT = "9223372036854771712"


def write(root: Path, files: Mapping[str, str]) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)


def test_the_first_version_counts_cpus_and_memory_apart(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/jail\n3:cpu,cpuacct:/jail\n",
            "sys/fs/cgroup/cpu/jail/cpu.cfs_quota_us": "-1",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "400000",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            "sys/fs/cgroup/memory/jail/memory.limit_in_bytes": "1000",
            "sys/fs/cgroup/memory/jail/memory.usage_in_bytes": "700",
            "sys/fs/cgroup/memory/jail/memory.stat": "active_file 1\ninactive_file 1\n"
            "total_active_file 50\ntotal_inactive_file 25",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": NO_LIMIT,
        },
    )
    assert quota_cpus(tmp_path) == 4.0
    assert memory_room(tmp_path) == (1000, 375)


def test_the_tightest_of_nested_groups_counts(tmp_path: Path) -> None:
    outer = "sys/fs/cgroup/outer"
    write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/outer/inner\n",
            f"{outer}/inner/memory.max": "500",
            f"{outer}/inner/memory.current": "100",
            f"{outer}/inner/cpu.max": "max 100000",
            f"{outer}/memory.max": "400",
            f"{outer}/memory.current": "250",
            f"{outer}/memory.stat": "inactive_file 20\nactive_file 5\n",
            f"{outer}/cpu.max": "150000 100000",
        },
    )
    assert quota_cpus(tmp_path) == 1.5
    assert memory_room(tmp_path) == (400, 175)


def test_without_groups_nothing_is_limited(tmp_path: Path) -> None:
    assert (quota_cpus(tmp_path), memory_room(tmp_path)) == (None, (None, None))
