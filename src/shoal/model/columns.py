"""Ranges of a weight's columns: what must be read for them, and codes cut to them.

    K columns   G groups of columns that share a scale

Knows nothing of files or of who wants which columns.
"""

from __future__ import annotations

import math

from torch import Tensor

from shoal.core.split import Range
from shoal.kernels.quantized import QuantizedWeight


def covering(columns: Range, granule: int, total: int) -> Range:
    """The smallest range of whole granules around it; the last granule may be cut short."""
    cover = columns.snapped(granule)
    return Range(cover.start, min(cover.stop, total))


def take_columns(rows: QuantizedWeight, columns: Range) -> QuantizedWeight:
    """Some columns of rows in few bits; int4 is cut between bytes.

    Groups that the range cuts are made smaller, and so are all others then.
    """
    if len(columns) == rows.shape[1]:
        return rows
    per_code = 2 if rows.format == "int4" else 1
    assert columns.start % per_code == columns.stop % per_code == 0, "a cut inside a byte"
    minimums_FG = rows.minimums_FG
    return QuantizedWeight(
        rows.format,
        rows.codes[:, columns.start // per_code : columns.stop // per_code],
        take_groups(rows.scales_FG, rows.group_size, columns),
        None if minimums_FG is None else take_groups(minimums_FG, rows.group_size, columns),
    )


def take_groups(scales_FG: Tensor, group_size: int, columns: Range) -> Tensor:
    """The scales of some columns, in groups of one size."""
    first, last = columns.start // group_size, (columns.stop - 1) // group_size
    if first == last:
        return scales_FG[:, first : first + 1]
    even = math.gcd(group_size, columns.start, columns.stop)
    if even < group_size:
        scales_FG = scales_FG.repeat_interleave(group_size // even, 1)
    return scales_FG[:, columns.start // even : columns.stop // even]
