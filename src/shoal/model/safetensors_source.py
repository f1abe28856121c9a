"""Tensors of a safetensors folder, by memory map: one file, or shards with an index.

Knows nothing of what the tensors are for. Never unpickles: .bin and .pt files are refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from shoal.core.errors import WeightsError

_INDEX = "model.safetensors.index.json"
_FLOAT_BYTES: Mapping[str, int] = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


class SafetensorsSource:
    """Named tensors of a folder.

    Raises:
        WeightsError: no safetensors, a missing shard, a truncated or corrupt file.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, Any] = {}
        indexed = _indexed_names(folder)
        for file_name in sorted(set(indexed.values())) if indexed else _single_files(folder):
            opened = _open(folder / file_name)
            self._files.update(dict.fromkeys(opened.keys(), opened))
        for name, file_name in indexed.items():
            if name not in self._files:
                raise WeightsError(
                    f"{folder / file_name} lacks {name}, which {_INDEX} says it holds; "
                    "fetch the model again"
                )

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def row_bytes(self, name: str) -> int:
        """Bytes in the file of one row (index into the first dimension)."""
        slice_ = self._slice(name)
        size = _FLOAT_BYTES.get(slice_.get_dtype())
        if size is None:
            raise WeightsError(
                f"{self._folder}: {name} has type {slice_.get_dtype()}; shoal reads "
                f"{', '.join(_FLOAT_BYTES)}: use an unquantised checkpoint"
            )
        for length in slice_.get_shape()[1:]:
            size *= length
        return size

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        rows: Tensor = self._slice(name)[start:stop]
        return rows

    def _slice(self, name: str) -> Any:
        return self._files[name].get_slice(name)


def _indexed_names(folder: Path) -> dict[str, str]:
    """Tensor name → shard, as the index lists them; empty without an index."""
    path = folder / _INDEX
    if not path.is_file():
        return {}
    try:
        listed = json.loads(path.read_bytes())["weight_map"]
        shards = {str(name): str(file_name) for name, file_name in listed.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{path} is not a safetensors index: {error!r}") from error
    for file_name in shards.values():
        # An index is untrusted: it must not reach beyond its folder.
        if PurePath(file_name).name != file_name:
            raise WeightsError(f"{path} names {file_name!r}; shards must lie beside their index")
    return shards


def _single_files(folder: Path) -> list[str]:
    if (folder / "model.safetensors").is_file():
        return ["model.safetensors"]
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    if len(found) == 1:
        return found
    if found:
        raise WeightsError(f"{folder} holds {len(found)} .safetensors files but no {_INDEX}")
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt*") for path in folder.glob(pattern))
    if pickled:
        raise WeightsError(
            f"{folder} holds {pickled[0]}, a pickle that could run any code when read; "
            "convert it to safetensors"
        )
    raise WeightsError(f"{folder} holds no .safetensors file; fetch the model again")


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} cannot be read: {error}; fetch it again") from error
