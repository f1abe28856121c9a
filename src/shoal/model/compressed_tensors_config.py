"""What the quantization_config of a compressed-tensors checkpoint says of its weights.

Everything that would change values and is not read is refused by name. Knows nothing of tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from shoal.core.errors import UnsupportedModelError
from shoal.model.fields import Fields


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressionSettings:
    """Over all its groups; a module is told from another by what it has.

    Attributes:
        bits: of integer codes.
        group_sizes: columns of a group.
        blocks: rows and columns of a block.
    """

    bits: tuple[int, ...]
    group_sizes: tuple[int, ...]
    blocks: tuple[tuple[int, int], ...]


def read_settings(fields: Fields) -> CompressionSettings:
    """Checks and gathers what the config says.

    Raises:
        UnsupportedModelError: something that is not read.
        ModelError: a malformed value.
    """
    _refuse(fields)
    groups = fields.child("config_groups") if "config_groups" in fields else Fields("", {})
    bits, sizes, blocks = [], [], []
    for key in groups.values:
        group = groups.child(key)
        _check_format(group)
        if "weights" not in group:
            continue
        weights = group.child("weights")
        bits.append(_bits(weights))
        size = weights.integer("group_size", -1)
        if size > 0:
            sizes.append(size)
        if "block_structure" in weights:
            blocks.append(_block(weights))
    return CompressionSettings(
        bits=tuple(dict.fromkeys(bits)) or (4, 8),
        group_sizes=tuple(dict.fromkeys(sizes)),
        blocks=tuple(dict.fromkeys(blocks)),
    )


_FORMATS = (
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "mixed-precision",
    "dense",
)
_STRATEGIES = ("tensor", "channel", "group", "block")


def _refuse(fields: Fields) -> None:
    _check_format(fields)
    if "sparsity_config" in fields:
        sparsity = fields.values["sparsity_config"]
        layout = sparsity.get("format", "dense") if isinstance(sparsity, Mapping) else sparsity
        if layout != "dense":
            raise _unsupported(fields, f"sparsity {layout!r}", "dense weights")
    if "transform_config" in fields:
        transform = fields.values["transform_config"]
        if not isinstance(transform, Mapping) or transform.get("config_groups"):
            raise _unsupported(
                fields, "a transform_config (rotated weights)", "weights as they are"
            )


def _check_format(fields: Fields) -> None:
    layout = fields.text("format", "dense")
    if layout not in _FORMATS:
        raise _unsupported(fields, f"the format {layout!r}", ", ".join(_FORMATS))


def _bits(weights: Fields) -> int:
    bits, kind = weights.integer("num_bits", 8), weights.text("type", "int").lower()
    if (kind, bits) not in (("int", 4), ("int", 8), ("float", 8)):
        raise _unsupported(weights, f"{kind} weights of {bits} bits", "int of 4 and 8, float of 8")
    strategy = weights.text("strategy", "group").lower()
    if strategy not in _STRATEGIES:
        raise _unsupported(weights, f"the strategy {strategy!r}", ", ".join(_STRATEGIES))
    return bits


def _block(weights: Fields) -> tuple[int, int]:
    found = weights.values["block_structure"]
    lengths = found.lower().split("x") if isinstance(found, str) else found
    try:
        rows, columns = (int(length) for length in lengths)
    except (TypeError, ValueError):
        rows = columns = 0
    if rows < 1 or columns < 1:
        raise _unsupported(weights, f"block_structure {found!r}", "two numbers such as [128, 128]")
    return rows, columns


def _unsupported(fields: Fields, found: str, read: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{fields.source}: {found} of compressed-tensors is not supported; shoal reads {read}: "
        "use such a checkpoint, the plain one, or a .gguf file"
    )
