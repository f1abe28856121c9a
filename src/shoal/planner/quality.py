"""What fewer bits cost: how much higher perplexity is with weights in few bits.

    of a precision    ln(perplexity / of 16 bits), as published of a model of these shapes; else by
                      size, c x weights^s: s fitted on int4, which is well above what measuring is
                      off by, c the mean of the precision's rows
    of a mix          the sum over layers, each with its share: small errors of layers add up
                      (HIGGS, arXiv 2411.17525, theorem 1)

All layers count alike, though the first and last ones often matter more. Rows are in quality.json.
Knows nothing of how plans are found.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib import resources

from shoal.core.cluster import Precision
from shoal.core.model_spec import ModelSpec
from shoal.core.split import Range, shards, split_by_weights
from shoal.policy.cost_model.memory import weight_bytes
from shoal.policy.cost_model.numbers import Numbers

_SIXTEEN: tuple[Precision, ...] = ("float32", "bfloat16", "float16")
"""Counted as no loss: Llama-3-8B in float16 is 0.04 % above bfloat16 (llama.cpp)."""
_SLOPE_OF: Precision = "int4"
_SAME_SIZE = 0.05


@dataclass(frozen=True, slots=True)
class Loss:
    """Of a model whose weights are all in one precision.

    Attributes:
        log_ratio: ln(perplexity / perplexity in 16 bits).
        factor: it may be so many times as much; 1: measured on a model of these shapes.
        source: for people.
    """

    log_ratio: float
    factor: float
    source: str


@dataclass(frozen=True, slots=True)
class Row:
    """A published measurement; `shape`: layers, hidden size, vocabulary."""

    model: str
    num_weights: float
    shape: tuple[int, int, int]
    precision: Precision
    log_ratio: float


def loss_of(spec: ModelSpec, precision: Precision) -> Loss:
    """Of weights that were trained in 16 bits, and are all kept in this precision."""
    if precision in _SIXTEEN:
        return Loss(0.0, 1.0, "as trained")
    shape, size = (spec.num_layers, spec.hidden_size, spec.vocab_size), num_weights(spec)
    same = [each for each in rows() if each.precision == precision]
    own = [each for each in same if each.shape == shape and _is_near(each.num_weights, size)]
    if own:
        worst = max(own, key=lambda each: each.log_ratio)
        return Loss(worst.log_ratio, 1.0, f"as measured on {worst.model}")
    slope = _slope()
    scale = sum(each.log_ratio * each.num_weights**-slope for each in same) / len(same)
    factor = max(each.log_ratio / (scale * each.num_weights**slope) for each in same)
    names = ", ".join(dict.fromkeys(each.model for each in same))
    return Loss(scale * size**slope, max(factor, 1.0), f"by its size, from {names}")


def percent(log_ratio: float) -> float:
    """By how much perplexity is higher, as a share: 0.01 is 1 %."""
    return math.expm1(log_ratio)


def log_limit(most: float) -> float:
    """The same the other way round."""
    return math.log1p(most)


def of_mix(parts: Iterable[tuple[int, float]]) -> float:
    """ln of the ratio.

    Args:
        parts: layers, and the loss of a model that is all like them.
    """
    every = list(parts)
    return sum(n * loss for n, loss in every) / sum(n for n, _ in every)


@cache
def rows() -> tuple[Row, ...]:
    """All that is published."""
    text = resources.files("shoal.planner").joinpath("quality.json").read_text("utf-8")
    return tuple(
        Row(
            model=each["model"],
            num_weights=each["weights"],
            shape=(each["shape"][0], each["shape"][1], each["shape"][2]),
            precision=each["precision"],
            log_ratio=math.log(each["perplexity"] / each["reference"]),
        )
        for each in json.loads(text)["measured"]
    )


@cache
def _slope() -> float:
    """Of ln(loss) over ln(weights): least squares."""
    points = [
        (math.log(each.num_weights), math.log(each.log_ratio))
        for each in rows()
        if each.precision == _SLOPE_OF
    ]
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    along = sum((x - mean_x) * (y - mean_y) for x, y in points)
    return along / sum((x - mean_x) ** 2 for x, _ in points)


def _is_near(size: float, other: float) -> bool:
    """Models of the same shapes may have experts, or not."""
    return abs(size / other - 1) < _SAME_SIZE


def num_weights(spec: ModelSpec) -> float:
    """Of all layers, experts included, embedding and head."""
    (shard,) = shards(
        split_by_weights(spec, [1.0]),
        Range(0, spec.num_layers),
        has_embedding=True,
        has_head=True,
    )
    numbers = Numbers(weights="float32", activations="float32", kv="float32")
    return weight_bytes(spec, shard, numbers) / 4
