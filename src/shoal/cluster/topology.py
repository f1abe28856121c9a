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

NVLINK_BYTES_PER_S = {1: 20e9, 2: 25e9, 3: 25e9, 4: 25e9, 5: 25e9, 6: 25e9, 7: 50e9, 8: 50e9}
"""Of one link one way, by NVML's number of its version (1.0, 2.0, 2.2, 3.0, 3.1, 4.0, 5.0, 6.0): an
A100 says 5, an H100 6, whose 18 links make 450 GB/s."""
NARROW_NVLINK_BYTES_PER_S = 14.0625e9
"""Of those of GA102 (RTX 3090, A40, A6000), which also say 3.1."""

POWER_CAP = "power cap"
"""Of `Gpu.held_back`: what a busy GPU reaches."""

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
        master: the bond or bridge that it is a part of, which has its address; "": none.
    """

    name: str
    is_up: bool
    bytes_per_s: float | None = None
    driver: str = ""
    mtu: int = 1500
    is_virtual: bool = False
    master: str = ""
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
        lost: GPUs that the driver counts and cannot speak to, with what it says.
        undriven: PCI addresses of NVIDIA's cards where no driver answers at all.
        foreign: other makers' GPUs, as "AMD 0000:03:00.0".
    """

    gpus: tuple[Gpu, ...] = ()
    pairs: tuple[GpuPair, ...] = ()
    nics: tuple[Nic, ...] = ()
    rdma: tuple[RdmaPort, ...] = ()
    numa: tuple[NumaNode, ...] = ()
    driver: str = ""
    driver_cuda: tuple[int, int] | None = None
    driver_problem: str = ""
    lost: tuple[str, ...] = ()
    undriven: tuple[str, ...] = ()
    foreign: tuple[str, ...] = ()

    @property
    def network_cards(self) -> tuple[Nic, ...]:
        """Interfaces that are up and lead to other machines: hardware, and bonds and bridges of it
        in place of their parts."""
        joined = {nic.master for nic in self.nics if nic.master and not nic.is_virtual}
        return tuple(
            nic
            for nic in self.nics
            if nic.is_up and not nic.master and (not nic.is_virtual or nic.name in joined)
        )

    def pair(self, a: int, b: int) -> GpuPair | None:
        """Of two GPUs by index."""
        wanted = {a, b}
        return next((each for each in self.pairs if {each.a, each.b} == wanted), None)
