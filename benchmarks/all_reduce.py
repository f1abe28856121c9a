"""What ranks on one host pay to speak to each other: sums over shared memory and over gloo, a hop.

    python benchmarks/all_reduce.py --ranks 2 --rounds 9

Ranks are processes. Each round, interleaved, every size is summed --calls times over both groups
(`Group.all_reduce` of fp32, called from Python, on loopback for gloo) and by gloo itself, without
our group around it; a hop is half of a message's way to another worker's mesh and back. Medians of
the rounds' means go to `benchmarks/results/`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.distributed import FileStore, PrefixStore, ProcessGroupGloo

from shoal.comm import Group
from shoal.comm.gloo import GlooGroup
from shoal.comm.memory import create_memory
from shoal.comm.shared_memory import SharedMemoryGroup
from shoal.wire.curve import MeshKeys, make_keys
from shoal.wire.mesh import Mesh

SIZES = {"2.3 KiB": 2304, "16 KiB": 16 << 10, "1 MiB": 1 << 20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--calls", type=int, default=300, help="of the smallest size, in a round")
    parser.add_argument("--output", type=Path, default=None, help="a file for the JSON")
    parser.add_argument("--rank", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank is not None:
        rank, fd, folder = args.rank
        measure(args, int(rank), int(fd), Path(folder))
        return
    report = {
        "command": " ".join(["python", *sys.argv]),
        "commit": output_of("git", "rev-parse", "--short", "HEAD"),
        "machine": f"{platform.machine()}, {psutil.cpu_count()} cores",
        "real_time_scheduling": os.sched_getscheduler(0) != os.SCHED_OTHER,
        "ranks": args.ranks,
        "median_us": run_ranks(args),
    }
    text = json.dumps(report, indent=2)
    sys.stdout.write(text + "\n")
    if args.output is not None:
        args.output.write_text(text + "\n", encoding="utf-8")


def run_ranks(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Microseconds by what was done and its size, as rank 0 saw them."""
    fd = create_memory(args.ranks)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, *sys.argv[1:], "--rank"]
        keys = make_keys(["0", "1"])
        for name, own in keys.items():
            save(Path(folder, f"keys{name}"), [own.name, own.secret, dict(own.public)])
        ranks = [
            subprocess.Popen(
                [*command, str(rank), str(fd), folder], pass_fds=[fd], stdout=subprocess.PIPE
            )
            for rank in range(args.ranks)
        ]
        outputs = [rank.communicate()[0] for rank in ranks]
    os.close(fd)
    found: dict[str, dict[str, float]] = json.loads(outputs[0])
    return found


def measure(args: argparse.Namespace, rank: int, fd: int, folder: Path) -> None:
    torch.set_num_threads(1)
    shared = SharedMemoryGroup(fd, rank, args.ranks)
    store = FileStore(str(folder / "store"), args.ranks)
    gloo = GlooGroup(store, rank, args.ranks, "127.0.0.1")
    itself = gloo_itself(store, rank, args.ranks)
    hop = Hop(rank, folder) if rank < 2 else None
    tasks: dict[tuple[str, str], Callable[[], None]] = {}
    for label, num_bytes in SIZES.items():
        tasks["shared_memory", label] = all_reduce(shared, num_bytes)
        tasks["gloo", label] = all_reduce(gloo, num_bytes)
        tasks["gloo_itself", label] = all_reduce_itself(itself, num_bytes)
        if hop is not None:
            tasks["mesh_hop", label] = hop.there_and_back(num_bytes)
    times: dict[tuple[str, str], list[float]] = {task: [] for task in tasks}
    for _ in range(args.rounds):
        for (what, label), task in tasks.items():
            calls = max(10, args.calls * SIZES["2.3 KiB"] // SIZES[label])
            shared.all_reduce(torch.zeros(1))  # all begin together
            times[what, label].append(seconds_each(task, calls) / (2 if what == "mesh_hop" else 1))
    found: dict[str, dict[str, float]] = {}
    for (what, label), each in times.items():
        found.setdefault(what, {})[label] = round(statistics.median(each) * 1e6, 2)
    sys.stdout.write(json.dumps(found))
    if hop is not None:
        hop.mesh.close()


def all_reduce(group: Group, num_bytes: int) -> Callable[[], None]:
    tensor = torch.zeros(num_bytes // 4)
    return lambda: group.all_reduce(tensor)


def gloo_itself(store: FileStore, rank: int, size: int) -> Any:
    gloo: Any = ProcessGroupGloo
    options = gloo._Options()
    options._devices = [gloo.create_device(hostname="127.0.0.1")]
    return gloo(PrefixStore("itself", store), rank, size, options)


def all_reduce_itself(gloo: Any, num_bytes: int) -> Callable[[], None]:
    tensor = torch.zeros(num_bytes // 4)
    return lambda: gloo.allreduce([tensor]).wait()


class Hop:
    """Rank 0 sends to rank 1, which sends back."""

    def __init__(self, rank: int, folder: Path) -> None:
        self._is_first = rank == 0
        self._other = str(1 - rank)
        keys = folder / f"keys{rank}"
        self.mesh = Mesh(MeshKeys(*json.loads(keys.read_text(encoding="utf-8"))))
        save(folder / f"address{rank}", self.mesh.address)
        others = folder / f"address{self._other}"
        while not others.exists():
            time.sleep(0.01)
        self.mesh.connect(self._other, json.loads(others.read_text(encoding="utf-8")))

    def there_and_back(self, num_bytes: int) -> Callable[[], None]:
        payload = bytes(num_bytes)

        def go() -> None:
            if self._is_first:
                self.mesh.send(self._other, b"hop", payload)
            self.mesh.receive(10)
            if not self._is_first:
                self.mesh.send(self._other, b"hop", payload)

        return go


def seconds_each(task: Callable[[], None], calls: int) -> float:
    for _ in range(5):
        task()
    began = time.perf_counter()
    for _ in range(calls):
        task()
    return (time.perf_counter() - began) / calls


def save(path: Path, value: object) -> None:
    """Whole, or not at all: the other rank may be waiting for it."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value), encoding="utf-8")
    partial.rename(path)


def output_of(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


if __name__ == "__main__":
    main()
