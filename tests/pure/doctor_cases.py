"""Machines for checks of `shoal doctor`: facts that trip a check, and facts that don't."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from shoal.cluster.topology import Gpu, GpuPair, Nic, NumaNode, PcieLink, RdmaPort, Topology
from shoal.doctor.facts import Machine, Memory, Processor, Room, Software

FULL = PcieLink(generation=5, width=16, max_generation=5, max_width=16)
GPU = Gpu(
    index=0,
    name="NVIDIA H100",
    uuid="x",
    pci_address="0000:10:00.0",
    compute_capability=(9, 0),
    memory_bytes=80 << 30,
    free_bytes=79 << 30,
    pcie=FULL,
    power_limit_w=700.0,
    default_power_limit_w=700.0,
    is_persistent=True,
    is_idle=False,
)
CARD = Nic(name="eth0", is_up=True, bytes_per_s=12.5e9, driver="mlx5_core", mtu=9000, pcie=FULL)
BOND = (
    Nic(name="bond0", is_up=True, bytes_per_s=25e9, mtu=9000, is_virtual=True),
    replace(CARD, master="bond0"),
    replace(CARD, name="eth1", master="bond0"),
    Nic(name="docker0", is_up=True, mtu=1500, is_virtual=True),
    Nic(name="veth1", is_up=True, bytes_per_s=1.25e9, is_virtual=True, master="docker0"),
)
PORT = RdmaPort(device="mlx5_0", port=1, is_active=True, layer="InfiniBand", bytes_per_s=25e9)
APART = GpuPair(a=0, b=1, connection="bridge", peer_to_peer=False)
PEERS = GpuPair(a=0, b=1, connection="bridge", peer_to_peer=True)
LINKED = GpuPair(a=0, b=1, connection="nvlink", peer_to_peer=True)
GOOD = Software(
    python="3.11.7",
    shoal="0.1.0",
    torch="2.13.0",
    torch_cuda=(13, 0),
    kernels="avx512",
    has_triton=True,
)


def machine(*gpus: Gpu, **parts: Any) -> Machine:
    """A machine with some GPUs; `pairs`, `nics` and the like go into its topology."""
    inside = {name: parts.pop(name) for name in list(parts) if name in Topology.__slots__}
    topology = Topology(
        gpus=tuple(replace(gpu, index=index) for index, gpu in enumerate(gpus)),
        **{"driver": "580.65", "driver_cuda": (13, 0), **inside},
    )
    return Machine(**{"name": "here", "software": GOOD, "topology": topology, **parts})


def cpu(**facts: Any) -> Machine:
    return machine(processor=Processor(num_cpus=8, **facts))


def memory(**facts: Any) -> Machine:
    return machine(
        memory=Memory(**{"total_bytes": 100 << 30, "available_bytes": 90 << 30, **facts})
    )


def software(*gpus: Gpu, pairs: Sequence[GpuPair] = (), **facts: Any) -> Machine:
    return machine(*gpus, pairs=tuple(pairs), software=replace(GOOD, **facts))


def environment(
    *gpus: Gpu, pairs: Sequence[GpuPair] = (), nics: Sequence[Nic] = (), **variables: str
) -> Machine:
    return machine(
        *gpus,
        pairs=tuple(pairs),
        nics=tuple(nics),
        variables=variables,
        processor=Processor(num_cpus=8),
    )


def gpu(**facts: Any) -> Machine:
    return machine(replace(GPU, **facts))


def node(number: int, *cpus: int) -> NumaNode:
    return NumaNode(number=number, cpus=cpus, memory_bytes=1 << 30)


CASES: list[tuple[str, Machine, str, str]] = [
    ("cpu kernels", machine(), "ok", "avx512"),
    ("cpu kernels", software(kernels="", kernels_problem="not built"), "warn", "not built"),
    ("cpu kernels", software(kernels="", torch_problem="no libc"), "skipped", "no libc"),
    ("cpu instructions", cpu(flags=frozenset({"avx2", "avx512f"})), "ok", "avx512f"),
    ("cpu instructions", cpu(flags=frozenset({"avx2"})), "warn", "neither AVX-512"),
    ("cpu instructions", cpu(flags=frozenset({"asimd", "fp"})), "warn", "an ARM"),
    (
        "cpu instructions",
        machine(GPU, processor=Processor(flags=frozenset({"asimd"}))),
        "skipped",
        "its GPUs serve",
    ),
    (
        "cpu kernels",
        machine(
            software=replace(GOOD, kernels="", kernels_problem="not built"),
            processor=Processor(flags=frozenset({"asimd"})),
        ),
        "skipped",
        "an ARM",
    ),
    ("cpu instructions", cpu(flags=frozenset({"sse2"})), "fail", "no AVX2"),
    ("cpu instructions", cpu(), "skipped", "does not list"),
    ("cpu quota", cpu(quota_cpus=8.0), "ok", "8 CPUs"),
    ("cpu quota", cpu(quota_cpus=2.5), "warn", "2.5 CPUs' worth"),
    ("cpu frequency", cpu(), "skipped", "no frequency control"),
    ("cpu frequency", cpu(governors=("performance",)), "ok", "performance"),
    (
        "cpu frequency",
        cpu(governors=("powersave",), frequency_driver="acpi-cpufreq"),
        "warn",
        "powersave",
    ),
    (
        "cpu frequency",
        cpu(governors=("powersave",), frequency_driver="intel_pstate"),
        "ok",
        "intel_pstate",
    ),
    ("numa", machine(numa=(node(0, 0, 1),)), "ok", "one"),
    ("numa", machine(numa=(node(0, 0), node(1))), "ok", "one"),
    ("numa", machine(numa=(node(0, 0), node(1, 1))), "warn", "2 NUMA nodes"),
    ("huge pages", memory(huge_pages="madvise"), "ok", "madvise"),
    ("huge pages", memory(huge_pages="never"), "warn", "off"),
    ("huge pages", memory(), "skipped", "nothing"),
    ("memory", memory(), "ok", "96.6 GB of 107.4 GB"),
    ("memory", memory(available_bytes=5 << 30), "warn", "5.4 GB"),
    ("memory", memory(available_bytes=1 << 29), "fail", "0.5 GB"),
    ("memory", memory(limit_bytes=4 << 30, available_bytes=3 << 30), "ok", "control group"),
    ("overcommit", memory(), "ok", "reserved"),
    ("overcommit", memory(never_overcommits=True), "warn", "is 2"),
    ("open files", machine(room=Room(open_files=None)), "ok", "any"),
    ("open files", machine(room=Room(open_files=20000)), "ok", "20,000"),
    ("open files", machine(room=Room(open_files=1024)), "warn", "1,024"),
    ("open files", machine(room=Room(open_files=1024, most_open_files=1024)), "warn", "1,024"),
    ("open files", machine(room=Room(open_files=100)), "fail", "100"),
    ("locked memory", machine(room=Room(locked_bytes=65536)), "skipped", "no RDMA"),
    (
        "locked memory",
        machine(GPU, rdma=(PORT,), room=Room(locked_bytes=8 << 20)),
        "fail",
        "0.0 GB",
    ),
    ("locked memory", machine(rdma=(PORT,), room=Room(locked_bytes=8 << 20)), "skipped", "no GPU"),
    ("locked memory", machine(GPU, rdma=(PORT,)), "ok", "any"),
    ("shared memory", machine(GPU, room=Room(shm_bytes=64 << 20)), "skipped", "between GPUs"),
    ("shared memory", machine(GPU, GPU, room=Room(shm_bytes=64 << 20)), "warn", "0.1 GB"),
    ("shared memory", machine(GPU, GPU, room=Room(shm_bytes=8 << 30)), "ok", "8.6 GB"),
    ("shared memory", machine(GPU, GPU), "warn", "no /dev/shm"),
    ("swap", memory(swap_used_bytes=1 << 20), "ok", "0.0 GB"),
    ("swap", memory(swap_used_bytes=20 << 30), "warn", "21.5 GB"),
    ("disk", machine(room=Room(cache="/c", cache_free_bytes=50 << 30)), "ok", "53.7 GB"),
    ("disk", machine(room=Room(cache="/c", cache_free_bytes=5 << 30)), "warn", "5.4 GB"),
    ("disk", machine(room=Room(cache="/c", cache_free_bytes=1 << 20)), "fail", "0.0 GB"),
    ("disk", machine(), "skipped", "cannot be asked"),
    ("port", machine(room=Room(port=8000)), "ok", "free"),
    ("port", machine(room=Room(port=8000, port_is_taken=True)), "warn", "taken"),
    ("gpu driver", machine(), "skipped", "no NVIDIA GPU"),
    ("gpu driver", machine(driver_problem="version mismatch"), "fail", "version mismatch"),
    ("gpu driver", machine(undriven=("0000:01:00.0",)), "fail", "0000:01:00.0"),
    ("gpu driver", machine(foreign=("AMD 0000:03:00.0",)), "skipped", "AMD 0000:03:00.0"),
    ("gpu driver", machine(lost=("0 (GPU is lost)",)), "fail", "GPU is lost"),
    ("gpu driver", machine(GPU), "ok", "CUDA 13.0"),
    ("gpu driver", machine(GPU, driver_cuda=(12, 8)), "fail", "runs up to 12.8"),
    ("gpu driver", software(GPU, torch_cuda=(13, 2)), "ok", "wants 13.2"),
    ("gpu driver", software(GPU, torch_cuda=None), "fail", "CPU build"),
    ("gpu driver", software(GPU, torch_problem="libcudart"), "fail", "libcudart"),
    ("gpu driver", machine(GPU, driver_cuda=None), "skipped", "does not say"),
    ("gpu kernels", machine(GPU), "ok", "triton"),
    ("gpu kernels", software(GPU, has_triton=False), "warn", "not installed"),
    ("gpu kernels", software(has_triton=False), "skipped", "no NVIDIA"),
    ("gpu precisions", gpu(), "ok", "fp8"),
    ("gpu precisions", gpu(compute_capability=(8, 0)), "ok", "no fp8"),
    ("gpu precisions", gpu(compute_capability=(7, 5)), "warn", "no bfloat16"),
    ("gpu precisions", gpu(compute_capability=(7, 0)), "fail", "need 7.5"),
    (
        "gpu precisions",
        software(replace(GPU, compute_capability=(7, 0)), torch_cuda=(12, 8)),
        "warn",
        "no bfloat16",
    ),
    ("gpu precisions", gpu(compute_capability=(6, 1)), "fail", "6.1"),
    ("gpu precisions", gpu(compute_capability=None), "skipped", "does not say"),
    ("gpu memory", gpu(), "ok", "84.8 GB of 85.9 GB"),
    ("gpu memory", gpu(free_bytes=40 << 30), "warn", "42.9 GB"),
    ("gpu memory", gpu(memory_bytes=0), "skipped", "does not say"),
    ("gpu power", gpu(), "ok", "700 W"),
    ("gpu power", gpu(power_limit_w=400.0), "warn", "400 W"),
    ("gpu power", gpu(power_limit_w=None), "skipped", "does not say"),
    ("gpu clocks", gpu(held_back=("power cap",)), "ok", "nothing"),
    ("gpu clocks", gpu(held_back=("heat (hardware)",), temperature_c=92), "warn", "92 °C"),
    ("gpu clocks", gpu(held_back=("application clocks",)), "warn", "application clocks"),
    ("gpu persistence", gpu(), "ok", "stays"),
    ("gpu persistence", gpu(is_persistent=False), "warn", "lets go"),
    ("gpu persistence", gpu(is_persistent=None), "skipped", "does not say"),
    ("gpu instances", gpu(), "ok", "no GPU"),
    ("gpu instances", gpu(has_mig=True), "warn", "MIG"),
    ("pcie", gpu(), "ok", "gen 5 x16"),
    ("pcie", gpu(pcie=replace(FULL, width=4)), "warn", "4 PCIe lanes"),
    ("pcie", gpu(pcie=replace(FULL, generation=1)), "warn", "gen 1 x16 under load"),
    ("pcie", gpu(pcie=replace(FULL, generation=1), is_idle=True), "ok", "gen 5 x16"),
    ("pcie", gpu(pcie=None), "skipped", "does not say"),
    ("nvlink", machine(GPU, GPU), "skipped", "no NVLink"),
    ("nvlink", machine(replace(GPU, nvlinks=18), replace(GPU, nvlinks=17)), "fail", "17 NVLinks"),
    ("nvlink", machine(replace(GPU, nvlinks=18, nvlink_bytes_per_s=450e9)), "ok", "3600 Gbit/s"),
    ("peer to peer", machine(GPU), "skipped", "no two"),
    ("peer to peer", machine(GPU, GPU, pairs=(APART,)), "warn", "GPUs 0 and 1"),
    ("peer to peer", machine(GPU, GPU, pairs=(PEERS,)), "ok", "bridge"),
    (
        "peer to peer",
        machine(GPU, GPU, pairs=(replace(PEERS, peer_to_peer=None),)),
        "skipped",
        "does not say",
    ),
    ("iommu", software(GPU, GPU, pairs=[PEERS], translates_peers=True), "warn", "translates"),
    ("iommu", software(GPU, GPU, pairs=[PEERS], translates_peers=False), "ok", "no IOMMU"),
    ("iommu", software(GPU, GPU, pairs=[PEERS]), "skipped", "does not say"),
    ("iommu", software(GPU, GPU, pairs=[LINKED], translates_peers=True), "skipped", "over PCIe"),
    ("gpu order", machine(GPU, GPU), "skipped", "one kind"),
    ("gpu order", machine(GPU, replace(GPU, name="T4")), "warn", "fastest first"),
    (
        "gpu order",
        environment(GPU, replace(GPU, name="T4"), CUDA_DEVICE_ORDER="PCI_BUS_ID"),
        "ok",
        "as nvidia-smi",
    ),
    (
        "gpu and rdma",
        machine(replace(GPU, numa_node=0), rdma=(replace(PORT, numa_node=0),)),
        "ok",
        "its NUMA node",
    ),
    (
        "gpu and rdma",
        machine(replace(GPU, numa_node=1), rdma=(replace(PORT, numa_node=0),)),
        "warn",
        "GPU 0 is",
    ),
    ("gpu and rdma", machine(GPU), "skipped", "no GPU and RDMA"),
    ("network speed", machine(nics=(CARD,)), "ok", "100 Gbit/s"),
    ("network speed", machine(nics=(replace(CARD, bytes_per_s=125e6),)), "warn", "1 Gbit/s"),
    ("network speed", machine(nics=(replace(CARD, bytes_per_s=None),)), "skipped", "measures"),
    ("network speed", machine(nics=(replace(CARD, is_virtual=True),)), "skipped", "alone"),
    ("network slots", machine(nics=(CARD,)), "ok", "gen 5 x16"),
    (
        "network slots",
        machine(nics=(replace(CARD, pcie=replace(FULL, generation=3, width=4)),)),
        "warn",
        "carries",
    ),
    ("network slots", machine(), "skipped", "no network card"),
    ("network choice", machine(GPU, nics=(CARD,)), "ok", "one network card"),
    (
        "network choice",
        machine(GPU, nics=(CARD, replace(CARD, name="ib0"))),
        "warn",
        "any of eth0, ib0",
    ),
    ("network choice", machine(nics=(CARD, replace(CARD, name="ib0"))), "skipped", "no GPU"),
    ("network choice", machine(GPU, nics=BOND), "ok", "one network card"),
    ("network choice", environment(GPU, nics=BOND, NCCL_SOCKET_IFNAME="bond0"), "ok", "bond0"),
    ("network speed", machine(nics=BOND), "ok", "bond0"),
    ("gloo interface", environment(GLOO_SOCKET_IFNAME="^lo,docker"), "warn", "no interface"),
    ("gloo interface", environment(), "ok", "not set"),
    (
        "gloo interface",
        machine(nics=(CARD,), variables={"GLOO_SOCKET_IFNAME": "eth0"}),
        "ok",
        "eth0",
    ),
    ("frames", machine(nics=(CARD,)), "ok", "9000"),
    ("frames", machine(nics=(replace(CARD, mtu=1500),)), "warn", "1500"),
    ("frames", machine(nics=(replace(CARD, bytes_per_s=1.25e9, mtu=1500),)), "skipped", "25"),
    ("rdma", machine(), "skipped", "no RDMA"),
    ("rdma", machine(rdma=(PORT,)), "ok", "200 Gbit/s"),
    ("rdma", machine(rdma=(replace(PORT, is_active=False),)), "warn", "no port"),
    (
        "rdma",
        machine(GPU, rdma=(PORT,), variables={"NCCL_IB_DISABLE": "1"}),
        "warn",
        "mlx5_0: unused",
    ),
    ("rdma", machine(rdma=(PORT,), variables={"NCCL_IB_DISABLE": "0"}), "ok", "200 Gbit/s"),
    ("gpu rdma", machine(GPU), "skipped", "not both"),
    ("gpu rdma", machine(GPU, rdma=(PORT,)), "warn", "neither"),
    (
        "gpu rdma",
        machine(GPU, rdma=(PORT,), software=replace(GOOD, peer_memory=True)),
        "ok",
        "nvidia_peermem",
    ),
    (
        "gpu rdma",
        machine(GPU, rdma=(PORT,), software=replace(GOOD, open_driver=True)),
        "ok",
        "DMA-BUF",
    ),
    ("nccl tuning", environment(), "ok", "by itself"),
    ("nccl tuning", environment(NCCL_PROTO="LL128"), "warn", "NCCL_PROTO=LL128"),
    (
        "nccl tuning",
        machine(files={"/etc/nccl.conf": {"NCCL_ALGO": "Ring"}}),
        "warn",
        "in /etc/nccl.conf",
    ),
    ("nccl transports", environment(NCCL_P2P_DISABLE="1"), "ok", "no way"),
    (
        "nccl transports",
        environment(GPU, GPU, pairs=[PEERS], NCCL_P2P_DISABLE="1"),
        "warn",
        "NCCL_P2P_DISABLE=1",
    ),
    (
        "nccl transports",
        environment(GPU, GPU, pairs=[PEERS], NCCL_P2P_LEVEL="LOC"),
        "warn",
        "NCCL_P2P_LEVEL=LOC",
    ),
    ("nccl transports", environment(NCCL_SHM_DISABLE="1"), "warn", "NCCL_SHM_DISABLE=1"),
    ("debugging", environment(NCCL_DEBUG="WARN"), "ok", "nothing"),
    ("debugging", environment(NCCL_DEBUG="info"), "warn", "NCCL_DEBUG=info"),
    ("debugging", environment(CUDA_LAUNCH_BLOCKING="1"), "warn", "waits for each kernel"),
    ("debugging", environment(CUDA_LAUNCH_BLOCKING="0"), "ok", "nothing"),
    ("openmp threads", environment(), "ok", "not set"),
    ("openmp threads", environment(OMP_NUM_THREADS="8"), "ok", "8 on 8"),
    ("openmp threads", environment(OMP_NUM_THREADS="64"), "warn", "64 on 8"),
    ("openmp threads", environment(OMP_NUM_THREADS="1"), "warn", "1 on 8"),
    ("openmp binding", environment(OMP_PROC_BIND="false"), "ok", "any CPU"),
    ("openmp binding", environment(OMP_PROC_BIND="close"), "warn", "OMP_PROC_BIND=close"),
    ("openmp spinning", environment(KMP_BLOCKTIME="200"), "ok", "sleep"),
    ("openmp spinning", environment(OMP_WAIT_POLICY="ACTIVE"), "warn", "OMP_WAIT_POLICY"),
    ("openmp spinning", environment(KMP_BLOCKTIME="infinite"), "warn", "KMP_BLOCKTIME"),
]
"""Check, facts, status, words of what is found."""
