"""Which network interface ranks should use: what there is, and the choice by what was measured.

    candidates() → measure(each, round trips over it) → choose(...) → describe(...)

Knows nothing of how a message goes there and back: it is told.
"""

from __future__ import annotations

import ipaddress
import socket
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import psutil

from shoal.core.errors import CommError

_SMALL_BYTES, _SMALL_ROUNDS = 64, 7
_LARGE_BYTES, _LARGE_ROUNDS = 1 << 20, 3
_USUAL_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class Interface:
    """
    Attributes:
        speed_bits_per_s: what its driver says, if it does.
    """

    name: str
    address: str
    is_loopback: bool
    speed_bits_per_s: float | None


@dataclass(frozen=True, slots=True)
class Measured:
    """
    Attributes:
        latency_s: one way, of a small message.
    """

    interface: Interface
    latency_s: float
    bandwidth_bytes_per_s: float

    def seconds(self, num_bytes: int) -> float:
        """One way."""
        return self.latency_s + num_bytes / self.bandwidth_bytes_per_s


def candidates() -> tuple[Interface, ...]:
    """Interfaces of this host that are up, an entry for each address that can be bound to."""
    addresses, states = psutil.net_if_addrs(), psutil.net_if_stats()
    return tuple(
        Interface(
            name=name,
            address=str(address),
            is_loopback=address.is_loopback,
            speed_bits_per_s=states[name].speed * 1e6 or None,
        )
        for name in sorted(addresses)
        if name in states and states[name].isup
        for address in _bindable([(each.family, each.address) for each in addresses[name]])
    )


def measure(interface: Interface, round_trip: Callable[[int], float]) -> Measured:
    """
    Args:
        round_trip: seconds that so many bytes take there and back, over this interface.
    """
    small = statistics.median(round_trip(_SMALL_BYTES) for _ in range(_SMALL_ROUNDS)) / 2
    large = statistics.median(round_trip(_LARGE_BYTES) for _ in range(_LARGE_ROUNDS)) / 2
    # Noise may make the large one no slower; then the link is faster than can be told.
    return Measured(interface, small, (_LARGE_BYTES - _SMALL_BYTES) / max(large - small, 1e-6))


def choose(measured: Sequence[Measured], num_bytes: int = _USUAL_BYTES) -> Measured:
    """The one that takes a message of `num_bytes` there first.

    Raises:
        CommError: there is none.
    """
    if not measured:
        raise CommError(
            f"no interface reached the peers; this host has {describe(candidates()) or 'none'}: "
            "check that one of them is on the peers' network"
        )
    return min(measured, key=lambda each: each.seconds(num_bytes))


def describe(found: Sequence[Interface | Measured]) -> str:
    """One line for each."""
    return "\n".join(_line(each) for each in found)


def _line(each: Interface | Measured) -> str:
    if isinstance(each, Measured):
        return (
            f"{each.interface.name} {each.interface.address}: {each.latency_s * 1e6:.0f} us, "
            f"{each.bandwidth_bytes_per_s * 8 / 1e6:.0f} Mbit/s measured"
        )
    speed = each.speed_bits_per_s
    said = f"{speed / 1e6:.0f} Mbit/s by its driver" if speed else "speed unknown"
    return f"{each.name} {each.address}: {said}"


def _bindable(
    addresses: Sequence[tuple[int, str]],
) -> Iterator[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    """IPv4 first. Link-local ones mean nothing without their interface."""
    for wanted in (socket.AF_INET, socket.AF_INET6):
        for family, text in addresses:
            if family == wanted:
                address = ipaddress.ip_address(text.partition("%")[0])
                if not address.is_link_local:
                    yield address
