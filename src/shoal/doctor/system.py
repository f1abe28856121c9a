"""Checks of what the system allows: open files, locked memory, /dev/shm, swap, disk, the port.

Knows nothing of where facts come from.
"""

from __future__ import annotations

from collections.abc import Iterator

from shoal.doctor.facts import Machine
from shoal.doctor.finding import Check, Verdict, fail, gigabytes, ok, skipped, warn

_FILES, _FEWEST_FILES = 4096, 256
_SHM_BYTES = 1 << 30
_SWAP_BYTES, _SWAP_SHARE = 1e9, 0.05
_DISK_BYTES, _LEAST_DISK_BYTES = 10e9, 1e9


def _open_files(machine: Machine) -> Iterator[Verdict]:
    soft, most = machine.room.open_files, machine.room.most_open_files
    if soft is None or soft >= _FILES:
        yield ok("any number" if soft is None else f"{soft:,} at once")
        return
    wanted = _FILES if most is None else min(_FILES, most)
    found = f"{soft:,} at once"
    if wanted <= soft:
        yield warn(found, "raise the hard limit, too: /etc/security/limits.conf, or LimitNOFILE=")
    elif soft < _FEWEST_FILES:
        yield fail(found, f"ulimit -n {wanted}")
    else:
        yield warn(found, f"ulimit -n {wanted}")


def _locked_memory(machine: Machine) -> Iterator[Verdict]:
    if not any(port.is_active for port in machine.topology.rdma):
        yield skipped("only RDMA locks memory, and no RDMA port is active")
        return
    if not machine.topology.gpus:
        yield skipped("only NCCL uses RDMA, and there is no GPU")
        return
    locked = machine.room.locked_bytes
    if locked is None:
        yield ok("any amount may be locked")
    else:
        yield fail(
            f"{gigabytes(locked)} may be locked", "ulimit -l unlimited (or LimitMEMLOCK=infinity)"
        )


def _shared_memory(machine: Machine) -> Iterator[Verdict]:
    size = machine.room.shm_bytes
    if len(machine.topology.gpus) < 2:
        yield skipped("only NCCL needs /dev/shm, between GPUs; shoal's own groups don't")
    elif size is None:
        yield warn("there is no /dev/shm", "mount it: mount -t tmpfs -o size=8g tmpfs /dev/shm")
    elif size < _SHM_BYTES:
        yield warn(f"/dev/shm has {gigabytes(size)}", "start the container with --shm-size=8g")
    else:
        yield ok(f"/dev/shm has {gigabytes(size)}")


def _swap(machine: Machine) -> Iterator[Verdict]:
    used, total = machine.memory.swap_used_bytes, machine.memory.total_bytes
    if used > max(_SWAP_BYTES, _SWAP_SHARE * total):
        yield warn(f"{gigabytes(used)} are swapped out", "free memory, then: swapoff -a")
    else:
        yield ok(f"{gigabytes(used)} are swapped out")


def _disk(machine: Machine) -> Iterator[Verdict]:
    free, cache = machine.room.cache_free_bytes, machine.room.cache
    if free is None:
        yield skipped(f"the disk of {cache} cannot be asked")
        return
    found = f"{gigabytes(free)} are free for {cache}"
    remedy = "set SHOAL_CACHE to a folder on a larger disk, or remove models: shoal models remove"
    if free < _LEAST_DISK_BYTES:
        yield fail(found, remedy)
    elif free < _DISK_BYTES:
        yield warn(found, remedy)
    else:
        yield ok(found)


def _port(machine: Machine) -> Iterator[Verdict]:
    port = machine.room.port
    if machine.room.port_is_taken:
        yield warn(
            f"port {port} of 127.0.0.1 is taken (perhaps by shoal itself)",
            f"serve on another one: --port {port + 1}",
        )
    else:
        yield ok(f"port {port} of 127.0.0.1 is free")


SYSTEM_CHECKS: tuple[Check[Machine], ...] = (
    Check("open files", "each stream and each worker is a socket", _open_files),
    Check("locked memory", "RDMA reads and writes memory that must not move", _locked_memory),
    Check(
        "shared memory",
        "NCCL joins GPUs that cannot reach each other by way of /dev/shm; a container has 64 MB",
        _shared_memory,
    ),
    Check("swap", "a Step that waits for swapped weights takes seconds", _swap),
    Check("disk", "models are fetched into the cache, and packed weights are kept there", _disk),
    Check("port", "a server cannot listen where another one does", _port),
)
