"""What of a shard's packed weights stays on disk where memory is short: layers, or experts alone.

    layers     some whole ones, each read once a step, while others run
    experts    all; a layer has slots for some, and reads those that a step wants and has not

What costs a decode step of one token less is taken. Knows nothing of files; sizes are in bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shoal.core.errors import DeviceError
from shoal.model.streaming import layers_beyond

_READ_BYTES_PER_S = 5e8  # of a modest disk: which is better hardly depends on it
_READ_LATENCY_S = 3e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSize:
    """Of one layer.

    Attributes:
        other_bytes: of all but its experts.
        expert_bytes: of each expert.
        num_experts: on this rank; 0: an MLP is all there is.
        num_active: of those, what a token wants on average.
    """

    other_bytes: int
    expert_bytes: int = 0
    num_experts: int = 0
    num_active: float = 0.0

    @property
    def bytes(self) -> int:
        return self.other_bytes + self.num_experts * self.expert_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskRoom:
    """What stays on disk; both empty: nothing.

    Attributes:
        layers: whole ones, counted from the shard's first.
        expert_slots: of each layer, how many experts are in memory at a time; (): experts are
            where their layer is.
        instead_bytes: of whole layers that would be read in a step, where experts are on disk;
            None: whole layers would not do.
    """

    layers: tuple[int, ...] = ()
    expert_slots: tuple[int, ...] = ()
    instead_bytes: int | None = None

    def slot_bytes(self, layers: Sequence[LayerSize]) -> int:
        """Memory for experts."""
        pairs = zip(self.expert_slots, layers, strict=True)
        return sum(count * each.expert_bytes for count, each in pairs)


def choose_room(layers: Sequence[LayerSize], tables: int, memory_bytes: int | None) -> DiskRoom:
    """What stays on disk.

    Args:
        tables: embedding and head.
        memory_bytes: None: there is no limit.

    Raises:
        DeviceError: the weights fit the memory in neither form.
    """
    slots = expert_slots(layers, tables, memory_bytes)
    try:
        whole = layers_beyond([each.bytes for each in layers], tables, memory_bytes, "on disk")
    except DeviceError:
        if not slots:
            raise
        return DiskRoom(expert_slots=slots)
    if slots and experts_read_s(layers, slots) < layers_read_s(layers, whole):
        instead = sum(layers[index].bytes for index in whole)
        return DiskRoom(expert_slots=slots, instead_bytes=instead)
    return DiskRoom(layers=whole)


def expert_slots(
    layers: Sequence[LayerSize], tables: int, memory_bytes: int | None
) -> tuple[int, ...]:
    """Slots of each layer that the memory has room for; (): all fits, or not one a layer does."""
    if memory_bytes is None or tables + sum(each.bytes for each in layers) <= memory_bytes:
        return ()
    room = memory_bytes - tables - sum(each.other_bytes for each in layers)
    all_bytes = sum(each.num_experts * each.expert_bytes for each in layers)
    if not all_bytes:
        return ()
    share = max(room, 0) / all_bytes
    slots = [min(max(1, int(each.num_experts * share)), each.num_experts) for each in layers]
    room -= sum(count * each.expert_bytes for count, each in zip(slots, layers, strict=True))
    if room < 0:
        return ()
    for index, each in enumerate(layers):  # what rounding has left
        if slots[index] < each.num_experts and each.expert_bytes <= room:
            slots[index] += 1
            room -= each.expert_bytes
    return tuple(slots)


def missing_experts(layer: LayerSize, num_slots: int) -> float:
    """What a token wants and memory has not, if each expert is wanted as often."""
    return layer.num_active * (1 - num_slots / layer.num_experts) if layer.num_experts else 0.0


def experts_read_s(layers: Sequence[LayerSize], slots: Sequence[int]) -> float:
    """Of a decode step of one token, on a modest disk: they are waited for."""
    return sum(
        missing_experts(each, count) * (_READ_LATENCY_S + each.expert_bytes / _READ_BYTES_PER_S)
        for each, count in zip(layers, slots, strict=True)
    )


def layers_read_s(layers: Sequence[LayerSize], on_disk: Sequence[int]) -> float:
    """Likewise; computing goes on meanwhile."""
    return sum(layers[index].bytes for index in on_disk) / _READ_BYTES_PER_S
