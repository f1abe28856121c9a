"""Network cards, RDMA ports, NUMA nodes and graphics cards, as Linux shows them under /sys.

What is missing or unreadable is left out: containers and virtual machines show a part only. Knows
nothing of drivers or of what any of it is good for.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from shoal.cluster.topology import Nic, NumaNode, PcieLink, RdmaPort

_GENERATIONS = {"2.5": 1, "5.0": 2, "5": 2, "8.0": 3, "16.0": 4, "32.0": 5, "64.0": 6}
"""By GT/s."""

_MAKERS = {"0x10de": "NVIDIA", "0x1002": "AMD"}
_GRAPHICS = ("0x0300", "0x0302", "0x0380", "0x1200")
"""VGA, 3D and other displays, and accelerators."""
_LENT = "vfio-pci"

SCALES_BY_ITSELF = ("intel_pstate", "amd-pstate-epp", "amd_pstate_epp")
"""Drivers of a CPU's frequency whose governor `powersave` holds nothing back."""

_MAX_ENTRIES = 4096
_PCI_ADDRESS = re.compile(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")


def read_nics(root: Path = Path("/")) -> tuple[Nic, ...]:
    """Interfaces but loopback, by name; a bond or bridge is as fast as the fastest of its parts,
    where it does not say."""
    nics = [
        _nic(folder)
        for folder in _folders(root / "sys/class/net")
        if folder.name != "lo" and (folder / "mtu").exists()
    ]
    parts: dict[str, float] = {}
    for nic in nics:
        parts[nic.master] = max(parts.get(nic.master, 0.0), nic.bytes_per_s or 0.0)
    return tuple(replace(nic, bytes_per_s=nic.bytes_per_s or parts.get(nic.name)) for nic in nics)


def read_graphics(root: Path = Path("/")) -> tuple[tuple[str, str], ...]:
    """Maker and PCI address of GPUs of makers that have any of use, by address; but those that are
    lent to a virtual machine."""
    return tuple(
        (_MAKERS[maker], folder.name)
        for folder in _folders(root / "sys/bus/pci/devices")
        if (maker := _text(folder / "vendor")) in _MAKERS
        and _text(folder / "class").startswith(_GRAPHICS)
        and (folder / "driver").resolve().name != _LENT
    )


def read_rdma(root: Path = Path("/")) -> tuple[RdmaPort, ...]:
    """Ports of InfiniBand and RoCE devices."""
    return tuple(
        _rdma_port(device, port)
        for device in _folders(root / "sys/class/infiniband")
        for port in _folders(device / "ports")
        if port.name.isdigit()
    )


def read_numa(root: Path = Path("/")) -> tuple[NumaNode, ...]:
    """By number."""
    folders = _folders(root / "sys/devices/system/node")
    found = [
        NumaNode(
            number=int(folder.name[4:]),
            cpus=cpu_list(_text(folder / "cpulist")),
            memory_bytes=_memory_bytes(_text(folder / "meminfo")),
        )
        for folder in folders
        if re.fullmatch(r"node[0-9]+", folder.name)
    ]
    return tuple(sorted(found, key=lambda node: node.number))


def read_pcie(device: Path) -> PcieLink | None:
    """Of a PCI device's folder: its own lanes, and the least that it and its slot could do."""
    generation = _generation(device / "current_link_speed")
    width = _number(device / "current_link_width")
    max_generation = _generation(device / "max_link_speed")
    max_width = _number(device / "max_link_width")
    if not generation or not width or not max_generation or not max_width or width > 32:
        return None  # virtual devices say 0, 63 or 255 lanes
    slot = device.resolve().parent
    return PcieLink(
        generation=generation,
        width=width,
        max_generation=min(max_generation, _generation(slot / "max_link_speed") or max_generation),
        max_width=min(max_width, _number(slot / "max_link_width") or max_width),
    )


def numa_node(device: Path) -> int | None:
    """Of a PCI device; None: the machine has one, or does not say."""
    found = _number(device / "numa_node")
    return None if found is None or found < 0 else found


def cpu_list(text: str) -> tuple[int, ...]:
    """ "0-3,8" is 0, 1, 2, 3, 8."""
    cpus: list[int] = []
    for first, last in re.findall(r"([0-9]{1,6})(?:-([0-9]{1,6}))?", text):
        cpus += range(int(first), min(int(last or first), int(first) + _MAX_ENTRIES) + 1)
    return tuple(cpus)


def _nic(folder: Path) -> Nic:
    device = folder / "device"
    speed_mbit = _number(folder / "speed")
    return Nic(
        name=folder.name,
        is_up=_text(folder / "operstate") in ("up", "unknown"),
        bytes_per_s=speed_mbit * 1e6 / 8 if speed_mbit and speed_mbit > 0 else None,
        driver=(device / "driver").resolve().name if (device / "driver").exists() else "",
        mtu=_number(folder / "mtu") or 0,
        is_virtual="virtual" in folder.resolve().parts,
        master=(folder / "master").resolve().name if (folder / "master").exists() else "",
        pcie=read_pcie(_pci_device(device)),
        numa_node=numa_node(_pci_device(device)),
    )


def _pci_device(device: Path) -> Path:
    """The card itself: a virtio interface lies in a folder below it."""
    if not device.exists():
        return device
    place = device.resolve()
    above = [each for each in (place, *place.parents) if _PCI_ADDRESS.fullmatch(each.name)]
    return above[0] if above else place


def _rdma_port(device: Path, port: Path) -> RdmaPort:
    rate = re.match(r"([0-9.]+) Gb/sec", _text(port / "rate"))
    nics = _folders(device / "device" / "net")
    return RdmaPort(
        device=device.name,
        port=int(port.name),
        is_active="ACTIVE" in _text(port / "state"),
        layer=_text(port / "link_layer") or "InfiniBand",
        bytes_per_s=float(rate[1]) * 1e9 / 8 if rate else None,
        nic=nics[0].name if nics else None,
        numa_node=numa_node(device / "device"),
    )


def _memory_bytes(meminfo: str) -> int:
    found = re.search(r"MemTotal: *([0-9]+) kB", meminfo)
    return int(found[1]) * 1024 if found else 0


def _generation(path: Path) -> int | None:
    found = re.match(r"([0-9.]+) GT/s", _text(path))
    return _GENERATIONS.get(found[1]) if found else None


def _number(path: Path) -> int | None:
    try:
        return int(_text(path))
    except ValueError:
        return None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:  # an interface that is down has no speed
        return ""


def _folders(path: Path) -> list[Path]:
    try:
        return sorted(path.iterdir())[:_MAX_ENTRIES]
    except OSError:
        return []
