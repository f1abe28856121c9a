"""Measured times of layers beside a Helix cluster file.

    llama2_70b/a100/decode_bs2time.csv      sequences that decode, milliseconds of one layer
    llama2_70b/a100/prompt_bs2time.csv      tokens of prompts, milliseconds of one layer

In 16 bits, on machines of one GPU. Times of machines with several (t4x2) are of tensor parallelism
and are not read. Knows nothing of clusters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from shoal.core.cluster import LayerTimes, Points
from shoal.core.errors import ConfigError

_MAX_BYTES, _MAX_POINTS = 1 << 20, 4096
_SHAPES = {"llama2_70b": (8192, 28672, 64, 8), "llama1_30b": (6656, 17920, 52, 52)}
"""Hidden size, FFN columns, heads, KV heads."""
_ROUNDED = 0.1
"""Longer times are whole milliseconds."""


def read_layer_times(folder: Path, kinds: Mapping[str, str]) -> Iterator[LayerTimes]:
    """Of all models and types of machine that the folder has.

    Args:
        kinds: of device, by the type of machine.

    Raises:
        ConfigError: with file and line.
    """
    for model, (hidden, ffn, heads, kv_heads) in _SHAPES.items():
        for machine, kind in kinds.items():
            own = folder / model / machine.lower()
            if not own.is_dir():
                continue
            yield LayerTimes(
                kind=kind,
                hidden_size=hidden,
                ffn_size=ffn,
                num_heads=heads,
                num_kv_heads=kv_heads,
                precision="float16",
                decode=_points(own / "decode_bs2time.csv"),
                prompt=_points(own / "prompt_bs2time.csv"),
                error=_ROUNDED,
            )


def _points(path: Path) -> Points:
    """Without the first one, which says that nothing takes no time."""
    try:
        with path.open("rb") as stream:
            data = stream.read(_MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(
            f"{path}: {error.strerror}; layer times need it beside the other one"
        ) from error
    lines = data.decode("utf-8", "replace").splitlines()
    if len(data) > _MAX_BYTES or len(lines) > _MAX_POINTS:
        raise ConfigError(f"{path} has more than {_MAX_POINTS} points; give fewer")
    found = [_point(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    points = tuple((count, seconds) for count, seconds in found if count)
    sizes = [count for count, _ in points]
    if not points or sizes != sorted(set(sizes)):
        raise ConfigError(f"{path}: tokens must rise from line to line; sort it")
    return points


def _point(path: Path, number: int, line: str) -> tuple[int, float]:
    count, _, milliseconds = line.partition(",")
    try:
        found = int(count), float(milliseconds) / 1e3
    except ValueError as error:
        raise ConfigError(
            f"{path}:{number}: {line[:40]!r} is no point; write tokens, milliseconds: 250,12"
        ) from error
    if found[0] < 0 or not (0 < found[1] < 1e3 or found == (0, 0.0)):
        raise ConfigError(
            f"{path}:{number}: {line[:40]!r} is no time of a layer; it must be more than 0 ms"
        )
    return found
