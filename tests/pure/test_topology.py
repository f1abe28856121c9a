"""What driver and kernel say, read from a pretended /sys and a pretended NVML."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_nvml import FakeNvml, NvmlError, h100

from shoal.cluster.nvml import read_topology
from shoal.cluster.sysfs import cpu_list, read_nics, read_numa, read_pcie, read_rdma
from shoal.cluster.topology import NumaNode, PcieLink


def write(root: Path, **files: str) -> None:
    for name, content in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n")


def slot(root: Path, address: str, **files: str) -> Path:
    """A PCI device below a port that could do gen 5 x8."""
    port = root / "sys/devices/pci0000:00/0000:00:01.0"
    write(port, max_link_speed="32.0 GT/s PCIe", max_link_width="8")
    write(port / address, **files)
    return port / address


def interface(root: Path, name: str, device: Path | None, **files: str) -> None:
    """As the kernel lays it out: /sys/class/net has links to where the interface really is."""
    real = (device or root / "sys/devices/virtual") / "net" / name
    write(real, **files)
    link = root / "sys/class/net" / name
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(real)
    if device is not None:
        (real / "device").symlink_to(device)


def test_network_cards_and_their_slots(tmp_path: Path) -> None:
    card = slot(
        tmp_path,
        "0000:01:00.0",
        current_link_speed="16.0 GT/s PCIe",
        current_link_width="4",
        max_link_speed="16.0 GT/s PCIe",
        max_link_width="16",
        numa_node="1",
    )
    driver = tmp_path / "sys/bus/pci/drivers/mlx5_core"
    driver.mkdir(parents=True)
    (card / "driver").symlink_to(driver)
    interface(tmp_path, "eth0", card, speed="100000", operstate="up", mtu="9000")
    interface(tmp_path, "br0", None, speed="-1", operstate="unknown", mtu="1500")
    interface(tmp_path, "lo", None, operstate="unknown", mtu="65536")
    bridge, nic = read_nics(tmp_path)
    assert (nic.name, nic.driver, nic.mtu, nic.numa_node) == ("eth0", "mlx5_core", 9000, 1)
    assert nic.is_up and not nic.is_virtual
    assert nic.bytes_per_s == 12.5e9
    assert nic.pcie == PcieLink(generation=4, width=4, max_generation=4, max_width=8)
    assert (bridge.is_virtual, bridge.bytes_per_s, bridge.pcie) == (True, None, None)


def test_a_virtual_machines_card_says_little(tmp_path: Path) -> None:
    card = slot(tmp_path, "0000:03:00.0", numa_node="-1")
    interface(tmp_path, "eth0", card / "virtio2", operstate="up", mtu="1400")
    (nic,) = read_nics(tmp_path)
    assert (nic.is_up, nic.is_virtual) == (True, False)
    assert (nic.bytes_per_s, nic.pcie, nic.numa_node) == (None, None, None)


def test_lanes_that_no_slot_has_are_not_believed(tmp_path: Path) -> None:
    device = slot(
        tmp_path,
        "0000:04:00.0",
        current_link_speed="Unknown",
        current_link_width="63",
        max_link_speed="Unknown",
        max_link_width="255",
    )
    assert read_pcie(device) is None


def test_rdma_ports_and_the_interface_beside_them(tmp_path: Path) -> None:
    device = tmp_path / "sys/class/infiniband/mlx5_0"
    write(
        device,
        ports__1__state="4: ACTIVE",
        ports__1__link_layer="Ethernet",
        ports__1__rate="200 Gb/sec (4X HDR)",
        ports__2__state="1: DOWN",
        device__numa_node="0",
        device__net__eth2__mtu="4200",
    )
    first, second = read_rdma(tmp_path)
    assert (first.is_active, first.layer, first.nic, first.numa_node) == (
        True,
        "Ethernet",
        "eth2",
        0,
    )
    assert first.bytes_per_s == 25e9
    assert (second.is_active, second.bytes_per_s) == (False, None)


def test_numa_nodes(tmp_path: Path) -> None:
    write(
        tmp_path / "sys/devices/system/node",
        node0__cpulist="0-1,4",
        node0__meminfo="Node 0 MemTotal:       1024 kB",
        node1__cpulist="",
        node1__meminfo="Node 1 MemTotal: 2048 kB",
        possible="0-1",
    )
    assert read_numa(tmp_path) == (
        NumaNode(number=0, cpus=(0, 1, 4), memory_bytes=1 << 20),
        NumaNode(number=1, cpus=(), memory_bytes=2 << 20),
    )


@pytest.mark.parametrize(
    ("text", "cpus"), [("", ()), ("3", (3,)), ("0-2,7", (0, 1, 2, 7)), ("x", ())]
)
def test_lists_of_cpus(text: str, cpus: tuple[int, ...]) -> None:
    assert cpu_list(text) == cpus


def test_a_machine_without_sys_has_nothing(tmp_path: Path) -> None:
    found = read_topology(
        tmp_path, FakeNvml(refuses=NvmlError(12, "NVML Shared Library Not Found"))
    )
    assert found.nics == found.rdma == found.numa == found.gpus == ()
    assert found.driver_problem == ""


def test_a_driver_that_does_not_answer_is_told(tmp_path: Path) -> None:
    broken = FakeNvml(refuses=NvmlError(18, "Driver/library version mismatch"))
    assert read_topology(tmp_path, broken).driver_problem == "Driver/library version mismatch"
    write(tmp_path, proc__driver__nvidia__version="NVRM version: 580.65.06")
    missing = FakeNvml(refuses=NvmlError(12, "NVML Shared Library Not Found"))
    assert read_topology(tmp_path, missing).driver_problem == "NVML Shared Library Not Found"


def test_gpus_joined_by_links_of_their_own(tmp_path: Path) -> None:
    nvml = FakeNvml([h100(0, peer=1), h100(1, peer=0)], {("P2PStatus", 0, 1): 0})
    write(tmp_path / "sys/bus/pci/devices/0000:11:00.0", numa_node="1")
    found = read_topology(tmp_path, nvml)
    assert nvml.num_open == 0
    assert (found.driver, found.driver_cuda) == ("580.65.06", (13, 0))
    first, second = found.gpus
    assert (first.numa_node, second.numa_node) == (None, 1)
    assert (first.nvlinks, first.nvlink_bytes_per_s) == (4, 100e9)
    assert (first.power_limit_w, first.clock_hz, first.temperature_c) == (700.0, 1.98e9, 41)
    assert first.pcie is not None and first.pcie.label == "gen 5 x16"
    (pair,) = found.pairs
    assert (pair.connection, pair.bytes_per_s, pair.peer_to_peer) == ("nvlink", 100e9, True)


def test_gpus_joined_by_switches(tmp_path: Path) -> None:
    found = read_topology(tmp_path, FakeNvml([h100(0), h100(1)]))
    (pair,) = found.pairs
    assert (pair.connection, pair.bytes_per_s, pair.peer_to_peer) == ("nvswitch", 450e9, None)


def test_gpus_joined_by_pcie_alone(tmp_path: Path) -> None:
    narrow = h100(1, NvLinkState={}, CurrPcieLinkWidth=4, MaxPcieLinkWidth=8)
    pairs = {("TopologyCommonAncestor", 0, 1): 30, ("P2PStatus", 0, 1): 5}
    found = read_topology(tmp_path, FakeNvml([h100(0, NvLinkState={}), narrow], pairs))
    (pair,) = found.pairs
    assert (pair.connection, pair.peer_to_peer) == ("bridge", False)
    assert pair.bytes_per_s == 8 * 3.938e9
    assert found.pair(1, 0) == pair


def test_why_clocks_are_held_back(tmp_path: Path) -> None:
    hot, idle = h100(0, CurrentClocksEventReasons=0x44), h100(1, CurrentClocksEventReasons=0x1)
    found = read_topology(tmp_path, FakeNvml([hot, idle])).gpus
    assert found[0].held_back == ("power cap", "heat (hardware)")
    assert [gpu.is_idle for gpu in found] == [False, True]


def test_an_old_card_that_says_almost_nothing(tmp_path: Path) -> None:
    said = h100(0)
    card = {name: said[name] for name in ("Name", "UUID", "PciInfo")}
    (gpu,) = read_topology(tmp_path, FakeNvml([card])).gpus
    assert (gpu.compute_capability, gpu.pcie, gpu.power_limit_w) == (None, None, None)
    assert (gpu.nvlinks, gpu.is_persistent, gpu.is_idle, gpu.memory_bytes) == (0, None, True, 0)


@pytest.mark.parametrize(
    ("version", "capability", "expected"),
    [
        (5, (8, 0), 25e9),
        (6, (9, 0), 25e9),
        (7, (10, 0), 50e9),
        (5, (8, 6), 14.0625e9),
        (99, (9, 9), 0),
    ],
    ids=["A100", "H100", "B200", "RTX 3090", "not known yet"],
)
def test_nvlinks_are_numbered_by_version_and_not_by_generation(
    tmp_path: Path, version: int, capability: tuple[int, int], expected: float
) -> None:
    said = {"NvLinkVersion": dict.fromkeys(range(4), version), "CudaComputeCapability": capability}
    found = read_topology(tmp_path, FakeNvml([h100(0, 1, **said), h100(1, 0, **said)]))
    assert found.gpus[0].nvlink_bytes_per_s == 4 * expected
    assert (found.pairs[0].connection, found.pairs[0].bytes_per_s) == ("nvlink", 4 * expected)


def test_a_gpu_that_fell_off_the_bus_is_told_and_the_others_count(tmp_path: Path) -> None:
    found = read_topology(tmp_path, FakeNvml([h100(0), {}, h100(2)]))
    assert [gpu.index for gpu in found.gpus] == [0, 2]
    assert found.lost == ("1 (GPU is lost)",)
    assert found.pair(0, 2) is not None


def test_a_gpu_on_no_bus_with_an_old_library_and_driver(tmp_path: Path) -> None:
    """A Jetson; names in bytes; clocks by the question's older name."""
    card = {"Name": b"Orin", "CurrentClocksThrottleReasons": 0x40}
    (gpu,) = read_topology(tmp_path, FakeNvml([card])).gpus
    assert (gpu.name, gpu.uuid, gpu.pci_address) == ("Orin", "", "")
    assert (gpu.held_back, gpu.is_idle) == (("heat (hardware)",), False)


