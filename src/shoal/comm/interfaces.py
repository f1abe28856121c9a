"""The networks a host is on, and what a link between two workers gives over one of them.

    private_addresses()                           of this host's interfaces
    interface_towards(address)                    the one that messages to a peer take
    measure(interface, round trips) → Measured    and nearest: the best of several

Knows nothing of how a message goes there and back: it is told.
"""

from __future__ import annotations

import ipaddress
import socket
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import psutil

VIRTUAL = ("docker", "br-", "veth", "virbr", "cni", "flannel")
"""What interfaces begin with that lead to no other machine."""

_SMALL_BYTES, _SMALL_ROUNDS = 64, 7
_LARGE_BYTES, _LARGE_ROUNDS = 128 << 10, 3


@dataclass(frozen=True, slots=True)
class Measured:
    """
    Attributes:
        interface: its name.
        latency_s: one way, of a small message.
    """

    interface: str
    latency_s: float
    bandwidth_bytes_per_s: float

    @property
    def message_s(self) -> float:
        """Of a prompt's chunk, one way."""
        return self.latency_s + _LARGE_BYTES / self.bandwidth_bytes_per_s


def private_addresses() -> dict[str, str]:
    """Interface → its first private IPv4 address, of those that are up."""
    is_up = {name for name, stats in psutil.net_if_stats().items() if stats.isup}
    found: dict[str, str] = {}
    for name, addresses in psutil.net_if_addrs().items():
        for each in addresses:
            if each.family == socket.AF_INET and name in is_up and is_private(each.address):
                found.setdefault(name, each.address)
    return found


def other_addresses(address: str) -> tuple[str, ...]:
    """Of this host's other private networks; none if `address` is not on one itself."""
    if not is_private(address):
        return ()
    found = private_addresses()
    return tuple(
        each for name, each in found.items() if each != address and not name.startswith(VIRTUAL)
    )


def is_private(address: str) -> bool:
    """Whether an IPv4 address is of a private network, and not loopback."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    return found.version == 4 and not found.is_global and not found.is_loopback


def interface_towards(address: str) -> str:
    """Name of the interface that messages to an address take; "?": none leads there."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))  # nothing is sent
        except OSError:
            return "?"
        return interface_of(str(probe.getsockname()[0]))


def nearest(measured: Sequence[Measured | None]) -> int:
    """Which takes a message soonest; the first if none was measured."""
    times = [each.message_s if each else float("inf") for each in measured]
    return times.index(min(times))


def interface_of(address: str) -> str:
    """Name of the interface of this host with an address; "?": none has it."""
    wanted = ipaddress.ip_address(address)
    for name, addresses in psutil.net_if_addrs().items():
        for each in addresses:
            try:
                found = ipaddress.ip_address(each.address.partition("%")[0])
            except ValueError:  # of the hardware
                continue
            if found == wanted:
                return name
    return "?"


def measure(interface: str, round_trip: Callable[[int], float]) -> Measured:
    """
    Args:
        round_trip: seconds until so many bytes are there and their receipt is back.
    """
    small = statistics.median(round_trip(_SMALL_BYTES) for _ in range(_SMALL_ROUNDS))
    large = statistics.median(round_trip(_LARGE_BYTES) for _ in range(_LARGE_ROUNDS))
    # Noise may make the large one no slower; then the link is faster than can be told.
    return Measured(interface, small / 2, (_LARGE_BYTES - _SMALL_BYTES) / max(large - small, 1e-6))
