"""Seconds of a layer that was measured on the device, in place of the roofline's.

    seconds    prompt(tokens of prompts) + decode(sequences that get a token)
               straight lines between points; as long as one read of the weights takes, at least

Below the smallest point of decode its time counts: weights are read for one sequence as for two. Of
prompts, and above the largest points, time is in proportion to tokens. Attention is in the times,
for whatever context they were measured at. Knows nothing of how layers are measured.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass

from shoal.core.cluster import Cluster, Device, LayerTimes, Points, Precision
from shoal.core.model_spec import ModelSpec
from shoal.policy.cost_model.loads import StepLoad
from shoal.policy.cost_model.numbers import Numbers

_HALVES: tuple[Precision, ...] = ("bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class MeasuredLayers:
    """Of one device, at its speed."""

    times: LayerTimes
    speed: float

    @property
    def error(self) -> float:
        return self.times.error

    def seconds(self, load: StepLoad) -> tuple[float, float]:
        """Of one layer: for sequences that decode, and for prompts."""
        decoding = load.num_decoding
        prompt_tokens = load.num_tokens - decoding
        if load.num_tokens <= 0:
            return 0.0, 0.0
        once_s = self.times.decode[0][1]
        decode_s = max(_line(self.times.decode, decoding), once_s) if decoding else 0.0
        prompt_s = _line(self.times.prompt, prompt_tokens) if prompt_tokens else 0.0
        if not decoding:
            prompt_s = max(prompt_s, once_s)
        return decode_s / self.speed, prompt_s / self.speed


def measured_layers(
    cluster: Cluster, spec: ModelSpec, device: Device, numbers: Numbers
) -> MeasuredLayers | None:
    """None: layers of that shape and precision were not measured on such a device."""
    if spec.experts is not None:
        return None
    shape = (spec.hidden_size, spec.ffn_size, spec.num_heads, spec.num_kv_heads)
    for each in cluster.layer_times:
        measured = (each.hidden_size, each.ffn_size, each.num_heads, each.num_kv_heads)
        same = each.precision == numbers.precision
        same = same or (each.precision in _HALVES and numbers.precision in _HALVES)
        if each.kind == device.kind and measured == shape and same:
            return MeasuredLayers(each, device.speed)
    return None


def _line(points: Points, count: int) -> float:
    """On straight lines from nothing through all points, and on as the last one in proportion."""
    if count >= points[-1][0]:
        return points[-1][1] * count / points[-1][0]
    index = bisect.bisect_right(points, count, key=_count)
    low, low_s = points[index - 1] if index else (0, 0.0)
    high, high_s = points[index]
    return low_s + (high_s - low_s) * (count - low) / (high - low)


def _count(point: tuple[int, float]) -> int:
    return point[0]
