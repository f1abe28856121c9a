"""How scales (and zeros that lie like them) are spread over a weight [F, K], by their shape.

    [] [1] [1, 1]            one for the whole weight
    [F] [F, 1]               one a row
    [F, ⌈K/group⌉]           one a group of columns
    [⌈F/rows⌉, ⌈K/columns⌉]  one a block, such as 128 x 128

Knows nothing of codes.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from shoal.core.errors import WeightsError
from shoal.model.safetensors_files import SafetensorsFiles
from shoal.model.stored_weights import Read


@dataclass(frozen=True, slots=True)
class ScaleLayout:
    """A block of `rows` x `columns` weights shares a scale."""

    rows: int
    columns: int

    def reader(self, files: SafetensorsFiles, name: str) -> Read:
        """Reads the tensor as [rows asked for, groups], whatever shape it has."""
        return partial(_read, files, name, self.rows)


def scale_layout(
    files: SafetensorsFiles,
    name: str,
    weight_shape: tuple[int, int],
    *,
    group_sizes: Collection[int] = (),
    blocks: Collection[tuple[int, int]] = (),
) -> ScaleLayout:
    """The layout of the tensor `name`.

    Args:
        group_sizes, blocks: those that the config names.

    Raises:
        WeightsError: the tensor's shape fits none of them.
    """
    rows, columns = weight_shape
    found = files.shape(name)
    if all(length == 1 for length in found):
        return ScaleLayout(rows, columns)
    if found in ((rows,), (rows, 1)):
        return ScaleLayout(1, columns)
    for block_rows, block_columns in (*((1, size) for size in group_sizes), *blocks):
        if found == (-(-rows // block_rows), -(-columns // block_columns)):
            return ScaleLayout(block_rows, block_columns)
    named = [f"groups of {size}" for size in group_sizes] + [f"blocks {block}" for block in blocks]
    raise WeightsError(
        f"{files.folder}: {name} has shape {list(found)}, which for a weight of {rows} x {columns} "
        f"is none of: one, one a row, {', '.join(named) or 'groups'}: fetch the model again, or "
        "check that its config belongs to it"
    )


def group_indices(files: SafetensorsFiles, name: str, num_groups: int) -> Tensor:
    """The group of each column, as act-order keeps it; any that is not there is an error."""
    groups_K = files.whole(name).long()
    if int(groups_K.min()) < 0 or int(groups_K.max()) >= num_groups:
        raise WeightsError(
            f"{files.folder}: {name} names groups {int(groups_K.min())} to {int(groups_K.max())}; "
            f"there are {num_groups}: the file is corrupt, fetch it again"
        )
    return groups_K


def _read(files: SafetensorsFiles, name: str, block_rows: int, start: int, stop: int) -> Tensor:
    if all(length == 1 for length in files.shape(name)):
        return files.whole(name).reshape(1, 1).expand(stop - start, 1).contiguous()
    first_block = start // block_rows
    scales = files.rows(name, first_block, -(-stop // block_rows))
    scales_RG = scales.view(len(scales), -1)
    if block_rows == 1:
        return scales_RG
    return scales_RG[torch.arange(start, stop) // block_rows - first_block]
