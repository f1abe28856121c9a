"""What a checkpoint's reader gives: named tensors, by rows and columns. No more is read.

Safetensors and GGUF have one each.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from shoal.core.split import Range
from shoal.kernels.quantized import QuantizedWeight, WeightFormat


class WeightSource(Protocol):
    """Named tensors of a checkpoint, read by rows (indices into the first dimension).

    `columns` (of a matrix) None: all of them.
    """

    @property
    def names(self) -> frozenset[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def row_bytes(self, name: str) -> int:
        """Bytes in the file of one row."""

    def rows(self, name: str, start: int, stop: int, columns: Range | None = None) -> Tensor:
        """Values, floating point."""

    def format(self, name: str) -> WeightFormat | None:
        """What `quantized_rows` gives without loss; None: there are only values."""

    def quantized_rows(
        self, name: str, start: int, stop: int, columns: Range | None = None
    ) -> QuantizedWeight:
        """Codes; columns of 4 bits are cut between bytes, at even numbers."""
