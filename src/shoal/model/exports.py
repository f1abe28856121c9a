"""The tensors of a checkpoint as a Hugging Face folder has them, wherever they are read from.

A GGUF file names its tensors otherwise, orders q and k rows of llama models otherwise, and keeps
Gemma's norms with one added; here all that is undone. Knows nothing of files to be written.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from shoal.core.model_spec import ModelSpec
from shoal.kernels.quantized import QuantizedWeight, WeightFormat
from shoal.model.names import gguf_names, hf_names
from shoal.model.sources import WeightSource

Role = Literal["projection", "table", "other"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """One tensor.

    Attributes:
        name: Hugging Face's.
        role: "projection" of a layer; "table": embedding or head.
        row_step: rows are read in multiples of it (heads of q and k).
        rope_pairs: rows (2i, 2i+1) of each head become (i, i + D/2).
        added: to the values.
    """

    name: str
    role: Role
    source: WeightSource
    source_name: str
    row_step: int = 1
    rope_pairs: bool = False
    added: float = 0.0

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape(self.source_name)

    @property
    def dtype(self) -> torch.dtype:
        """Of the values as they are read."""
        return self.values(0, self.row_step).dtype

    def values(self, start: int, stop: int) -> Tensor:
        rows = self._ordered(self.source.rows(self.source_name, start, stop))
        return rows + self.added if self.added else rows

    def codes(
        self, weight_format: WeightFormat, group_size: int, start: int, stop: int
    ) -> QuantizedWeight | None:
        """The checkpoint's own codes, if they are just what is asked for."""
        if self.source.format(self.source_name) != weight_format or self.added:
            return None
        rows = self.source.quantized_rows(self.source_name, start, stop)
        if rows.group_size != group_size or rows.minimums_FG is not None:
            return None
        return QuantizedWeight(
            weight_format, self._ordered(rows.codes), self._ordered(rows.scales_FG)
        )

    def _ordered(self, rows: Tensor) -> Tensor:
        if not self.rope_pairs:
            return rows
        pairs = rows.reshape(-1, self.row_step // 2, 2, *rows.shape[1:])
        return pairs.transpose(1, 2).reshape(rows.shape)


def folder_exports(spec: ModelSpec, source: WeightSource) -> list[Export]:
    """Every tensor of a safetensors folder, by name."""
    names = hf_names(spec, source.names)
    projections = {
        names.weight(layer, part) for layer in range(spec.num_layers) for part in _PROJECTIONS
    }
    for layer, rules in enumerate(spec.layers):
        if spec.experts is not None and rules.has_experts:
            numbers = range(spec.experts.num_experts)
            parts = ("gate", "up", "down")
            projections |= {names.expert(layer, part, each) for each in numbers for part in parts}
    tables = {names.top("embedding"), names.top("head")}

    def role(name: str) -> Role:
        return "projection" if name in projections else "table" if name in tables else "other"

    return [
        Export(name=name, role=role(name), source=source, source_name=name)
        for name in sorted(source.names)
    ]


def gguf_exports(spec: ModelSpec, source: WeightSource) -> list[Export]:
    """Every tensor of a GGUF file that the model uses."""
    return list(_gguf_exports(spec, source))


_TOP = ("embedding", "final_norm", "head")
_PROJECTIONS = (
    *("q", "k", "v", "kv", "latent_q", "latent_kv", "o", "gate", "up", "down"),
    *("shared_gate", "shared_up", "shared_down"),
)


def _gguf_exports(spec: ModelSpec, source: WeightSource) -> Iterator[Export]:
    theirs, ours = gguf_names(spec), hf_names(spec, ())
    # GGUF files hold Gemma's norms as they are used, Hugging Face's hold them less one.
    norm_added = -1.0 if spec.post_norms else 0.0
    for part in _TOP:
        if theirs.top(part) in source.names:
            yield Export(
                name=ours.top(part),
                role="other" if part == "final_norm" else "table",
                source=source,
                source_name=theirs.top(part),
                added=norm_added if part == "final_norm" else 0.0,
            )
    for layer in range(spec.num_layers):
        for part in ours.parts:
            if part in _TOP or part not in theirs.parts:
                continue
            is_rotary = theirs.interleaved and part in ("q", "k")
            for theirs_name, ours_name in (
                (theirs.weight(layer, part), ours.weight(layer, part)),
                (theirs.bias(layer, part), ours.bias(layer, part)),
            ):
                if theirs_name in source.names:
                    is_projection = part in _PROJECTIONS and theirs_name.endswith(".weight")
                    yield Export(
                        name=ours_name,
                        role="projection" if is_projection else "other",
                        source=source,
                        source_name=theirs_name,
                        row_step=spec.head_dim if is_rotary else 1,
                        rope_pairs=is_rotary,
                        added=norm_added if "norm" in part else 0.0,
                    )
