"""The header of a GGUF file: its metadata and where its tensors lie. Standard library only.

    magic "GGUF" | version u32 | tensor count u64 | metadata count u64
    metadata:    key string | type u32 | value            (string: length u64, bytes)
    tensor info: name string | n_dims u32 | dims u64... | type u32 | offset u64
    padding to the alignment | tensor data

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Every count and length is checked
against what is left of the file before anything is allocated. `gguf.GGUFReader` reads the same
but makes numpy views of every string: 19 s for a vocabulary of 262 144, 0.2 s here.

Knows nothing of what keys or tensor types mean.
"""

from __future__ import annotations

import mmap
import struct
import sys
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from shoal.core.errors import ModelError, UnsupportedModelError

Scalar = int | float | bool | str
Value = Scalar | Sequence["Value"]
"""Arrays of numbers are `array.array`, arrays of anything else are lists."""


@dataclass(frozen=True, slots=True)
class GGUFTensorInfo:
    """Where one tensor lies.

    Attributes:
        dims: as stored, fastest-varying first (a row-major [rows, columns] is (columns, rows)).
        type_id: ggml tensor type (`gguf.GGMLQuantizationType`).
        offset: absolute, in bytes from the start of the file.
    """

    name: str
    dims: tuple[int, ...]
    type_id: int
    offset: int


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    """Everything in front of the tensor data, which begins at `data_offset`."""

    version: int
    metadata: dict[str, Value]
    tensors: tuple[GGUFTensorInfo, ...]
    data_offset: int
    size_bytes: int


def read_gguf_header(path: Path) -> GGUFHeader:
    """Reads the header.

    Raises:
        ModelError: not a GGUF file, truncated, or corrupt.
        UnsupportedModelError: a version or byte order that is not read.
    """
    try:
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            return _Reader(path, data).header()
    except (OSError, ValueError) as error:  # mmap refuses an empty file with ValueError
        raise ModelError(f"{path} cannot be read: {error}; needed a GGUF file") from error


_MAX_KEY_BYTES = 65_535  # the specification's limit
_MAX_DIMS = 8
_MAX_ARRAY_DEPTH = 4
_DEFAULT_ALIGNMENT = 32
_MIN_METADATA_BYTES = 8 + 4 + 1
_MIN_TENSOR_BYTES = 8 + 4 + 4 + 8

_BOOL, _STRING, _ARRAY = 7, 8, 9
# GGUF type -> struct and array code; the sizes are the same with "<" and natively (checked below).
_NUMBERS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "B",
    10: "Q",
    11: "q",
    12: "d",
}
_SIZES = {type_id: struct.calcsize("<" + code) for type_id, code in _NUMBERS.items()}
_MIN_SIZES = {**_SIZES, _STRING: 8, _ARRAY: 12}


