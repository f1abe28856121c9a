"""Checks of what joins GPUs: PCIe lanes, NVLink, peer-to-peer, how CUDA numbers them.

Knows nothing of networks, or of where facts come from.
"""

from __future__ import annotations

from collections.abc import Iterator

from shoal.cluster.topology import Gpu
from shoal.doctor.facts import Machine
from shoal.doctor.finding import Check, Verdict, fail, gigabits, ok, skipped, warn

_NO_GPU = "no NVIDIA GPU is visible here"
_ONE_GPU = "there are no two GPUs"
_NVLINKS = ("nvlink", "nvswitch")


def _lanes(machine: Machine) -> Iterator[Verdict]:
    if not machine.topology.gpus:
        yield skipped(_NO_GPU)
    for gpu in machine.topology.gpus:
        pcie = gpu.pcie
        if pcie is None:
            yield skipped(f"GPU {gpu.index} does not say how it is connected")
        elif pcie.width < pcie.max_width:
            yield warn(
                f"GPU {gpu.index} runs {pcie.width} PCIe lanes; card and slot have "
                f"{pcie.max_width}",
                "seat the card and its riser again, or move what shares the slot's lanes",
            )
        elif pcie.generation < pcie.max_generation and not gpu.is_idle:
            yield warn(
                f"GPU {gpu.index} runs PCIe {pcie.label} under load; it could be {pcie.max_label}",
                "check riser and cables, and the slot's generation in the BIOS",
            )
        else:
            yield ok(f"GPU {gpu.index}: PCIe {pcie.max_label}")


def _nvlinks(machine: Machine) -> Iterator[Verdict]:
    """Against its like: a card that has fewer links up than another of its name has lost some."""
    gpus = machine.topology.gpus
    if not any(gpu.nvlinks for gpu in gpus):
        yield skipped("no NVLink is up" if gpus else _NO_GPU)
        return
    most: dict[str, int] = {}
    for gpu in gpus:
        most[gpu.name] = max(most.get(gpu.name, 0), gpu.nvlinks)
    for gpu in gpus:
        if gpu.nvlinks < most[gpu.name]:
            yield fail(
                f"GPU {gpu.index} has {gpu.nvlinks} NVLinks up; its like have {most[gpu.name]}",
                "look at `nvidia-smi nvlink -s` and the service nvidia-fabricmanager",
            )
        elif gpu.nvlinks:
            yield ok(
                f"GPU {gpu.index}: {gpu.nvlinks} NVLinks, {gigabits(gpu.nvlink_bytes_per_s)} "
                "each way"
            )


def _peers(machine: Machine) -> Iterator[Verdict]:
    pairs = machine.topology.pairs
    if not pairs:
        yield skipped(_ONE_GPU)
        return
    apart = [pair for pair in pairs if pair.peer_to_peer is False]
    if apart:
        named = ", ".join(f"{pair.a} and {pair.b}" for pair in apart[:4])
        more = f" and {len(apart) - 4} other pairs" if len(apart) > 4 else ""
        yield warn(
            f"GPUs {named}{more} cannot read each other's memory",
            "make them pipeline stages rather than ranks that share layers (consumer cards lack "
            "it by their driver)",
        )
    else:
        said = [pair for pair in pairs if pair.peer_to_peer]
        joins = sorted({pair.connection for pair in pairs})
        yield (
            ok(f"all {len(pairs)} pairs reach each other directly, by {', '.join(joins)}")
            if len(said) == len(pairs)
            else skipped("the driver does not say of all pairs whether they reach each other")
        )


def _translation(machine: Machine) -> Iterator[Verdict]:
    over_pcie = [
        pair
        for pair in machine.topology.pairs
        if pair.peer_to_peer and pair.connection not in (*_NVLINKS, "board")
    ]
    translates = machine.software.translates_peers
    if not over_pcie:
        yield skipped("no two GPUs reach each other over PCIe")
    elif translates is None:
        yield skipped("the kernel does not say whether an IOMMU stands between")
    elif translates:
        yield warn(
            "an IOMMU translates what GPUs send each other over PCIe",
            "boot with iommu=pt (bare metal), and switch ACS off in the BIOS",
        )
    else:
        yield ok("no IOMMU translates what GPUs send each other")


def _order(machine: Machine) -> Iterator[Verdict]:
    kinds = {gpu.name for gpu in machine.topology.gpus}
    order = machine.variables.get("CUDA_DEVICE_ORDER", "")
    if len(kinds) < 2:
        yield skipped("GPUs of one kind are numbered by their slots")
    elif order == "PCI_BUS_ID":
        yield ok("CUDA numbers GPUs as nvidia-smi does")
    else:
        yield warn(
            "GPUs of several kinds, and CUDA numbers the fastest first: cuda:0 need not be the "
            "GPU 0 of nvidia-smi",
            "export CUDA_DEVICE_ORDER=PCI_BUS_ID, wherever shoal is started",
        )


def _near_network(machine: Machine) -> Iterator[Verdict]:
    ports = [port for port in machine.topology.rdma if port.is_active]
    placed = {port.numa_node for port in ports if port.numa_node is not None}
    if not placed or not any(gpu.numa_node is not None for gpu in machine.topology.gpus):
        yield skipped("no GPU and RDMA port say at which NUMA node they are")
        return
    far = [gpu for gpu in machine.topology.gpus if gpu.numa_node not in (*placed, None)]
    if far:
        yield warn(
            f"{_listed(far)} at another NUMA node than every RDMA port",
            "let stages that talk to other hosts begin and end on the other GPUs",
        )
    else:
        yield ok("each GPU has an RDMA port at its NUMA node")


def _listed(gpus: list[Gpu]) -> str:
    named = ", ".join(str(gpu.index) for gpu in gpus)
    return f"GPU {named} is" if len(gpus) == 1 else f"GPUs {named} are"


GPU_LINK_CHECKS: tuple[Check[Machine], ...] = (
    Check("pcie", "layers, KV and sums without NVLink pass these lanes", _lanes),
    Check("nvlink", "a group is as slow as the slowest link in it", _nvlinks),
    Check(
        "peer to peer",
        "without it, each of a layer's two sums goes through the host's memory",
        _peers,
    ),
    Check(
        "iommu",
        "what peers send takes a detour through the CPU then, and on some machines is lost",
        _translation,
    ),
    Check("gpu order", "a plan names GPUs by CUDA's number", _order),
    Check("gpu and rdma", "what crosses from one CPU socket to another is slower", _near_network),
)
