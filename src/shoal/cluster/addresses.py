"""Which of this machine's addresses a cluster uses: a private one, and never a guess among several.

Knows nothing of what listens there.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping

from shoal.comm.interfaces import VIRTUAL, is_private, private_addresses
from shoal.core.errors import ConfigError


def choose_address(
    interface: str | None, address: str | None, found: Mapping[str, str] | None = None
) -> tuple[str, str]:
    """The interface and the address to use.

    Args:
        interface, address: as the user named them.
        found: what `private_addresses` gives.

    Raises:
        ConfigError: it is not clear which, or not private.
    """
    found = private_addresses() if found is None else found
    shown = ", ".join(f"{name} ({each})" for name, each in found.items()) or "none"
    if address is not None:
        if not is_private(address):
            raise ConfigError(
                f"--address {address} is not a private address; Ray and collectives open ports "
                f"there: use one of a private network. Here there are: {shown}"
            )
        return next((name for name, each in found.items() if each == address), "?"), address
    if interface is not None:
        if interface not in found:
            raise ConfigError(
                f"--interface {interface} has no private IPv4 address here; there are: {shown}"
            )
        return interface, found[interface]
    real = {name: each for name, each in found.items() if not name.startswith(VIRTUAL)}
    if len(real) == 1:
        return next(iter(real.items()))
    if not real:
        raise ConfigError(
            "this machine has no private IPv4 address but loopback; connect it to a private "
            "network, or name an address of one with --address"
        )
    raise ConfigError(f"several interfaces would do: {shown}; choose one with --interface NAME")


def address_towards(head: str) -> str:
    """This machine's address on the way to another one; nothing is sent.

    Raises:
        ConfigError: there is no way.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((head, 9))
            return str(probe.getsockname()[0])
        except OSError as error:
            raise ConfigError(
                f"{head} cannot be reached from here ({error}); are the two machines on one "
                "network?"
            ) from error


def free_port(address: str) -> int:
    """A port that nobody listens on just now."""
    with socket.socket() as probe:
        try:
            probe.bind((address, 0))
        except OSError as error:
            raise ConfigError(
                f"{address} is no address of this machine ({error}); name one with --address"
            ) from error
        return int(probe.getsockname()[1])
