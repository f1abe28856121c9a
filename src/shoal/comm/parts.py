"""What ranks give to `all_to_all`: parts that differ in their length only.

Knows nothing of how they get there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shoal.core.errors import CommError


def checked_parts(parts: Sequence[Tensor], size: int) -> tuple[tuple[int, ...], torch.dtype]:
    """The shape of a row, and its dtype.

    Raises:
        CommError: not a part for each rank, or parts that differ in more than their length.
    """
    if len(parts) != size:
        raise CommError(f"{len(parts)} parts for {size} ranks; give one for each, maybe empty")
    kinds = {(tuple(part.shape[1:]), part.dtype) for part in parts if part.dim()}
    if len(kinds) != 1 or not all(part.dim() for part in parts):
        raise CommError(
            f"parts of {[(tuple(part.shape), part.dtype) for part in parts]}; they may differ in "
            "their first dimension only"
        )
    rest, dtype = kinds.pop()
    if 0 in rest:
        raise CommError(f"rows of {rest} have no bytes to send; give them at least one")
    return rest, dtype


def joined_bytes(parts: Sequence[Tensor]) -> Tensor:
    """All parts, one behind the other."""
    return torch.cat([part.reshape(-1) for part in parts]).view(torch.uint8)


def row_bytes(rest: tuple[int, ...], dtype: torch.dtype) -> int:
    """Of a row, as `checked_parts` describes it."""
    return torch.Size(rest).numel() * dtype.itemsize


def parted(
    joined: Tensor, lengths: Sequence[int], rest: tuple[int, ...], dtype: torch.dtype
) -> list[Tensor]:
    """The way back from `joined_bytes`: parts of so many rows."""
    return list(torch.split(joined.view(dtype).view(-1, *rest), list(lengths)))
