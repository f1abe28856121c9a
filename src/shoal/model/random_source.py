"""A checkpoint that is nowhere: random weights of a model's shapes, to measure a device with.

    every tensor    numbers from one small table, again and again, the size of trained ones

Made as they are read, so that shapes of any size cost no more memory than the shard that is filled
with them. Knows nothing of what is measured.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from shoal.core.model_spec import ModelSpec
from shoal.core.split import Range
from shoal.kernels.quantized import QuantizedWeight, WeightFormat
from shoal.model.names import hf_names
from shoal.model.placements import tensor_shapes

_TABLE = 1 << 20
_SEED = 0


class RandomSource:
    """A `WeightSource` of floats."""

    def __init__(self, spec: ModelSpec) -> None:
        self._shapes = tensor_shapes(spec, hf_names(spec, ()))
        table = torch.randn(_TABLE, generator=torch.Generator().manual_seed(_SEED))
        self._table = table / math.sqrt(spec.hidden_size)

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def row_bytes(self, name: str) -> int:
        return math.prod(self._shapes[name][1:]) * self._table.element_size()

    def rows(self, name: str, start: int, stop: int, columns: Range | None = None) -> Tensor:
        rest = self._shapes[name][1:]
        if columns is not None:
            rest = (len(columns),)
        shape = (stop - start, *rest)
        size = math.prod(shape)
        return self._table.repeat(-(-size // _TABLE))[:size].view(shape)

    def format(self, name: str) -> WeightFormat | None:
        return None

    def quantized_rows(
        self, name: str, start: int, stop: int, columns: Range | None = None
    ) -> QuantizedWeight:
        raise AssertionError(f"{name} has values only, as format says")
