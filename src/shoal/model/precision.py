"""Which weights of a decoder are kept in few bits, and how: settled before anything is read.

A fused weight (q, k and v; gate and up) has one weight_format, which its members' formats decide:

    asked for   kept as
    none        floats
    auto        what the checkpoint has: int4 if all members are, else int8 if all have few bits
    int8, int4  that; a checkpoint's own int4 stays as it is under int4, and minimums are kept where
                they halve the error. The embedding and the head are no less than int8: they cost
                most in quality and least in memory

Weights whose rows are not multiples of a group stay floats. Knows nothing of how weights are laid
out or multiplied.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from shoal.core.errors import ConfigError
from shoal.core.model_spec import ModelSpec
from shoal.core.options import Quantization
from shoal.kernels.quantized import (
    GROUP_SIZE,
    WeightFormat,
    quantize,
    quantize_with_minimums,
)
from shoal.model.names import TensorNames, qkv_parts
from shoal.model.sources import WeightSource

Format = WeightFormat | Literal["int4_min"] | None
"""int4_min: int4 with minimums; None: floats."""

_FEW_BITS = 9.0
_JUDGED_ROWS = 16
_JUDGED_MEMBERS = 8  # of a layer's experts


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerFormats:
    """Of one layer's weights; `gate_up` and `down` of the MLP that every token goes through.

    `latent_q`, `latent_kv`: what makes heads of latents.
    """

    qkv: Format = None
    latent_q: Format = None
    latent_kv: Format = None
    o: Format = None
    gate_up: Format = None
    down: Format = None
    expert_gate_up: Format = None
    expert_down: Format = None


@dataclass(frozen=True, slots=True)
class WeightFormats:
    """Of all weights; `head` is the embedding's own where they are tied."""

    layers: tuple[LayerFormats, ...]
    embedding: Format
    head: Format

    @property
    def label(self) -> str | None:
        """For people: the format of most weights."""
        used = [layer.expert_gate_up or layer.gate_up for layer in self.layers]
        most = Counter(used).most_common(1)[0][0]
        return "int4" if most == "int4_min" else most


def choose_formats(
    spec: ModelSpec, source: WeightSource, names: TensorNames, asked: Quantization
) -> WeightFormats:
    """Formats of every weight.

    Raises:
        ConfigError: a format the weights' shapes do not allow.
    """

    def fused(layer: int, *parts: str) -> Format:
        return _wanted(source, [names.weight(layer, part) for part in parts], asked)

    def mlp(layer: int, *parts: str) -> Format:
        return fused(layer, *(names.mlp_part(spec, layer, part) for part in parts))

    def experts(layer: int, *parts: str) -> Format:
        if spec.experts is None or not spec.layers[layer].has_experts:
            return None
        numbers = range(spec.experts.num_experts)
        members = [names.expert(layer, part, each) for each in numbers for part in parts]
        return _wanted(source, members, asked)

    def table(part: str) -> Format:
        kept: Quantization = "int8" if asked == "int4" else asked
        return _wanted(source, [names.top(part)], kept)

    qkv = qkv_parts(spec)
    formats = WeightFormats(
        layers=tuple(
            LayerFormats(
                qkv=fused(i, *qkv),
                latent_q=fused(i, "latent_q") if spec.latent else None,
                latent_kv=fused(i, "latent_kv") if spec.latent else None,
                o=fused(i, "o"),
                gate_up=mlp(i, "gate", "up"),
                down=mlp(i, "down"),
                expert_gate_up=experts(i, "gate", "up"),
                expert_down=experts(i, "down"),
            )
            for i in range(spec.num_layers)
        ),
        embedding=table("embedding"),
        head=table("embedding" if spec.tied_embeddings else "head"),
    )
    if asked not in ("auto", "none") and formats.label is None:
        raise ConfigError(
            f"--quantize {asked} needs weights whose rows are multiples of {GROUP_SIZE}; most "
            f"of this model's are not (hidden size {spec.hidden_size}); use --quantize none"
        )
    return formats


def _wanted(source: WeightSource, members: Sequence[str], asked: Quantization) -> Format:
    if asked == "none" or any(name not in source.names for name in members):
        return None
    shapes = [source.shape(name) for name in members]
    if any(len(shape) != 2 or shape[1] % GROUP_SIZE for shape in shapes):
        return None  # whole groups only; what is no matrix is refused later
    own = [_own(source, name) for name in members]
    all_int4 = all(each in ("int4", "int4_min") for each in own)
    if asked == "int4" or (asked == "auto" and all_int4):
        with_minimums = "int4_min" in own or any(
            each not in ("int4", "int4_min") and _wants_minimums(source, name)
            for each, name in zip(own[:_JUDGED_MEMBERS], members, strict=False)
        )
        return "int4_min" if with_minimums else "int4"
    if asked in ("int8", "fp8"):
        return asked
    if all(each == "fp8" for each in own):
        return "fp8"
    return "int8" if all(each not in (None, "fp8") for each in own) else None


def _wants_minimums(source: WeightSource, name: str) -> bool:
    """Whether they halve the squared error: of values that were once rounded so, or lopsided ones.

    Otherwise they would cost a tenth of the speed for little. Judged by the first rows.
    """
    rows = source.rows(name, 0, min(_JUDGED_ROWS, source.shape(name)[0])).float()
    if not bool(rows.isfinite().all()):
        return False  # refused, by name, where they are read
    errors = [
        (kept.dequantize() - rows).square().sum()
        for kept in (quantize_with_minimums(rows), quantize(rows, "int4"))
    ]
    return bool(errors[0] < 0.5 * errors[1])


def _own(source: WeightSource, name: str) -> Format:
    """What the checkpoint has; int8 also where it has few bits of another kind."""
    rows, columns = source.shape(name)
    weight_format = source.format(name)
    if weight_format is None:
        bits = 8 * source.row_bytes(name) / columns
        return "int8" if bits < _FEW_BITS and columns % GROUP_SIZE == 0 else None
    first = source.quantized_rows(name, 0, min(1, rows))
    if weight_format != "fp8" and first.group_size % GROUP_SIZE:
        return None
    return "int4_min" if first.minimums_FG is not None else weight_format
