"""What driver and kernel say of one machine: GPUs and what joins them, network cards, NUMA nodes.

    numa 0 ── pcie ── gpu 0 ══ nvlink ══ gpu 1      Topology.gpus, .pairs
           └─ pcie ── nic mlx5_0, RDMA              .nics, .rdma
    numa 1 ── pcie ── gpu 2                         .numa

Claims, not measurements: a probe measures, and says where the two disagree. Read by `sysfs.py` and
`nvml.py`; knows nothing of how.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PCIE_LANE_BYTES_PER_S = {1: 0.25e9, 2: 0.5e9, 3: 0.985e9, 4: 1.969e9, 5: 3.938e9, 6: 7.563e9}
"""One way, by generation, after the line's coding."""

NVLINK_BYTES_PER_S = {1: 20e9, 2: 25e9, 3: 25e9, 4: 25e9, 5: 50e9}
"""Of one link one way, by generation: 18 of the fourth make an H100's 450 GB/s."""

Connection = Literal[
    "nvlink", "nvswitch", "board", "switch", "switches", "bridge", "node", "system"
]
"""The nearest thing that two GPUs share. `nvidia-smi topo -m` writes the last five as PIX, PXB,
PHB, NODE and SYS: one PCIe switch, several, the CPU's host bridge, its NUMA node, and nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PcieLink:
    """A slot's lanes now, and what card and slot could do together.

    An idle GPU slows its lanes down: `generation` counts under load only, `width` always.
    """

    generation: int
    width: int
    max_generation: int
    max_width: int

    @property
    def bytes_per_s(self) -> float:
        return PCIE_LANE_BYTES_PER_S.get(self.generation, 0.0) * self.width

    @property
    def max_bytes_per_s(self) -> float:
        return PCIE_LANE_BYTES_PER_S.get(self.max_generation, 0.0) * self.max_width

    @property
    def label(self) -> str:
        return f"gen {self.generation} x{self.width}"

    @property
    def max_label(self) -> str:
        return f"gen {self.max_generation} x{self.max_width}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """As NVML has it; None: this card or driver does not say.

    Attributes:
        index: of NVML, which counts by PCI address; CUDA may be told to count otherwise.
        compute_capability: (9, 0) is Hopper.
        free_bytes: nobody has it just now.
        nvlinks: that are up; `nvlink_bytes_per_s` of all of them, one way.
        power_limit_w: enforced now; `default_power_limit_w` by the maker.
        clock_hz: of its multiprocessors now; `max_clock_hz` the most that they have.
        held_back: why clocks are lower than they could be just now, idleness aside.
        is_idle: nothing runs: clocks and PCIe generation say little.
    """

    index: int
    name: str
    uuid: str
    pci_address: str
    compute_capability: tuple[int, int] | None = None
    memory_bytes: int = 0
    free_bytes: int = 0
    pcie: PcieLink | None = None
    numa_node: int | None = None
    nvlinks: int = 0
    nvlink_bytes_per_s: float = 0.0
    power_limit_w: float | None = None
    default_power_limit_w: float | None = None
    clock_hz: float | None = None
    max_clock_hz: float | None = None
    held_back: tuple[str, ...] = ()
    is_idle: bool = True
    temperature_c: int | None = None
    has_mig: bool = False
    is_persistent: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuPair:
    """Two GPUs by index.

    Attributes:
        bytes_per_s: that the claim comes to, one way; 0: it says nothing of it.
        peer_to_peer: they read each other's memory; None: not said.
    """

    a: int
    b: int
    connection: Connection
    bytes_per_s: float = 0.0
    peer_to_peer: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Nic:
    """A network interface.

    Attributes:
        bytes_per_s: as negotiated; None: unknown (virtual ones, or no cable).
        driver: "mlx5_core", "virtio_net", ...; "": none.
        is_virtual: a bridge, a tunnel, a container's end: no hardware of its own.
    """

    name: str
    is_up: bool
    bytes_per_s: float | None = None
    driver: str = ""
    mtu: int = 1500
    is_virtual: bool = False
    pcie: PcieLink | None = None
    numa_node: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RdmaPort:
    """A port of an RDMA device ("mlx5_0"). `nic`: the interface on the same card; None: none."""

    device: str
    port: int
    is_active: bool
    layer: str
    bytes_per_s: float | None = None
    nic: str | None = None
    numa_node: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class NumaNode:
    """CPUs with memory of their own; without CPUs it is memory alone."""

    number: int
    cpus: tuple[int, ...]
    memory_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """Of one machine.

    Attributes:
        driver: NVIDIA's version, "" without.
        driver_cuda: newest CUDA that the driver runs: (13, 0).
        driver_problem: why the driver could not be asked, where there is one.
    """

    gpus: tuple[Gpu, ...] = ()
    pairs: tuple[GpuPair, ...] = ()
    nics: tuple[Nic, ...] = ()
    rdma: tuple[RdmaPort, ...] = ()
    numa: tuple[NumaNode, ...] = ()
    driver: str = ""
    driver_cuda: tuple[int, int] | None = None
    driver_problem: str = ""

    def pair(self, a: int, b: int) -> GpuPair | None:
        """Of two GPUs by index."""
        wanted = {a, b}
        return next((each for each in self.pairs if {each.a, each.b} == wanted), None)
