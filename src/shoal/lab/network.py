"""Hosts as Linux network namespaces, each pair joined by a wire of its own.

    namespace a                              namespace b
    lo 10.77.0.1 ── eth-b ══ veth pair ══ eth-a ── lo 10.77.0.2
                     tbf: 20 Mbit/s         tbf: 20 Mbit/s

Namespaces see neither each other but over these wires, nor the machine's own network. A wire is
slowed at both ends by a token bucket, and cut by queues that hold nothing: what is sent is lost
without a word, as when a switch dies. Their names begin with the lab's, so that a lab is taken
down whole even if nobody knows how far it came. Knows nothing of what runs there.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path

from shoal.core.errors import ConfigError
from shoal.lab.file import LinkSpeed, Pair

_QUEUE_S = 0.4
_LEAST_BURST_BYTES = 4096
_BURST_S = 0.005


class Network:
    """The namespaces of a lab.

    Args:
        prefix: of their names; of no other lab's.
    """

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix

    def why_not(self) -> str | None:
        """What keeps this machine from having namespaces; None: nothing."""
        for tool in ("ip", "tc"):
            if shutil.which(tool) is None:
                return f"there is no {tool} command (iproute2)"
        if os.geteuid() != 0:
            return "not root"
        probe = f"{self._prefix}probe"
        try:
            _run("ip", "netns", "add", probe)
            _run("tc", "-n", probe, "qdisc", "add", "dev", "lo", "root", "tbf", *_bucket(1e6))
        except ConfigError as error:
            return str(error)
        finally:
            with contextlib.suppress(ConfigError):
                _run("ip", "netns", "del", probe)
        return None

    def create(self, hosts: Sequence[str], links: Mapping[Pair, LinkSpeed]) -> None:
        """Make the hosts and a wire for each pair of them."""
        for host in hosts:
            _run("ip", "netns", "add", self._name(host))
            _run("ip", "-n", self._name(host), "link", "set", "lo", "up")
            address = f"{self.address(hosts, host)}/32"
            _run("ip", "-n", self._name(host), "addr", "add", address, "dev", "lo")
        for one, other in combinations(hosts, 2):
            ends = ("netns", self._name(one), "type", "veth", "peer", "name", f"eth-{one}")
            _run("ip", "link", "add", f"eth-{other}", *ends, "netns", self._name(other))
            for here, there in ((one, other), (other, one)):
                self._connect(hosts, here, there)
        for (one, other), speed in links.items():
            self.heal(one, other, speed)

    def remove(self) -> list[str]:
        """End what still runs there, remove all of it; the names of what there was."""
        if shutil.which("ip") is None:
            return []
        names = [name for name in _namespaces() if name.startswith(self._prefix)]
        for name in names:
            for pid in _run("ip", "netns", "pids", name).split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            _run("ip", "netns", "del", name)
        return names

    def command(self, host: str) -> tuple[str, ...]:
        """What goes before the argv of a process that shall run there; its id stays the same."""
        return ("ip", "netns", "exec", self._name(host))

    def address(self, hosts: Sequence[str], host: str) -> str:
        return f"10.77.0.{hosts.index(host) + 1}"

    def cut(self, one: str, other: str) -> None:
        """Lose all that is sent between two hosts."""
        for here, there in ((one, other), (other, one)):
            self._queue(here, there, "replace", "pfifo", "limit", "0")

    def heal(self, one: str, other: str, speed: LinkSpeed) -> None:
        """Let it pass again, at the wire's speed."""
        for here, there in ((one, other), (other, one)):
            if speed.bandwidth_bytes_per_s is None:
                self._queue(here, there, "replace", "pfifo", "limit", "1000")
            else:
                self._queue(here, there, "replace", "tbf", *_bucket(speed.bandwidth_bytes_per_s))

    def _connect(self, hosts: Sequence[str], here: str, there: str) -> None:
        name, device = self._name(here), f"eth-{there}"
        _run("ip", "-n", name, "link", "set", device, "up")
        own, target = self.address(hosts, here), f"{self.address(hosts, there)}/32"
        _run("ip", "-n", name, "route", "add", target, "dev", device, "src", own)

    def _queue(self, here: str, there: str, verb: str, *kind: str) -> None:
        _run("tc", "-n", self._name(here), "qdisc", verb, "dev", f"eth-{there}", "root", *kind)

    def _name(self, host: str) -> str:
        return f"{self._prefix}{host}"


def _bucket(bytes_per_s: float) -> tuple[str, ...]:
    burst = max(int(bytes_per_s * _BURST_S), _LEAST_BURST_BYTES)
    rate = f"{int(bytes_per_s * 8)}bit"
    return ("rate", rate, "burst", str(burst), "latency", f"{_QUEUE_S * 1000:.0f}ms")


def _namespaces() -> list[str]:
    folder = Path("/run/netns")
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def _run(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"{' '.join(command)}: {error}") from error
    if done.returncode:
        raise ConfigError(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")
    return done.stdout