def test_cards_without_their_driver_and_of_other_makers(tmp_path: Path) -> None:
    cards = {
        "0000:01:00.0": ("0x10de", "0x030000"),
        "0000:01:00.1": ("0x10de", "0x040300"),  # its sound
        "0000:02:00.0": ("0x10de", "0x030200"),  # lent to a virtual machine
        "0000:03:00.0": ("0x1002", "0x038000"),
        "0000:04:00.0": ("0x1a03", "0x030000"),  # a server's own
    }
    for address, (vendor, kind) in cards.items():
        write(tmp_path / "sys/bus/pci/devices" / address, vendor=vendor, **{"class": kind})
    driver = tmp_path / "sys/bus/pci/drivers/vfio-pci"
    driver.mkdir(parents=True)
    (tmp_path / "sys/bus/pci/devices/0000:02:00.0/driver").symlink_to(driver)
    missing = FakeNvml(refuses=NvmlError(12, "NVML Shared Library Not Found"))
    found = read_topology(tmp_path, missing)
    assert (found.undriven, found.driver_problem) == (("0000:01:00.0",), "")
    assert found.foreign == ("AMD 0000:03:00.0",)
    assert read_topology(tmp_path, FakeNvml([h100(0)])).undriven == ()


def test_a_bond_stands_for_its_parts(tmp_path: Path) -> None:
    interface(tmp_path, "bond0", None, operstate="up", mtu="9000")
    for number, speed in enumerate(("100000", "25000")):
        card = slot(tmp_path, f"0000:0{number + 1}:00.0", numa_node="0")
        interface(tmp_path, f"eth{number}", card, speed=speed, operstate="up", mtu="9000")
        real = (tmp_path / f"sys/class/net/eth{number}").resolve()
        (real / "master").symlink_to((tmp_path / "sys/class/net/bond0").resolve())
    interface(tmp_path, "docker0", None, operstate="up", mtu="1500")
    found = read_topology(tmp_path, FakeNvml(refuses=NvmlError(12)))
    assert [(nic.name, nic.bytes_per_s) for nic in found.network_cards] == [("bond0", 12.5e9)]
