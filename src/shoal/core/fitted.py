"""What was measured of Steps on a kind of device: constants of the cost model, seconds of a layer.

Knows nothing of devices, hosts or links.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from shoal.core.errors import ConfigError

Precision = Literal["float32", "bfloat16", "float16", "fp8", "int8", "int4"]
"""Of weights, activations, KV or products."""

Points = tuple[tuple[int, float], ...]
"""(bytes, seconds), rising in bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Constants:
    """What a roofline leaves out, fitted on one kind of device, engine and precision of weights.

    Attributes:
        eta: share of the memory's bandwidth that is reached.
        layer_s: of a layer, whatever it computes (launches, norms, its part of the sampler).
        mfu: share of the flops that products reach.
        error: mean relative error of what they predict, where they were fitted.
        bandwidth_bytes_per_s, flops_per_s: of the kind (bfloat16), to know what else is like it.
        source: of the measurements.
        device: the one that they were fitted on, by name; "": they are the whole kind's.
        step_s, row_s: of a Step, and of each of its rows that samples, whatever they compute.
        attention: share of the flops that attention reaches; None: as products do.
        exposed: of reading and multiplying, the share of the shorter that the longer does not hide;
            0: all of it is hidden, as a roofline has it.
    """

    kind: str
    engine: str
    precision: Precision
    eta: float
    layer_s: float
    mfu: float
    error: float
    bandwidth_bytes_per_s: float
    flops_per_s: float
    source: str = ""
    device: str = ""
    step_s: float = 0.0
    row_s: float = 0.0
    attention: float | None = None
    exposed: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTimes:
    """Measured seconds of one layer on one device of a kind, by what a Step has of tokens.

    Where there are some they count, and not what a roofline says, whatever the context is.

    Attributes:
        hidden_size, ffn_size, num_heads, num_kv_heads: of the layers that were measured.
        precision: of their weights; those of 16 bits stand for each other.
        decode: (sequences that get a token, seconds).
        prompt: (tokens of prompts, seconds), which come on top.
        error: how far off they may be, as a share.
    """

    kind: str
    hidden_size: int
    ffn_size: int
    num_heads: int
    num_kv_heads: int
    precision: Precision
    decode: Points
    prompt: Points
    error: float = 0.1

    def __post_init__(self) -> None:
        if not self.decode or not self.prompt:
            raise ConfigError(
                f"layer times of {self.kind} have {len(self.decode)} points of decode and "
                f"{len(self.prompt)} of prompt; give at least one of each"
            )
        check_points(f"layer times of {self.kind}: decode", self.decode)
        check_points(f"layer times of {self.kind}: prompt", self.prompt)


def check_points(where: str, points: Points) -> None:
    """
    Raises:
        ConfigError: sizes that don't rise, or times that are not more than 0.
    """
    sizes = [size for size, _ in points]
    if sorted(set(sizes)) != sizes or any(not 0 < time < math.inf for _, time in points):
        raise ConfigError(
            f"the table of {where} must rise in bytes, with times of more than 0; sort it, and "
            "leave sizes out that stand twice"
        )
