"""Facts of this machine, from /proc, /sys, limits and the environment; nothing is started.

What torch and the compiled kernels say is passed in. Knows nothing of what is good or bad.
"""

from __future__ import annotations

import re
import resource
import shutil
import socket
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from shoal.cluster.nvml import read_topology
from shoal.cluster.topology import Topology
from shoal.core.control_groups import memory_room, quota_cpus, text
from shoal.doctor.facts import Machine, Memory, Processor, Room, Software
from shoal.plan_file.machine import num_cpus

_PREFIXES = ("NCCL_", "GLOO_", "OMP_", "GOMP_", "KMP_", "MKL_", "CUDA_", "TORCH_", "PYTORCH_")
_MAX_VALUE, _MAX_FILE_LINES = 400, 400
_VARIABLE = re.compile(r"^\s*(NCCL_[A-Z0-9_]+)\s*=\s*(.*?)\s*$")


def read_machine(
    software: Software,
    environ: Mapping[str, str],
    *,
    cache: Path,
    port: int,
    root: Path = Path("/"),
    nvml: Any = None,
) -> Machine:
    """
    Args:
        software: what torch and the compiled kernels say.
        cache: folder of models; it need not be there.
        port: that a server is to listen on, on loopback.
        root: of the file system that is read.
        nvml: as of `cluster.nvml.read_topology`.
    """
    topology = read_topology(root, nvml)
    return Machine(
        name=socket.gethostname(),
        processor=read_processor(root),
        memory=_memory(root),
        room=_room(root, cache, port),
        software=_with_driver(software, root, topology),
        topology=topology,
        variables=relevant(environ),
        files=_nccl_files(root, Path(environ.get("HOME") or "/root")),
    )


def relevant(environ: Mapping[str, str]) -> dict[str, str]:
    """Variables that our libraries read."""
    return {
        name: value[:_MAX_VALUE]
        for name, value in sorted(environ.items())
        if name.startswith(_PREFIXES)
    }


def read_processor(root: Path) -> Processor:
    lines = text(root / "proc/cpuinfo").splitlines()
    fields = {key.strip(): value.strip() for key, _, value in (x.partition(":") for x in lines)}
    cpus = root / "sys/devices/system/cpu"
    policies = sorted((cpus / "cpufreq").glob("policy*"))
    return Processor(
        model=fields.get("model name", ""),
        flags=frozenset((fields.get("flags") or fields.get("Features") or "").split()),
        num_cpus=num_cpus(),
        quota_cpus=quota_cpus(root),
        governors=tuple(
            sorted({text(each / "scaling_governor") for each in policies} - {""}),
        ),
        frequency_driver=text(policies[0] / "scaling_driver") if policies else "",
    )


def _memory(root: Path) -> Memory:
    machine, swap = psutil.virtual_memory(), psutil.swap_memory()
    limit, left = memory_room(root)
    if limit is not None and limit >= machine.total:
        limit = None
    chosen = re.search(r"\[(\w+)\]", text(root / "sys/kernel/mm/transparent_hugepage/enabled"))
    return Memory(
        total_bytes=int(machine.total),
        available_bytes=int(machine.available if left is None else min(machine.available, left)),
        limit_bytes=limit,
        swap_used_bytes=int(swap.used),
        huge_pages=chosen[1] if chosen else None,
        never_overcommits=text(root / "proc/sys/vm/overcommit_memory") == "2",
    )


def _room(root: Path, cache: Path, port: int) -> Room:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return Room(
        open_files=_finite(soft),
        most_open_files=_finite(hard),
        locked_bytes=_finite(locked),
        shm_bytes=_disk(root / "dev/shm", 0),
        cache=str(cache),
        cache_free_bytes=_disk(cache, 2),
        port=port,
        port_is_taken=_is_taken(port),
    )


def _finite(limit: int) -> int | None:
    return None if limit == resource.RLIM_INFINITY else limit


def _disk(path: Path, field: int) -> int | None:
    """Of the disk that a folder lies on, or would: 0 its size, 2 what is free."""
    there = next((each for each in (path, *path.parents) if each.exists()), None)
    try:
        return None if there is None else int(shutil.disk_usage(there)[field])
    except OSError:
        return None


def _is_taken(port: int) -> bool:
    if port == 0:
        return False  # any that is free
    with socket.socket() as door:
        # As a server sets it: connections that linger from the last one do not count.
        door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            door.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False


def _with_driver(software: Software, root: Path, topology: Topology) -> Software:
    """And what the kernel says of NVIDIA's modules."""
    groups = [
        text(root / "sys/bus/pci/devices" / gpu.pci_address.lower()[-12:] / "iommu_group/type")
        for gpu in topology.gpus
    ]
    known = [each for each in groups if each]
    return replace(
        software,
        open_driver="Open Kernel Module" in text(root / "proc/driver/nvidia/version"),
        peer_memory=(root / "sys/module/nvidia_peermem").exists(),
        translates_peers=any(each.startswith("DMA") for each in known) if known else None,
    )


def _nccl_files(root: Path, home: Path) -> dict[str, dict[str, str]]:
    """NCCL reads these wherever it is started."""
    found = {}
    for path in (home / ".nccl.conf", Path("/etc/nccl.conf")):
        lines = text(root / path.relative_to("/")).splitlines()[:_MAX_FILE_LINES]
        pairs = [match for line in lines if (match := _VARIABLE.match(line))]
        if pairs:
            found[str(path)] = {match[1]: match[2][:_MAX_VALUE] for match in pairs}
    return found
