"""NVIDIA GPUs as their driver reports them, through NVML (nvidia-ml-py); starts no CUDA.

What a card does not say is left out. Untested on hardware: tests have a pretended NVML. Knows
nothing of what any of it is good for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

from shoal.cluster.sysfs import numa_node, read_graphics, read_nics, read_numa, read_rdma
from shoal.cluster.topology import (
    NARROW_NVLINK_BYTES_PER_S,
    NVLINK_BYTES_PER_S,
    POWER_CAP,
    Connection,
    Gpu,
    GpuPair,
    PcieLink,
    Topology,
)

_MAX_GPUS = 64
_ANCESTORS: Mapping[int, Connection] = {
    0: "board",
    10: "switch",
    20: "switches",
    30: "bridge",
    40: "node",
    50: "system",
}
_HELD_BACK = {
    0x2: "application clocks",
    0x4: POWER_CAP,
    0x8: "hardware slowdown",
    0x20: "heat (driver)",
    0x40: "heat (hardware)",
    0x80: "power brake",
}
_IDLE = 0x1
_READ_CAPABILITY = 0  # nvidia-ml-py 13 has a tuple in its place
_PEER_OK = 0
_SM_CLOCK, _TEMPERATURE = 1, 0
_SWITCH = 2
_LIBRARY_NOT_FOUND = 12
_GA102 = (8, 6)
_NVIDIA = "NVIDIA"


def read_topology(root: Path = Path("/"), nvml: Any = None) -> Topology:
    """All of this machine.

    Args:
        root: of the file system that is read.
        nvml: the module `pynvml`, or one like it; None: that.
    """
    if nvml is None:
        import pynvml

        nvml = pynvml
    machine = Topology(
        nics=read_nics(root),
        rdma=read_rdma(root),
        numa=read_numa(root),
        foreign=tuple(
            f"{maker} {address}" for maker, address in read_graphics(root) if maker != _NVIDIA
        ),
    )
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        return _without_driver(machine, error, root)
    try:
        return _with_gpus(machine, nvml, root)
    finally:
        nvml.nvmlShutdown()


def _without_driver(machine: Topology, error: Any, root: Path) -> Topology:
    has_driver = (root / "proc/driver/nvidia/version").exists()
    if error.value == _LIBRARY_NOT_FOUND and not has_driver:
        ours = (address for maker, address in read_graphics(root) if maker == _NVIDIA)
        return replace(machine, undriven=tuple(ours))
    return replace(machine, driver_problem=str(error))


def _with_gpus(machine: Topology, nvml: Any, root: Path) -> Topology:
    ask = _Asker(nvml)
    handles, gpus, lost = [], [], []
    for index in range(min(int(ask("nvmlDeviceGetCount", default=0)), _MAX_GPUS)):
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            name = _said(nvml.nvmlDeviceGetName(handle))
        except nvml.NVMLError as error:  # fallen off the bus, or not for us
            lost.append(f"{index} ({error})")
            continue
        handles.append(handle)
        gpus.append(_gpu(ask, index, name, handle, root))
    cuda = int(ask("nvmlSystemGetCudaDriverVersion_v2", default=0))
    return replace(
        machine,
        gpus=tuple(gpus),
        lost=tuple(lost),
        pairs=tuple(
            _pair(ask, gpus[a], gpus[b], handles[a], handles[b])
            for a, b in combinations(range(len(gpus)), 2)
        ),
        driver=_said(ask("nvmlSystemGetDriverVersion", default="")),
        driver_cuda=(cuda // 1000, cuda % 1000 // 10) if cuda else None,
    )


class _Asker:
    """Calls NVML; what a card, its driver or this version does not support has the default."""

    def __init__(self, nvml: Any) -> None:
        self.nvml = nvml

    def __call__(self, question: str, *of: Any, default: Any = None) -> Any:
        try:
            return getattr(self.nvml, question)(*of)
        except (self.nvml.NVMLError, AttributeError):
            return default


def _gpu(ask: _Asker, index: int, name: str, handle: Any, root: Path) -> Gpu:
    memory = ask("nvmlDeviceGetMemoryInfo", handle)
    reasons = ask("nvmlDeviceGetCurrentClocksEventReasons", handle)
    if reasons is None:  # as drivers before 535 call it
        reasons = ask("nvmlDeviceGetCurrentClocksThrottleReasons", handle, default=_IDLE)
    capability = ask("nvmlDeviceGetCudaComputeCapability", handle)
    pci = ask("nvmlDeviceGetPciInfo", handle)  # a Jetson's GPU is on no PCI bus
    address = _said(pci.busId) if pci is not None else ""
    links = _active_links(ask, handle)
    return Gpu(
        index=index,
        name=name,
        uuid=_said(ask("nvmlDeviceGetUUID", handle, default="")),
        pci_address=address,
        compute_capability=(int(capability[0]), int(capability[1])) if capability else None,
        memory_bytes=int(memory.total) if memory else 0,
        free_bytes=int(memory.free) if memory else 0,
        pcie=_pcie(ask, handle),
        numa_node=numa_node(root / "sys/bus/pci/devices" / (address.lower()[-12:] or "none")),
        nvlinks=len(links),
        nvlink_bytes_per_s=sum(_link_rate(ask, handle, link) for link in links),
        power_limit_w=_scaled(ask("nvmlDeviceGetEnforcedPowerLimit", handle), 1e-3),
        default_power_limit_w=_scaled(
            ask("nvmlDeviceGetPowerManagementDefaultLimit", handle), 1e-3
        ),
        clock_hz=_scaled(ask("nvmlDeviceGetClockInfo", handle, _SM_CLOCK), 1e6),
        max_clock_hz=_scaled(ask("nvmlDeviceGetMaxClockInfo", handle, _SM_CLOCK), 1e6),
        held_back=tuple(name for bit, name in _HELD_BACK.items() if reasons & bit),
        is_idle=bool(reasons & _IDLE),
        temperature_c=ask("nvmlDeviceGetTemperature", handle, _TEMPERATURE),
        has_mig=bool(ask("nvmlDeviceGetMigMode", handle, default=(0, 0))[0]),
        is_persistent=_truth(ask("nvmlDeviceGetPersistenceMode", handle)),
    )


def _pcie(ask: _Asker, handle: Any) -> PcieLink | None:
    said = [
        ask(question, handle)
        for question in (
            "nvmlDeviceGetCurrPcieLinkGeneration",
            "nvmlDeviceGetCurrPcieLinkWidth",
            "nvmlDeviceGetMaxPcieLinkGeneration",
            "nvmlDeviceGetMaxPcieLinkWidth",
        )
    ]
    if not all(said):
        return None
    generation, width, max_generation, max_width = map(int, said)
    return PcieLink(
        generation=generation, width=width, max_generation=max_generation, max_width=max_width
    )


def _active_links(ask: _Asker, handle: Any) -> list[int]:
    most = int(ask.nvml.NVML_NVLINK_MAX_LINKS)
    return [each for each in range(most) if ask("nvmlDeviceGetNvLinkState", handle, each)]


def _link_rate(ask: _Asker, handle: Any, link: int) -> float:
    capability = ask("nvmlDeviceGetCudaComputeCapability", handle)
    if capability is not None and tuple(capability) == _GA102:
        return NARROW_NVLINK_BYTES_PER_S
    version = ask("nvmlDeviceGetNvLinkVersion", handle, link, default=0)
    return NVLINK_BYTES_PER_S.get(version, 0.0)


def _pair(ask: _Asker, a: Gpu, b: Gpu, first: Any, second: Any) -> GpuPair:
    status = ask("nvmlDeviceGetP2PStatus", first, second, _READ_CAPABILITY)
    connection, rate = _nvlink_between(ask, a, b, first, second)
    if connection is None:
        ancestor = ask("nvmlDeviceGetTopologyCommonAncestor", first, second, default=50)
        connection = _ANCESTORS.get(ancestor, "system")
        rates = [each.pcie.max_bytes_per_s for each in (a, b) if each.pcie is not None]
        rate = min(rates, default=0.0)
    return GpuPair(
        a=a.index,
        b=b.index,
        connection=connection,
        bytes_per_s=rate,
        peer_to_peer=None if status is None else status == _PEER_OK,
    )


def _nvlink_between(
    ask: _Asker, a: Gpu, b: Gpu, first: Any, second: Any
) -> tuple[Connection | None, float]:
    """Links of one that end at the other; or both at switches, which join all."""
    shared = [
        link
        for link in _active_links(ask, first)
        if (end := ask("nvmlDeviceGetNvLinkRemotePciInfo", first, link)) is not None
        and _same_address(_said(end.busId), b.pci_address)
    ]
    if shared:
        return "nvlink", sum(_link_rate(ask, first, link) for link in shared)
    if _has_switch(ask, first) and _has_switch(ask, second):
        return "nvswitch", min(a.nvlink_bytes_per_s, b.nvlink_bytes_per_s)
    return None, 0.0


def _has_switch(ask: _Asker, handle: Any) -> bool:
    return any(
        ask("nvmlDeviceGetNvLinkRemoteDeviceType", handle, link) == _SWITCH
        for link in _active_links(ask, handle)
    )


def _same_address(a: str, b: str) -> bool:
    """Domains are written with four digits or eight."""
    return bool(a) and a.lower()[-12:] == b.lower()[-12:]


def _said(words: Any) -> str:
    """Older versions of NVML's library answer with bytes."""
    return words.decode("utf-8", "replace") if isinstance(words, bytes) else str(words)


def _scaled(value: Any, factor: float) -> float | None:
    return None if value is None else float(value) * factor


def _truth(value: Any) -> bool | None:
    return None if value is None else bool(value)
