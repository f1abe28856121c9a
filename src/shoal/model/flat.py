"""Tensors one behind the other in one buffer, so that all of them are read or copied in one go.

    buffer    weight | codes | scales | norm | ...      each from a multiple of 256 bytes on

Knows nothing of what they are.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_ALIGNMENT = 256  # as what CUDA allocates, and more than any kernel asks for


class Flat:
    """A buffer that tensors are taken from, in their order."""

    def __init__(self, buffer: Tensor) -> None:
        assert buffer.dtype == torch.uint8 and buffer.dim() == 1, "a buffer is bytes"
        self._buffer = buffer
        self._used = 0

    def take(self, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """The next tensor of that shape; it has what bytes are there."""
        start, size = self._used, math.prod(shape) * dtype.itemsize
        self._used += _padded(size)
        assert start + size <= len(self._buffer), "`FlatSize` has told how large it must be"
        return self._buffer[start : start + size].view(dtype).view(shape)


class FlatSize:
    """Stands in for `Flat` to learn how many bytes the same tensors take."""

    def __init__(self) -> None:
        self.bytes = 0

    def take(self, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """A tensor without memory."""
        self.bytes += _padded(math.prod(shape) * dtype.itemsize)
        return torch.empty(shape, dtype=dtype, device="meta")


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
