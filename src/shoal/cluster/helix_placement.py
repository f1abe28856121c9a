"""Which layers Helix gives which machine: its `ilp_sol.ini`.

    [Settings]  offset=2                        machines are counted from 2 on
    [Solution]  compute_node_2=[7, 8, 9, 10]    layers of n0 of the cluster file

Ranges may overlap. Knows nothing of models or of routes.
"""

from __future__ import annotations

import re
from pathlib import Path

from shoal.cluster.helix import parse_ini
from shoal.core.cluster import Cluster, Device
from shoal.core.errors import ConfigError
from shoal.core.split import Range


def read_placement(path: Path, cluster: Cluster) -> list[tuple[Device, Range]]:
    """Devices and their layers, in the cluster's order.

    Raises:
        ConfigError: with the file and key that is to blame.
    """
    parser = parse_ini(path)
    if not parser.has_section("Solution"):
        raise ConfigError(f"{path} has no section [Solution]; give Helix's ilp_sol.ini")
    offset = parser.get("Settings", "offset", fallback="0")
    if not re.fullmatch(r"[0-9]{1,5}", offset):
        raise ConfigError(f"{path}: offset is {offset[:40]!r}; it must be a whole number")
    found: dict[str, Range] = {}
    for key, written in parser.items("Solution"):
        node = re.fullmatch(r"compute_node_([0-9]{1,5})", key)
        if not node or int(node[1]) < int(offset):
            raise ConfigError(f"{path}: {key[:40]} is no compute_node_N, N from {offset} on")
        found[f"n{int(node[1]) - int(offset)}"] = _layers(path, key, written)
    devices = []
    for host, layers in found.items():
        own = [each for each in cluster.devices if each.host == cluster.host(host).name]
        if len(own) != 1:
            raise ConfigError(
                f"{path}: {host} has {len(own)} devices; a placement is read for machines of one"
            )
        devices.append((own[0], layers))
    return sorted(devices, key=lambda each: cluster.devices.index(each[0]))


def _layers(path: Path, key: str, written: str) -> Range:
    numbers = [int(each) for each in re.findall(r"[0-9]{1,5}", written)]
    whole = re.fullmatch(r"\[ *[0-9]{1,5}( *, *[0-9]{1,5})* *\]", written)
    if not whole or numbers != list(range(numbers[0], numbers[-1] + 1)):
        raise ConfigError(
            f"{path}: {key} has layers {written[:40]!r}; they must follow each other: [7, 8, 9]"
        )
    return Range(numbers[0], numbers[-1] + 1)
