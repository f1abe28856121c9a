"""`layer_times:` of a cluster file: measured layers of a model's shape on a kind of device.

    layer_times:
      - {kind: T4, hidden: 8192, ffn: 28672, heads: 64, kv_heads: 8, precision: float16,
         decode: {2: 7.1ms, 100: 11.7ms},       # sequences that get a token: time of one layer
         prompt: {250: 18ms, 2000: 128ms}}      # tokens of prompts: time of one layer, on top

Knows nothing of the rest of the file.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import cast, get_args

from shoal.cluster.units import time_s
from shoal.core.cluster import LayerTimes, Points, Precision, check_points
from shoal.core.errors import ConfigError
from shoal.plan_file.fields import Field

_NEEDED = ("kind", "hidden", "ffn", "heads", "kv_heads", "precision", "decode", "prompt")
_MAX_POINTS, _MOST_TOKENS, _MOST_SIZE = 1024, 10_000_000, 1 << 20
_LEAST_S, _MOST_S = 1e-7, 100.0
_MEASURED_ERROR = 0.1


def read_layer_times(field: Field, kinds: Collection[str]) -> LayerTimes:
    """
    Args:
        kinds: of the cluster's devices.

    Raises:
        ConfigError: with file and line.
    """
    entries = field.entries((*_NEEDED, "error"))
    for key in _NEEDED:
        if key not in entries:
            raise field.error(f"layer times have no {key}; they need {', '.join(_NEEDED)}")
    kind = entries["kind"].text()
    if kind not in kinds:
        raise entries["kind"].error(f"the cluster has no device of kind {kind!r}; remove them")
    return LayerTimes(
        kind=kind,
        hidden_size=entries["hidden"].integer(1, _MOST_SIZE),
        ffn_size=entries["ffn"].integer(1, _MOST_SIZE),
        num_heads=entries["heads"].integer(1, _MOST_SIZE),
        num_kv_heads=entries["kv_heads"].integer(1, _MOST_SIZE),
        precision=cast(Precision, entries["precision"].choice(get_args(Precision))),
        decode=_points(entries["decode"]),
        prompt=_points(entries["prompt"]),
        error=entries["error"].number(0.0, 10.0) if "error" in entries else _MEASURED_ERROR,
    )


def _points(field: Field) -> Points:
    pairs = field.pairs()
    if not 1 <= len(pairs) <= _MAX_POINTS:
        raise field.error(f"{field.name} has {len(pairs)} points; give 1 to {_MAX_POINTS}")
    points = tuple(
        sorted(
            (key.integer(1, _MOST_TOKENS), time_s(value, _LEAST_S, _MOST_S)) for key, value in pairs
        )
    )
    try:
        check_points(field.name, points)
    except ConfigError as error:
        raise field.error(str(error)) from error
    return points
