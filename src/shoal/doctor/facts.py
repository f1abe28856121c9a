"""What is known of a machine: plain facts, so that checks can be given any.

Knows nothing of how they are gathered or judged. None: the machine does not say.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from shoal.cluster.topology import Topology


@dataclass(frozen=True, slots=True, kw_only=True)
class Processor:
    """
    Attributes:
        model: as the kernel names it.
        flags: its instruction sets: "avx2", "avx512_vnni".
        num_cpus: that this process may use.
        quota_cpus: that a control group lets it use at once, on average.
        governors: of frequency; empty: the machine shows none.
        frequency_driver: "intel_pstate", "acpi-cpufreq", ...
    """

    model: str = ""
    flags: frozenset[str] = frozenset()
    num_cpus: int = 1
    quota_cpus: float | None = None
    governors: tuple[str, ...] = ()
    frequency_driver: str = ""

    @property
    def is_arm(self) -> bool:
        """By what ARMs, and only they, list (arch/arm64/kernel/cpuinfo.c)."""
        return bool(self.flags & {"asimd", "neon"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """
    Attributes:
        available_bytes: that could be allocated, control groups counted.
        limit_bytes: of control groups; None: none is less than the machine's.
        huge_pages: transparent ones: "always", "madvise" or "never".
        never_overcommits: the kernel refuses what it could not back (vm.overcommit_memory 2).
    """

    total_bytes: int = 0
    available_bytes: int = 0
    limit_bytes: int | None = None
    swap_used_bytes: int = 0
    huge_pages: str | None = None
    never_overcommits: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """Of files: open ones, locked memory, /dev/shm, the disk of the model cache."""

    open_files: int | None = None
    most_open_files: int | None = None
    locked_bytes: int | None = None
    shm_bytes: int | None = None
    cache: str = ""
    cache_free_bytes: int | None = None
    port: int = 8000
    port_is_taken: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Software:
    """
    Attributes:
        torch_cuda: that torch was built for: (13, 0); None: a CPU build.
        torch_problem: why it cannot be imported.
        kernels: instruction set that the compiled CPU kernels take here; "": there are none.
        kernels_problem: why not.
        has_triton: which CUDA kernels need.
        open_driver: NVIDIA's open kernel modules are loaded.
        peer_memory: its module nvidia_peermem is.
        translates_peers: the IOMMU translates what GPUs send each other.
    """

    python: str = ""
    shoal: str = ""
    torch: str = ""
    torch_cuda: tuple[int, int] | None = None
    torch_problem: str = ""
    ray: str = ""
    kernels: str = ""
    kernels_problem: str = ""
    has_triton: bool = False
    open_driver: bool = False
    peer_memory: bool = False
    translates_peers: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """
    Attributes:
        variables: of the environment, those that our libraries read; never others: they may be
            secrets.
        files: variables that /etc/nccl.conf and ~/.nccl.conf set, by file.
    """

    name: str = ""
    processor: Processor = field(default_factory=Processor)
    memory: Memory = field(default_factory=Memory)
    room: Room = field(default_factory=Room)
    software: Software = field(default_factory=Software)
    topology: Topology = field(default_factory=Topology)
    variables: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def variable(self, name: str) -> str:
        """As NCCL sees it: the environment wins over its files; "": not set."""
        found = self.variables.get(name)
        for each in self.files.values():
            found = each.get(name) if found is None else found
        return found or ""

    def has(self, name: str) -> bool:
        """Whether a switch is on."""
        return self.variable(name).strip().lower() not in ("", "0", "false", "no", "off")
