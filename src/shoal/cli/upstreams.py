"""Upstreams as the command line names them: `http://a:8000=H100`, their keys, how fast they may be.

A key stands in a file or in the environment, never among the arguments, which every process can
see. Knows nothing of how they are asked.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from shoal.cluster.catalogue import Kind, kind, kinds
from shoal.core.errors import ConfigError
from shoal.core.speed import Speed
from shoal.router.upstream.address import Address, parse_address

_PARAMS = 8e9
_BYTES_PER_PARAM = 2
_BYTES_PER_TOKEN = 131072
_STEP_S = 0.002
_REACHED_BANDWIDTH, _REACHED_FLOPS = 0.7, 0.5
"""Of a model of 8 B parameters, in 16 bits: which model is served nobody says here, and what counts
is how fast upstreams are beside each other, until it was seen."""


@dataclass(frozen=True, slots=True)
class Upstream:
    """
    Attributes:
        speed: expected of its devices; None: they were not named.
    """

    address: Address
    speed: Speed | None


def read_upstreams(
    named: Sequence[str], keys: Sequence[str], environ: Mapping[str, str] | None = None
) -> list[Upstream]:
    """
    Args:
        named: URL or URL=DEVICE,DEVICE.
        keys: [URL=]env:NAME or [URL=]FILE.

    Raises:
        ConfigError: what no upstream can be, one that is named twice, a key that is not there or
            belongs to none.
    """
    by_name = _keys(keys, os.environ if environ is None else environ)
    found: dict[str, Upstream] = {}
    for text in named:
        url, _, devices = text.partition("=")
        bare = parse_address(url)
        key = by_name.get(bare.name, by_name.get(""))
        address = parse_address(url, key)
        if address.name in found:
            raise ConfigError(f"--upstream {url} stands there twice; remove one")
        found[address.name] = Upstream(address, _speed(devices) if devices else None)
    for name in by_name.keys() - found.keys() - {""}:
        raise ConfigError(
            f"--upstream-key names {name}, which is no --upstream; there are {', '.join(found)}"
        )
    return list(found.values())


def read_names(named: Sequence[str]) -> list[tuple[str, str]]:
    """Public names of the model, and what an upstream calls it.

    Raises:
        ConfigError: one is empty.
    """
    pairs = [each.partition("=") for each in named]
    for public, sign, theirs in pairs:
        if not public or (sign and not theirs):
            raise ConfigError(
                f"--model-name {public}{sign}{theirs} lacks a name; write NAME or NAME=THEIRS"
            )
    return [(public, theirs or public) for public, _, theirs in pairs]


def _keys(named: Sequence[str], environ: Mapping[str, str]) -> dict[str, str]:
    """By the name of their upstream, or "" for all others."""
    keys: dict[str, str] = {}
    for text in named:
        url, sign, where = text.rpartition("=")
        name = parse_address(url).name if sign else ""
        if where.startswith("env:"):
            variable = where.removeprefix("env:")
            key = environ.get(variable, "")
            if not key:
                raise ConfigError(
                    f"--upstream-key: {variable} is not set; set it to the key, without quotes"
                )
        else:
            try:
                key = Path(where).read_text("ascii").strip()
            except (OSError, UnicodeDecodeError) as error:
                # Whoever wrote the key itself here should not find it in a log.
                raise ConfigError(
                    "--upstream-key names a file that cannot be read; give env:NAME or the path "
                    "of a file that holds the key"
                ) from error
        keys[name] = key
    return keys


def _speed(devices: str) -> Speed:
    """What several together may reach."""
    found = [_kind(name.strip()) for name in devices.split(",")]
    bandwidth = _REACHED_BANDWIDTH * sum(each.bandwidth_bytes_per_s for each in found)
    flops = _REACHED_FLOPS * sum(_flops(each) for each in found)
    return Speed(
        step_s=_STEP_S + _PARAMS * _BYTES_PER_PARAM / bandwidth,
        token_s=2 * _PARAMS / flops,
        row_s=2 * _PARAMS / flops,
        context_s=_BYTES_PER_TOKEN / bandwidth,
    )


def _flops(device: Kind) -> float:
    """At 16 bits; of one that has no such rate, the least it has."""
    rates = dict(device.flops)
    return rates.get("bfloat16") or rates.get("float16") or min(rates.values())


def _kind(name: str) -> Kind:
    """`H100` is the first of the catalogue's that begin so."""
    families = (each for each in kinds().values() if each.name.startswith(f"{name}-"))
    return kinds().get(name) or next(families, None) or kind(name)
