"""Clusters in the file format of Helix (ASPLOS'25, Thesys-lab/Helix-ASPLOS25, Apache-2.0).

    [ComputeNode-0]     type=L4
    [Link-0-1]          bandwidth=1000 * mbps    latency=1 * MilliSec
    machine_profiles.ini, beside it: [L4] vram_size, outbound_nic_speed, disk_speed

Its constants count bytes: mbps is 1e6 bytes/s. Links from and to its source and sink, where
requests come from, are left out; of two directions the slower one counts. Times of layers that lie
beside it are read (`helix_layers.py`). Knows nothing of its placements.
"""

from __future__ import annotations

import configparser
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from shoal.cluster import catalogue
from shoal.cluster.helix_layers import read_layer_times
from shoal.core.cluster import Between, Cluster, Device, Host, Link
from shoal.core.errors import ConfigError

MAX_FILE_BYTES = 1 << 24

_KINDS = {"A100": "A100-40-SXM", "V100": "V100-PCIe", "L4": "L4", "T4": "T4"}
_UNITS = {
    **{"kbps": 1e3, "mbps": 1e6, "gbps": 1e9},
    **{"KB": 1e3, "MB": 1e6, "GB": 1e9},
    **{"Sec": 1.0, "MilliSec": 1e-3, "MicroSec": 1e-6},
}
_MOST = 1e9
"""Of a number before its unit."""
_SHOWN = 60
_PROFILES = "machine_profiles.ini"


@dataclass(frozen=True, slots=True)
class _Profile:
    """Of a type of machine: `vram_bytes` of all of its GPUs."""

    vram_bytes: float
    nic_bytes_per_s: float
    disk_bytes_per_s: float


def read_helix(path: Path) -> Cluster:
    """
    Raises:
        ConfigError: with the file and section that is to blame.
    """
    parser = parse_ini(path)
    profiles = _profiles(path.parent / _PROFILES)
    hosts: list[Host] = []
    devices: list[Device] = []
    nics: dict[str, float] = {}
    for section in parser.sections():
        found = re.fullmatch(r"ComputeNode-([0-9]{1,5})", section)
        if not found:
            continue
        name, kind = f"n{found[1]}", parser.get(section, "type", fallback="")
        if kind not in profiles:
            known = ", ".join(profiles)
            raise ConfigError(
                f"{path}: [{section}] has type {kind[:_SHOWN]!r}; {_PROFILES} has {known[:400]}"
            )
        own, host = _machine(path, section, name, kind, profiles[kind])
        hosts.append(host)
        devices += own
        nics[name] = profiles[kind].nic_bytes_per_s
    links = _links(path, parser, nics)
    network, others = _most_common(links)
    layer_times = tuple(read_layer_times(path.parent, _KINDS))
    try:
        return Cluster(
            hosts=tuple(hosts),
            devices=tuple(devices),
            network=network if len(links) == len(hosts) * (len(hosts) - 1) // 2 else None,
            links=others if len(links) == len(hosts) * (len(hosts) - 1) // 2 else tuple(links),
            constants=catalogue.known_constants(),
            layer_times=layer_times,
        )
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _machine(
    path: Path, section: str, name: str, kind: str, profile: _Profile
) -> tuple[list[Device], Host]:
    """A machine of one GPU, or (T4x2) of several."""
    model, _, count = kind.partition("x")
    is_count = re.fullmatch("[0-9]{1,2}", count or "1") and int(count or 1) in range(1, 17)
    if model not in _KINDS or not is_count:
        raise ConfigError(
            f"{path}: [{section}] has type {kind[:_SHOWN]!r}; {', '.join(_KINDS)} are known, and "
            "several as T4x2"
        )
    known, number = catalogue.kind(_KINDS[model]), int(count or 1)
    memory = min(known.memory_bytes, int(profile.vram_bytes / number))
    devices = [
        replace(known.device(f"{name}.{index}", name, f"cuda:{index}"), memory_bytes=memory)
        for index in range(number)
    ]
    link = known.link("pcie") if number > 1 else None
    tables = catalogue.all_reduce_tables(known.name, "pcie") if number > 1 else ()
    disk = profile.disk_bytes_per_s
    return devices, Host(name=name, link=link, all_reduce=tables, disk_bytes_per_s=disk)


def _links(
    path: Path, parser: configparser.ConfigParser, nics: Mapping[str, float]
) -> list[Between]:
    found: dict[tuple[str, str], Link] = {}
    for section in parser.sections():
        ends = re.fullmatch(r"Link-([0-9]{1,5})-([0-9]{1,5})", section)
        if not ends:
            continue
        a, b = sorted((f"n{ends[1]}", f"n{ends[2]}"))
        for end in (a, b):
            if end not in nics:
                raise ConfigError(f"{path}: [{section}] joins node {end[1:]}, which is not there")
        rate = min(_value(path, parser, section, "bandwidth"), nics[a], nics[b])
        latency = _value(path, parser, section, "latency")
        before = found.get((a, b))
        if before is not None:
            rate, latency = min(rate, before.bytes_per_s), max(latency, before.latency_s)
        found[a, b] = Link(latency_s=latency, bytes_per_s=rate)
    return [Between(a, b, link) for (a, b), link in sorted(found.items())]


def _most_common(links: list[Between]) -> tuple[Link | None, tuple[Between, ...]]:
    """What most pairs have, and the pairs that have something else."""
    if not links:
        return None, ()
    most = Counter(each.link for each in links).most_common(1)[0][0]
    return most, tuple(each for each in links if each.link != most)


def _profiles(path: Path) -> dict[str, _Profile]:
    parser = parse_ini(path)
    return {
        section: _Profile(
            _value(path, parser, section, "vram_size"),
            _value(path, parser, section, "outbound_nic_speed"),
            _value(path, parser, section, "disk_speed"),
        )
        for section in parser.sections()
        if section not in ("SourceNode", "SinkNode")
    }


def _value(path: Path, parser: configparser.ConfigParser, section: str, key: str) -> float:
    """A product such as `10 * gbps`."""
    written = parser.get(section, key, fallback="")
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *\* *([A-Za-z]+)", written)
    if not found or found[2] not in _UNITS or not 0 < float(found[1]) < _MOST:
        raise ConfigError(
            f"{path}: {key} of [{section}] is {written[:_SHOWN]!r}; it must be a product such as "
            f"10 * gbps, with one of {', '.join(_UNITS)}"
        )
    return float(found[1]) * _UNITS[found[2]]


def parse_ini(path: Path) -> configparser.ConfigParser:
    """
    Raises:
        ConfigError: no such file, or no .ini file.
    """
    parser = configparser.ConfigParser(interpolation=None)
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise ConfigError(f"{path} is larger than {MAX_FILE_BYTES} bytes; give a smaller file")
        parser.read_string(data.decode("utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(
            f"{path}: {reason}; a Helix cluster needs its own file and {_PROFILES} beside it"
        ) from error
    except configparser.Error as error:
        problem = " ".join(str(error).split())[:400]
        raise ConfigError(f"{path} is no .ini file: {problem}; mend it") from error
    return parser
