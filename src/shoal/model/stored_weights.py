"""Weights that a checkpoint keeps as codes and scales: read by rows, as codes or as values.

    F rows   K columns   G groups of columns   value[f, k] = (code[f, k] - zero[f, g]) * scale[f, g]

Each family of files says how its codes are read (`ReadCodes`: rows [start, stop) of some columns)
and its zeros and scales, which are few (`Read`: whole rows); what can be had of them is decided
here. Knows nothing of names or of config.json.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from shoal.core.split import Range
from shoal.kernels.quantized import QuantizedWeight, WeightFormat
from shoal.model.columns import covering, take_groups

Read = Callable[[int, int], Tensor]
ReadCodes = Callable[[int, int, Range], Tensor]

_WORD_COLUMNS = 8


class StoredWeight(Protocol):
    """A weight [F, K] of a checkpoint; `num_bytes` is what it takes in the file."""

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def num_bytes(self) -> int: ...

    @property
    def format(self) -> WeightFormat | None:
        """What `quantized_rows` gives without loss; None: nothing, there are only values."""

    def quantized_rows(
        self, start: int, stop: int, columns: Range | None = None
    ) -> QuantizedWeight: ...

    def rows(self, start: int, stop: int, columns: Range | None = None) -> Tensor:
        """The values, fp32."""


@dataclass(frozen=True, eq=False, kw_only=True)
class IntegerWeight:
    """Integer codes of 4 or 8 bits.

    Attributes:
        group_size: columns of a group; the last one may be shorter.
        codes: 4 bits: uint8 [F, ⌈K/2⌉], the even column in the low bits; 8 bits: int8 [F, K].
            Columns are asked for in whole words of the file: from a multiple of 8, to one or K.
        zeros: codes that mean zero, [F, G]; None: 8 of 4 bits, 0 of 8 bits.
        scales: floating point, [F, G].
        groups: of each column; None: column k is in group k // group_size.
    """

    shape: tuple[int, int]
    num_bytes: int
    bits: int
    group_size: int
    codes: ReadCodes
    scales: Read
    zeros: Read | None = None
    groups: Callable[[], Tensor] | None = None

    @cached_property
    def format(self) -> WeightFormat | None:
        columns = self.shape[1]
        if columns % self.group_size or self._permuted is not None:
            return None
        if self.bits == 4:
            return "int4" if columns % 2 == 0 else None
        return "int8" if self._is_symmetric else None

    def quantized_rows(
        self, start: int, stop: int, columns: Range | None = None
    ) -> QuantizedWeight:
        columns, cover = self._ranges(columns)
        first, last = columns.start - cover.start, columns.stop - cover.start
        codes, scales_FG = self.codes(start, stop, cover), _exact(self.scales(start, stop))
        some_FG = take_groups(scales_FG, self.group_size, columns)
        if self.format == "int8":
            return QuantizedWeight("int8", codes[:, first:last], some_FG)
        minimums_FG = None
        if self.zeros is not None and not self._is_symmetric:
            minimums_FG = self.zeros(start, stop).float().mul_(scales_FG.float()).neg_()
            minimums_FG = take_groups(minimums_FG, self.group_size, columns)
        return QuantizedWeight("int4", codes[:, first // 2 : last // 2], some_FG, minimums_FG)

    def rows(self, start: int, stop: int, columns: Range | None = None) -> Tensor:
        columns, cover = self._ranges(columns)
        codes = self.codes(start, stop, cover)
        values_FK = _unpacked(codes, len(cover)) if self.bits == 4 else codes.float()
        first = columns.start - cover.start
        values_FK = values_FK[:, first : first + len(columns)]
        groups_K = self._permuted
        if groups_K is None:
            groups_K = torch.arange(self.shape[1]) // self.group_size
        groups_K = groups_K[columns.start : columns.stop]
        if self.zeros is not None:
            values_FK -= self.zeros(start, stop).float()[:, groups_K]
        elif self.bits == 4:
            values_FK -= 8
        return values_FK.mul_(self.scales(start, stop).float()[:, groups_K])

    def _ranges(self, columns: Range | None) -> tuple[Range, Range]:
        """The columns asked for, and those that are read for them."""
        columns = Range(0, self.shape[1]) if columns is None else columns
        return columns, covering(columns, _WORD_COLUMNS, self.shape[1])

    @cached_property
    def _permuted(self) -> Tensor | None:
        """Groups of the columns; None: neighbours of `group_size` columns, in order."""
        if self.groups is None:
            return None
        groups_K = self.groups()
        in_order_K = torch.arange(self.shape[1]) // self.group_size
        return None if torch.equal(groups_K, in_order_K) else groups_K

    @cached_property
    def _is_symmetric(self) -> bool:
        """Whether the middle code means zero everywhere. Zeros are few: all of them are read."""
        if self.zeros is None:
            return True
        middle = 8 if self.bits == 4 else 0
        return bool((self.zeros(0, self.shape[0]) == middle).all())


@dataclass(frozen=True, eq=False, kw_only=True)
class Float8Weight:
    """float8_e4m3fn codes: as IntegerWeight, without zeros."""

    shape: tuple[int, int]
    num_bytes: int
    group_size: int
    codes: ReadCodes
    scales: Read

    @property
    def format(self) -> WeightFormat | None:
        return None if self.shape[1] % self.group_size else "fp8"

    def quantized_rows(
        self, start: int, stop: int, columns: Range | None = None
    ) -> QuantizedWeight:
        columns = Range(0, self.shape[1]) if columns is None else columns
        scales_FG = take_groups(_exact(self.scales(start, stop)), self.group_size, columns)
        return QuantizedWeight("fp8", self.codes(start, stop, columns), scales_FG)

    def rows(self, start: int, stop: int, columns: Range | None = None) -> Tensor:
        columns = Range(0, self.shape[1]) if columns is None else columns
        groups_K = torch.arange(columns.start, columns.stop) // self.group_size
        scales_FG = self.scales(start, stop).float()
        return self.codes(start, stop, columns).float().mul_(scales_FG[:, groups_K])


def words_as_bytes(words: Tensor) -> Tensor:
    """int32 [..., W] as uint8 [..., 4 W], the low byte of a word first (little endian)."""
    # Not contiguous(): that leaves the strides of a transposed single word, which no view takes.
    return words.clone(memory_format=torch.contiguous_format).view(torch.uint8)


def words_as_nibbles(words: Tensor) -> Tensor:
    """int32 [..., W] as uint8 [..., 8 W], the low four bits of a word first."""
    packed = words_as_bytes(words)
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)


def _unpacked(codes: Tensor, columns: int) -> Tensor:
    return torch.stack((codes & 15, codes >> 4), -1).flatten(1)[:, :columns].float()


def _exact(scales_FG: Tensor) -> Tensor:
    # bf16 goes to fp32: what computes with scales knows fp16 and fp32.
    return scales_FG.float() if scales_FG.dtype == torch.bfloat16 else scales_FG
