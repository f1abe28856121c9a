"""Tensors of a safetensors folder under their plain names, whatever they are stored as.

A quantised linear shows as one tensor "<module>.weight" [F, K], like a plain one; which tensors
of the file it is made of is for `quantized_checkpoints.py` to know. Knows nothing of what the
tensors are for.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from shoal.core.errors import WeightsError
from shoal.core.split import Range
from shoal.kernels.quantized import QuantizedWeight, WeightFormat
from shoal.model.quantized_checkpoints import find_stored_weights
from shoal.model.safetensors_files import FLOAT_TYPES, SafetensorsFiles
from shoal.model.stacked_experts import find_stacked


class SafetensorsSource:
    """Named tensors of a folder.

    Raises:
        WeightsError: no safetensors, a missing shard or tensor, a truncated or corrupt file.
        UnsupportedModelError: a quantisation that is not read.
    """

    def __init__(self, folder: Path) -> None:
        self._files = SafetensorsFiles(folder)
        self._stored, hidden = find_stored_weights(self._files)
        stacked, stacks = find_stacked(self._files)
        self._stored |= stacked
        self._names = (self._files.names - hidden - stacks) | self._stored.keys()

    @property
    def names(self) -> frozenset[str]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        stored = self._stored.get(name)
        return self._files.shape(name) if stored is None else stored.shape

    def row_bytes(self, name: str) -> int:
        """Bytes in the file of one row (index into the first dimension)."""
        stored = self._stored.get(name)
        if stored is not None:
            return max(1, stored.num_bytes // stored.shape[0])
        if (dtype := self._files.dtype(name)) not in FLOAT_TYPES:
            raise WeightsError(
                f"{self._files.folder}: {name} has type {dtype}, and its config.json says of no "
                f"quantisation that would explain it; shoal reads {', '.join(FLOAT_TYPES)}: "
                "use another checkpoint of the model"
            )
        shape = self._files.shape(name)
        return self._files.num_bytes(name) // max(1, shape[0]) if shape else 0

    def rows(self, name: str, start: int, stop: int, columns: Range | None = None) -> Tensor:
        """Floating point: the values, of quantised weights too."""
        stored = self._stored.get(name)
        if stored is None:
            return self._files.rows(name, start, stop, columns)
        return stored.rows(start, stop, columns)

    def format(self, name: str) -> WeightFormat | None:
        """What `quantized_rows` gives; None: a plain tensor, or codes that fit no format."""
        stored = self._stored.get(name)
        return None if stored is None else stored.format

    def quantized_rows(
        self, name: str, start: int, stop: int, columns: Range | None = None
    ) -> QuantizedWeight:
        """The same values as `rows`, without a detour; only where there is a format."""
        return self._stored[name].quantized_rows(start, stop, columns)
