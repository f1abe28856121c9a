"""What a link between two workers gives, measured over the interface that it takes.

    interface_of(address), measure(it, round trips over it) → Measured

Knows nothing of how a message goes there and back: it is told.
"""

from __future__ import annotations

import ipaddress
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import psutil

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
        round_trip: seconds that so many bytes take there and back.
    """
    small = statistics.median(round_trip(_SMALL_BYTES) for _ in range(_SMALL_ROUNDS)) / 2
    large = statistics.median(round_trip(_LARGE_BYTES) for _ in range(_LARGE_ROUNDS)) / 2
    # Noise may make the large one no slower; then the link is faster than can be told.
    return Measured(interface, small, (_LARGE_BYTES - _SMALL_BYTES) / max(large - small, 1e-6))
