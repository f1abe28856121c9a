"""Reads experts of a layer again, for another dealing, while the model runs.

What a rank keeps is copied, what it gains is read from the checkpoint. Knows nothing of who deals.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.core.model_spec import ModelSpec
from shoal.core.split import ExpertShare
from shoal.kernels.cpu.arena import Arena, ArenaSize, PackedWeight
from shoal.kernels.quantized import QuantizedWeight
from shoal.model.allocation import Allocator, allocate_experts
from shoal.model.fill import fill
from shoal.model.names import TensorNames
from shoal.model.parameters import ExpertParameters, Weight
from shoal.model.placements import expert_placements
from shoal.model.precision import LayerFormats, WeightFormats
from shoal.model.sources import WeightSource


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class ExpertLoader:
    """What a decoder's experts were made from.

    Attributes:
        native: the compiled library, where weights are packed; None: they are not.
    """

    spec: ModelSpec
    source: WeightSource
    names: TensorNames
    formats: WeightFormats
    device: torch.device
    dtype: torch.dtype
    native: ctypes.CDLL | None = None

    def load(
        self, layer: int, shares: tuple[ExpertShare, ...], like: ExpertParameters
    ) -> ExpertParameters:
        """The layer's experts of a new dealing; from any thread.

        Args:
            like: what the rank has of that layer until now.

        Raises:
            WeightsError: the checkpoint is no longer what it was.
            MemoryError, OSError: no memory for them beside those of now.
        """
        formats, arena = self.formats.layers[layer], None
        if self.native is not None:
            size = ArenaSize(self.native)
            self._allocate(formats, shares, like, size)
            arena = Arena(self.native, size.bytes)
        experts = self._allocate(formats, shares, like, arena)
        kept = {
            id(weight)
            for of_old, of_new in (
                (like.gate_up_FE, experts.gate_up_FE),
                (like.down_EF, experts.down_EF),
            )
            for weight in _copy_kept(like.shares, of_old, shares, of_new)
        }
        needed = expert_placements(self.spec, layer, experts, self.names)
        fill([each for each in needed if id(each.target) not in kept], self.source, arena, None)
        return experts

    def pack(self, layer: int, share: ExpertShare, like: ExpertParameters, arena: Arena) -> None:
        """One of the layer's experts, alone in an arena; gate and up, and then down.

        Raises:
            WeightsError: the checkpoint is no longer what it was.
        """
        arena.rewind()
        arena.data.zero_()
        experts = self._allocate(self.formats.layers[layer], (share,), like, arena)
        needed = list(expert_placements(self.spec, layer, experts, self.names))
        fill(needed, self.source, arena, None)

    def _allocate(
        self,
        formats: LayerFormats,
        shares: tuple[ExpertShare, ...],
        like: ExpertParameters,
        arena: Arena | ArenaSize | None,
    ) -> ExpertParameters:
        return allocate_experts(
            self.spec,
            formats,
            shares,
            Allocator(self.device, self.dtype, arena),
            router_XE=like.router_XE,
            shared_gate_E=like.shared_gate_E,
        )


def _copy_kept(
    old: tuple[ExpertShare, ...],
    of_old: tuple[Weight, ...],
    new: tuple[ExpertShare, ...],
    of_new: tuple[Weight, ...],
) -> list[Weight]:
    """Fills weights of experts that were here before; returns them."""
    before = {share.expert: weight for share, weight in zip(old, of_old, strict=True)}
    copied = []
    for share, weight in zip(new, of_new, strict=True):
        if share.expert in before:
            for part, source in zip(_parts(weight), _parts(before[share.expert]), strict=True):
                part.copy_(source)
            copied.append(weight)
    return copied


def _parts(weight: Weight) -> list[Tensor]:
    match weight:
        case PackedWeight():
            return [weight.data]
        case QuantizedWeight():
            parts = (weight.codes, weight.scales_FG, weight.minimums_FG)
            return [part for part in parts if part is not None]
    return [weight]