class _Reader:
    """A cursor over the mapped file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path = path
        self._data = data
        self._size = len(data)
        self._position = 0

    def header(self) -> GGUFHeader:
        version = self._preamble()
        num_tensors = self._count(self._number(10), _MIN_TENSOR_BYTES, "tensors")
        num_metadata = self._count(self._number(10), _MIN_METADATA_BYTES, "metadata entries")
        metadata: dict[str, Value] = {}
        for _ in range(num_metadata):
            key = self._string(limit=_MAX_KEY_BYTES)
            if key in metadata:
                raise self._corrupt(f"metadata key {key!r} occurs twice")
            metadata[key] = self._value(int(self._number(4)), depth=0)
        relative = [self._tensor() for _ in range(num_tensors)]
        if len({name for name, *_ in relative}) < num_tensors:
            raise self._corrupt("two tensors have one name")
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment <= 0 or alignment % 8:
            raise self._corrupt(f"general.alignment is {alignment!r}, not a multiple of 8")
        data_offset = -(-self._position // alignment) * alignment
        return GGUFHeader(
            version=version,
            metadata=metadata,
            tensors=tuple(
                GGUFTensorInfo(name, dims, type_id, data_offset + offset)
                for name, dims, type_id, offset in relative
            ),
            data_offset=data_offset,
            size_bytes=self._size,
        )

    def _preamble(self) -> int:
        if self._take(4) != b"GGUF":
            raise ModelError(f"{self._path} is not a GGUF file: it does not begin with 'GGUF'")
        version = int(self._number(4))
        if version & 0xFFFF == 0:
            raise UnsupportedModelError(
                f"{self._path} is a big-endian GGUF file; shoal reads little-endian ones: "
                "convert it with gguf-convert-endian"
            )
        if version not in (2, 3):
            raise UnsupportedModelError(
                f"{self._path} has GGUF version {version}; shoal reads versions 2 and 3"
            )
        return version

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string(limit=_MAX_KEY_BYTES)
        num_dims = int(self._number(4))
        if num_dims > _MAX_DIMS:
            raise self._corrupt(f"tensor {name!r} has {num_dims} dimensions")
        dims = tuple(int(self._number(10)) for _ in range(num_dims))
        return name, dims, int(self._number(4)), int(self._number(10))

    def _value(self, type_id: int, depth: int) -> Value:
        if type_id == _STRING:
            return self._string()
        if type_id == _BOOL:
            return bool(self._number(_BOOL))
        if type_id == _ARRAY:
            return self._array(depth)
        return self._number(type_id)

    def _array(self, depth: int) -> Value:
        if depth == _MAX_ARRAY_DEPTH:
            raise self._corrupt(f"arrays are nested deeper than {_MAX_ARRAY_DEPTH}")
        type_id = int(self._number(4))
        if type_id not in _MIN_SIZES:
            raise self._corrupt(f"unknown metadata type {type_id}")
        count = self._count(self._number(10), _MIN_SIZES[type_id], "array elements")
        if type_id == _STRING:
            return self._strings(count)
        if type_id == _ARRAY:
            return [self._array(depth + 1) for _ in range(count)]
        numbers = array(_NUMBERS[type_id])
        numbers.frombytes(self._take(count * _SIZES[type_id]))
        if sys.byteorder == "big":
            numbers.byteswap()
        return [bool(number) for number in numbers] if type_id == _BOOL else numbers

    def _strings(self, count: int) -> list[str]:
        # The one hot loop (a vocabulary has 10^5 strings): everything is local.
        data, position, size = self._data, self._position, self._size
        read_length: Callable[[mmap.mmap, int], tuple[int]] = struct.Struct("<Q").unpack_from
        strings = []
        for _ in range(count):
            start = position + 8
            if start > size:
                raise self._truncated()
            position = start + read_length(data, position)[0]
            if position > size:
                raise self._truncated()
            strings.append(data[start:position].decode("utf-8", "replace"))
        self._position = position
        return strings

    def _string(self, limit: int | None = None) -> str:
        length = int(self._number(10))
        if limit is not None and length > limit:
            raise self._corrupt(f"a name of {length} bytes; at most {limit} are allowed")
        return self._take(length).decode("utf-8", "replace")

    def _number(self, type_id: int) -> int | float:
        if type_id not in _NUMBERS:
            raise self._corrupt(f"unknown metadata type {type_id}")
        value: int | float
        (value,) = struct.unpack("<" + _NUMBERS[type_id], self._take(_SIZES[type_id]))
        return value

    def _count(self, number: int | float, min_bytes: int, what: str) -> int:
        count = int(number)
        if count * min_bytes > self._size - self._position:
            raise self._corrupt(f"{count} {what} do not fit into the file (is it truncated?)")
        return count

    def _take(self, num_bytes: int) -> bytes:
        end = self._position + num_bytes
        if end > self._size:
            raise self._truncated()
        taken = self._data[self._position : end]
        self._position = end
        return taken

    def _truncated(self) -> ModelError:
        return ModelError(
            f"{self._path} is truncated: its header does not fit into its {self._size} bytes; "
            "fetch the file again"
        )

    def _corrupt(self, what: str) -> ModelError:
        return ModelError(f"{self._path} is corrupt at byte {self._position}: {what}")
