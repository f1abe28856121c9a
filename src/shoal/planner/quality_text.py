"""What a plan's bits cost, in words: of the report's numbers (`explain.py`).

Knows nothing of plans.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_SAME = 5e-5


def quality_line(found: Mapping[str, Any]) -> str:
    """Of the replica that loses most, and by what bits."""
    worst = max(found["replicas"], key=lambda each: float(each["quality_loss"]))
    layers: dict[str, int] = {}
    for stage in worst["stages"]:
        first, last = stage["layers"]
        layers[stage["precision"]] = layers.get(stage["precision"], 0) + last - first
    few = [each["precision"] for each in found["precisions"] if each["quality_loss"]]
    shown = " and ".join(f"{layers[each]} layers in {each}" for each in few if each in layers)
    return (
        f"perplexity about {_share(found['quality_loss'])} above that of 16 bits ({shown} of "
        f"{sum(layers.values())}); `shoal eval` measures it"
    )


def bits_line(each: Mapping[str, Any]) -> str:
    if not each["quality_loss"]:
        return f"weights in {each['precision']}: as trained"
    line = f"weights in {each['precision']}: perplexity +{_share(each['quality_loss'])} if all are"
    if each["at_most"] > each["quality_loss"] * 1.005:
        line += f", up to +{_share(each['at_most'])}"
    return f"{line}, {each['source']}"


def other_quality(other: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    more = other["quality_loss"] - found["quality_loss"]
    if abs(more) < _SAME:
        return ""
    return f", perplexity {'+' if more > 0 else '-'}{_share(abs(more))}"


def _share(loss: float) -> str:
    return f"{loss * 100:.2g} %"
