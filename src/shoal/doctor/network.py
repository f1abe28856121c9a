"""Checks of network cards: which is used, how fast it is, RDMA.

Knows nothing of GPUs' own links, or of where facts come from.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from shoal.cluster.topology import Nic
from shoal.doctor.facts import Machine
from shoal.doctor.finding import Check, Verdict, fail, gigabits, ok, skipped, warn

_SLOW_BYTES_PER_S = 1.2e9
_FRAMES_FROM_BYTES_PER_S = 3e9
_USUAL_MTU = 1500
_ONE_MACHINE = "no network card with a link: this machine serves alone"


def _speed(machine: Machine) -> Iterator[Verdict]:
    known = [nic for nic in _cards(machine) if nic.bytes_per_s]
    if not known:
        virtual = [nic.name for nic in _cards(machine)]
        yield skipped(
            f"{', '.join(virtual)} does not say its speed (virtual machines' don't): `shoal probe` "
            "measures it"
            if virtual
            else _ONE_MACHINE
        )
        return
    best = _fastest(known)
    found = f"the fastest is {best.name} ({best.driver}), {gigabits(best.bytes_per_s or 0)}"
    if (best.bytes_per_s or 0) < _SLOW_BYTES_PER_S:
        yield warn(found, "between machines share out layers (pipeline stages), not single layers")
    else:
        yield ok(found)


def _slots(machine: Machine) -> Iterator[Verdict]:
    known = [nic for nic in machine.topology.nics if nic.is_up and nic.pcie is not None]
    if not known:
        yield skipped("no network card says how it is connected")
    for nic in known:
        pcie, rate = nic.pcie, nic.bytes_per_s or 0.0
        assert pcie is not None, "chosen so"
        if pcie.bytes_per_s < rate:
            yield warn(
                f"{nic.name} has {gigabits(rate)}, but its PCIe {pcie.label} carries "
                f"{gigabits(pcie.bytes_per_s)}; it could be {pcie.max_label}",
                "move the card to a wider slot",
            )
        else:
            yield ok(f"{nic.name}: PCIe {pcie.label} is enough for it")


def _chosen(machine: Machine) -> Iterator[Verdict]:
    pattern, cards = machine.variable("NCCL_SOCKET_IFNAME"), _cards(machine)
    if not pattern:
        if not machine.topology.gpus:
            yield skipped("only NCCL chooses by itself, and there is no GPU; shoal names one")
        elif len(cards) > 1:
            yield warn(
                f"NCCL may take any of {', '.join(nic.name for nic in cards)}",
                f"for GPUs on several machines: export NCCL_SOCKET_IFNAME=={_fastest(cards).name}, "
                "if that is your private network",
            )
        else:
            yield ok("there is one network card to choose" if cards else _ONE_MACHINE)
        return
    chosen = [nic for nic in machine.topology.nics if _matches(nic.name, pattern)]
    said = f"NCCL_SOCKET_IFNAME={pattern}"
    up = [nic for nic in chosen if nic.is_up]
    if not up:
        yield fail(
            f"{said} matches "
            + ("no interface" if not chosen else "only interfaces that are down"),
            "name one that is up" + "".join(f", {nic.name}" for nic in cards),
        )
        return
    best, fastest = _fastest(up), _fastest(cards) if cards else _fastest(up)
    if (best.bytes_per_s or 0) < (fastest.bytes_per_s or 0):
        yield warn(
            f"{said} takes {best.name}; {fastest.name} is faster "
            f"({gigabits(fastest.bytes_per_s or 0)})",
            f"export NCCL_SOCKET_IFNAME=={fastest.name}, if that is your private network",
        )
    else:
        yield ok(f"{said} takes {', '.join(nic.name for nic in up)}")


def _gloo(machine: Machine) -> Iterator[Verdict]:
    name = machine.variables.get("GLOO_SOCKET_IFNAME", "")
    names = {nic.name for nic in machine.topology.nics} | {"lo"}
    if not name:
        yield ok("GLOO_SOCKET_IFNAME is not set; shoal names an interface itself")
    elif name.startswith(("^", "=")) or not set(name.split(",")) <= names:
        yield warn(
            f"GLOO_SOCKET_IFNAME={name} names no interface of this machine",
            "unset it, or name one as it is: gloo has no ^ and = as NCCL does",
        )
    else:
        yield ok(f"GLOO_SOCKET_IFNAME={name}")


def _frames(machine: Machine) -> Iterator[Verdict]:
    fast = [nic for nic in _cards(machine) if (nic.bytes_per_s or 0) >= _FRAMES_FROM_BYTES_PER_S]
    if not fast:
        yield skipped("no card has 25 Gbit/s or more")
    for nic in fast:
        if nic.mtu <= _USUAL_MTU:
            yield warn(
                f"{nic.name} has {gigabits(nic.bytes_per_s or 0)} and sends frames of {nic.mtu} "
                "bytes",
                f"ip link set {nic.name} mtu 9000, on all machines and the switch between",
            )
        else:
            yield ok(f"{nic.name} sends frames of {nic.mtu} bytes")


def _rdma(machine: Machine) -> Iterator[Verdict]:
    ports = machine.topology.rdma
    if not ports:
        yield skipped("there is no RDMA device")
        return
    active = [port for port in ports if port.is_active]
    if not active:
        yield warn(
            f"{', '.join(port.device for port in ports)}: no port is active",
            "plug the cable in, and on InfiniBand start a subnet manager",
        )
    elif machine.has("NCCL_IB_DISABLE") and machine.topology.gpus:
        yield warn(
            f"{', '.join(port.device for port in active)}: unused, NCCL_IB_DISABLE is set",
            "unset NCCL_IB_DISABLE",
        )
    for port in active:
        yield ok(
            f"{port.device} port {port.port}: {port.layer}"
            + (f", {gigabits(port.bytes_per_s)}" if port.bytes_per_s else "")
        )


def _gpu_direct(machine: Machine) -> Iterator[Verdict]:
    active = [port for port in machine.topology.rdma if port.is_active]
    software = machine.software
    if not active or not machine.topology.gpus:
        yield skipped("there are not both an active RDMA port and a GPU")
    elif software.peer_memory or software.open_driver:
        way = "nvidia_peermem" if software.peer_memory else "DMA-BUF (open kernel modules)"
        yield ok(f"RDMA reaches GPU memory by {way}")
    else:
        yield warn(
            "neither nvidia_peermem nor NVIDIA's open kernel modules are loaded",
            "modprobe nvidia_peermem",
        )


def _cards(machine: Machine) -> Sequence[Nic]:
    return machine.topology.network_cards


def _fastest(nics: Sequence[Nic]) -> Nic:
    return max(nics, key=lambda nic: nic.bytes_per_s or 0.0)


def _matches(name: str, pattern: str) -> bool:
    """As NCCL reads it: prefixes, exact after =, and ^ before the list is all others."""
    negative = pattern.startswith("^")
    body = pattern[1:] if negative else pattern
    exact = body.startswith("=")
    names = [each for each in (body[1:] if exact else body).split(",") if each]
    found = any(name == each if exact else name.startswith(each) for each in names)
    return found != negative


NETWORK_CHECKS: tuple[Check[Machine], ...] = (
    Check(
        "network speed",
        "two sums of every layer cross it where machines share layers; a stage sends one state",
        _speed,
    ),
    Check("network slots", "a card is as fast as the lanes behind it", _slots),
    Check(
        "network choice",
        "NCCL listens there without authentication, and takes the first interface that it likes",
        _chosen,
    ),
    Check("gloo interface", "gloo takes the names of interfaces, and no pattern", _gloo),
    Check("frames", "small frames cost the CPU of fast networks", _frames),
    Check("rdma", "its messages skip the kernel and its copies", _rdma),
    Check("gpu rdma", "else each message is copied through the host's memory", _gpu_direct),
)
