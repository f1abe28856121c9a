"""The safetensors files of a folder, by memory map: one file, or shards with an index.

Knows nothing of what the tensors are for. Never unpickles: .bin and .pt files are refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from shoal.core.errors import WeightsError
from shoal.core.split import Range

FLOAT_TYPES = ("F64", "F32", "F16", "BF16")

_INDEX = "model.safetensors.index.json"
_BYTES: Mapping[str, int] = {
    **{"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2},
    **{"I8": 1, "U8": 1, "F8_E4M3": 1},
}


class SafetensorsFiles:
    """Named tensors as they are stored.

    Attributes:
        folder: for messages.

    Raises:
        WeightsError: no safetensors, a missing shard, a truncated or corrupt file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, Any] = {}
        indexed = _indexed_names(folder)
        files = sorted(set(indexed.values())) if indexed else _single_files(folder)
        opened = {file_name: _open(folder / file_name) for file_name in files}
        for file in opened.values():
            self._files.update(dict.fromkeys(file.keys(), file))
        held = {file_name: frozenset(file.keys()) for file_name, file in opened.items()}
        for name, file_name in indexed.items():
            if name not in held[file_name]:
                raise WeightsError(
                    f"{folder / file_name} lacks {name}, which {_INDEX} says it holds; "
                    "fetch the model again"
                )
            self._files[name] = opened[file_name]  # others may have it too, left from before
        self.names = frozenset(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """As safetensors calls it: F32, BF16, I32, F8_E4M3, ..."""
        return str(self._slice(name).get_dtype())

    def num_bytes(self, name: str) -> int:
        return math.prod(self.shape(name)) * _BYTES[self.dtype(name)]

    def rows(self, name: str, start: int, stop: int, columns: Range | None = None) -> Tensor:
        if columns is None:
            rows: Tensor = self._slice(name)[start:stop]
        else:
            rows = self._slice(name)[start:stop, columns.start : columns.stop]
        return rows

    def matrix_rows(self, name: str, number: int, rows: Range, columns: Range) -> Tensor:
        """Of one of the matrices that are stacked in a tensor."""
        part = self._slice(name)[
            number : number + 1, rows.start : rows.stop, columns.start : columns.stop
        ]
        matrix: Tensor = part[0]
        return matrix

    def columns(self, name: str, start: int, stop: int) -> Tensor:
        columns: Tensor = self._slice(name)[:, start:stop]
        return columns

    def whole(self, name: str) -> Tensor:
        whole: Tensor = self._files[name].get_tensor(name)
        return whole

    def expect(
        self, name: str, types: tuple[str, ...], shape: tuple[int | None, ...]
    ) -> tuple[int, ...]:
        """The tensor's shape; None stands for any length.

        Raises:
            WeightsError: no such tensor, or one of another type or shape.
        """
        if name not in self.names:
            raise WeightsError(
                f"{self.folder} lacks the tensor {name}, which its quantised weights need; fetch "
                "the model again"
            )
        found, dtype = self.shape(name), self.dtype(name)
        fits = len(found) == len(shape) and all(
            length > 0 and needed in (None, length)
            for length, needed in zip(found, shape, strict=True)
        )
        if dtype not in types or not fits:
            needed = ["any" if length is None else length for length in shape]
            raise WeightsError(
                f"{self.folder}: {name} is {dtype} {list(found)}; its quantization_config and its "
                f"neighbours need {' or '.join(types)} [{', '.join(map(str, needed))}]: fetch the "
                "model again, or check that its config belongs to it"
            )
        return found

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
    except RuntimeError as error:  # torch's, which maps the file
        raise WeightsError(
            f"{path} cannot be mapped: {error}; raise this process's limits (ulimit -v, -d), "
            "or limit its memory by a control group instead"
        ) from error
