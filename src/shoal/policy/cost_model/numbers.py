"""In which precisions weights, activations and KV are kept, and what a matrix of them takes.

    plain     rows x columns of floats; or codes, and scales by group
    packed    as the compiled CPU kernels read it: panels of 16 rows, columns padded

The same sizes as `model/allocation.py` makes, which a test compares. Knows nothing of models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from shoal.core.cluster import Precision

Kept = Precision | Literal["int4_min"]
"""int4_min: int4 whose groups have a minimum beside their scale."""

GROUP = 32
"""Columns of integer codes that share a scale."""

_FP8_GROUP = 128
_LANES = 16
_PAIR = 64
_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "fp8": 1}
_PAIR_BYTES = {"int8": 16 * _PAIR + 64, "int4": 8 * _PAIR + 64, "int4_min": 8 * _PAIR + 128}


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbers:
    """How the numbers of an instance are kept.

    Attributes:
        weights: of the large matrices; those whose rows are no whole groups are `activations`.
        tables: of the embedding and the head; None: as `weights`, but no less than int8.
        activations: also of weights that are floats.
        kv: of the KV cache.
        compute: products are made in; None: `activations`.
        packed: for the compiled CPU kernels.
    """

    weights: Kept = "bfloat16"
    tables: Kept | None = None
    activations: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    kv: Literal["float32", "bfloat16", "float16", "int8", "fp8"] = "bfloat16"
    compute: Precision | None = None
    packed: bool = False

    @property
    def products(self) -> Precision:
        return self.compute or self.activations

    @property
    def precision(self) -> Precision:
        """Of weights, as devices name it."""
        return "int4" if self.weights == "int4_min" else self.weights

    def of_matrix(self, columns: int) -> Kept:
        """What a matrix is kept as, whose whole rows have so many columns."""
        return self._fit(self.weights, columns)

    def of_table(self, columns: int) -> Kept:
        tables = self.tables
        if tables is None:
            tables = "int8" if self.weights in ("int4", "int4_min") else self.weights
        return self._fit(tables, columns)

    @property
    def activation_bytes(self) -> int:
        """Of one number."""
        return _ITEM_BYTES[self.activations]

    @property
    def kv_bytes(self) -> int:
        """Of one number, without scales."""
        return _ITEM_BYTES[self.kv]

    def _fit(self, kept: Kept, columns: int) -> Kept:
        if kept in ("int8", "int4", "int4_min", "fp8") and columns % GROUP:
            return self.activations
        if kept == "fp8" and self.packed:
            return "bfloat16"  # which holds its values
        return kept


def computed_in(kept: Precision, *, packed: bool) -> Precision | None:
    """`Numbers.compute` of weights: the compiled kernels round what integer weights are multiplied
    with."""
    return "int8" if packed and kept in ("int8", "int4") else None


def granule(kept: Kept, whole_columns: int) -> int:
    """Where a matrix may be cut along its columns."""
    if kept in _PAIR_BYTES:
        return GROUP
    return _FP8_GROUP if kept == "fp8" and whole_columns % _FP8_GROUP == 0 else 1


def matrix_bytes(kept: Kept, rows: int, columns: int, group: int, *, packed: bool) -> int:
    """Memory of a matrix, or of the part of it that a rank has.

    Args:
        group: columns that share a scale; 1: the whole row does, if it has one at all.
    """
    if not rows or not columns:
        return 0
    if packed:
        return _packed_bytes(kept, rows, columns)
    if kept in _ITEM_BYTES and kept not in ("int8", "fp8"):
        return rows * columns * _ITEM_BYTES[kept]
    scales = rows * (columns // group if group > 1 else 1)
    codes = rows * columns if kept in ("int8", "fp8") else rows * (columns // 2)
    scale_bytes = {"fp8": 4, "int4_min": 4}.get(kept, 2)
    return codes + scales * scale_bytes


def whole_panels(rows: int) -> int:
    """Rows of packed weights come in panels."""
    return -(-rows // _LANES) * _LANES


def _packed_bytes(kept: Kept, rows: int, columns: int) -> int:
    panels = -(-rows // _LANES)
    if kept in _PAIR_BYTES:
        return panels * -(-columns // _PAIR) * _PAIR_BYTES[kept]
    padded = -(-columns // 2) * 2
    return panels * padded * _LANES * _ITEM_BYTES[kept]
