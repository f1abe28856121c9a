"""Puts a shard's experts on disk, packed, or finds them there from an earlier start.

Knows nothing of when they are read again: that is for `expert_store.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from shoal.core.model_spec import ModelSpec
from shoal.core.split import WHOLE_SHARE
from shoal.kernels.cpu.arena import Arena, PackedWeight, packed_bytes
from shoal.model.disk_room import DiskRoom, LayerSize, missing_experts
from shoal.model.expert_loader import ExpertLoader
from shoal.model.expert_store import ExpertStore, StoredExperts, pieces
from shoal.model.layer_file import LayerFile
from shoal.model.packed_cache import PackedCache
from shoal.model.parameters import ExpertParameters


def layer_size(
    spec: ModelSpec, experts: ExpertParameters | None, other_bytes: int, expert_bytes: int
) -> LayerSize:
    """Of a layer.

    Args:
        experts: of the shard.
        other_bytes, expert_bytes: of all but those, and of all of those.
    """
    if experts is None or not experts.shares or spec.experts is None:
        return LayerSize(other_bytes=other_bytes)
    count = len(experts.shares)
    parts = sum(share.stop - share.start for share in experts.shares) / WHOLE_SHARE
    return LayerSize(
        other_bytes=other_bytes,
        expert_bytes=expert_bytes // count,
        num_experts=count,
        num_active=spec.experts.num_active * parts / spec.experts.num_experts,
    )


def open_store(
    loader: ExpertLoader,
    experts: Sequence[ExpertParameters | None],
    first_layer: int,
    sizes: Sequence[LayerSize],
    room: DiskRoom,
    kept: PackedCache,
    slots: Tensor,
    resident: Tensor,
) -> ExpertStore:
    """The experts of a shard's layers, on disk.

    Args:
        experts: without weights, of each layer.
        kept: where they may be found, or are kept.
        slots: memory for some, `room` says of how many of which layer.
        resident: weights that stay in memory.

    Raises:
        DeviceError: no room on the disk, or it fails; or what was kept is damaged.
    """
    stored, used = [], 0
    for index, (own, size, count) in enumerate(zip(experts, sizes, room.expert_slots, strict=True)):
        if own is None or not count:
            continue
        memory = slots[used : used + count * size.expert_bytes]
        used += len(memory)
        stored.append(
            StoredExperts(
                layer=first_layer + index,
                num_experts=size.num_experts,
                gate_up_bytes=_bytes_of(own.gate_up_FE[0], loader),
                slots=memory.view(count, size.expert_bytes),
                expected_wanted=size.num_active,
                expected_missing=missing_experts(size, count),
            )
        )
    parts = [part for each in stored for part in each.num_experts * pieces(each.slots.shape[1])]
    layers = {each.layer: experts[each.layer - first_layer] for each in stored}
    packed = _packed_pieces(loader, layers)
    file = LayerFile(kept.path, kept.folder, parts, lambda index: next(packed))
    return ExpertStore(file, stored, resident, room.instead_bytes)


def _packed_pieces(
    loader: ExpertLoader, layers: dict[int, ExpertParameters | None]
) -> Iterator[Tensor]:
    """All pieces in their order; each is overwritten by a later one."""
    for layer, experts in layers.items():
        assert experts is not None and loader.native is not None, "packed experts"
        size = _bytes_of(experts.gate_up_FE[0], loader) + _bytes_of(experts.down_EF[0], loader)
        arena = Arena(loader.native, size)
        for share in experts.shares:
            loader.pack(layer, share, experts, arena)
            yield from torch.split(arena.data[:size], pieces(size))


def _bytes_of(weight: object, loader: ExpertLoader) -> int:
    assert isinstance(weight, PackedWeight) and loader.native is not None
    return packed_bytes(loader.native, weight.format, weight.rows, weight.cols)
