"""Writes safetensors files whose tensors come in pieces, so that none need be whole in memory.

    header length u64 | JSON header, padded to 8 bytes | data

https://github.com/huggingface/safetensors#format. Shards and index are named as Hugging Face
names them. Knows nothing of what the tensors are for.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from torch import Tensor

MAX_SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """A tensor that will be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsWriter:
    """A context manager over the open files; everything is on disk when it ends well.

    Args:
        folder: exists.
        plans: all tensors, in the order of the files.
    """

    def __init__(
        self, folder: Path, plans: Sequence[TensorPlan], max_shard_bytes: int = MAX_SHARD_BYTES
    ) -> None:
        shards = _shards(plans, max_shard_bytes)
        self._starts: dict[str, tuple[BinaryIO, int]] = {}
        self._files: list[BinaryIO] = []
        weight_map = {}
        for index, shard in enumerate(shards):
            name = "model.safetensors"
            if len(shards) > 1:
                name = f"model-{index + 1:05}-of-{len(shards):05}.safetensors"
            self._open(folder / name, shard)
            weight_map.update({plan.name: name for plan in shard})
        if len(shards) > 1:
            size = sum(plan.num_bytes for plan in plans)
            index_json = {"metadata": {"total_size": size}, "weight_map": weight_map}
            path = folder / "model.safetensors.index.json"
            path.write_text(json.dumps(index_json, indent=2), "utf-8")

    def write(self, name: str, offset: int, values: Tensor) -> None:
        """Puts values into the tensor, from a byte of it on; from any thread.

        Raises:
            OSError: such as a full disk.
        """
        file, start = self._starts[name]
        data = values.contiguous().flatten().view(torch.uint8).numpy().data
        at = start + offset
        while data:
            written = os.pwrite(file.fileno(), data, at)
            data, at = data[written:], at + written

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for file in self._files:
            with file:
                if kind is None:
                    os.fsync(file.fileno())

    def _open(self, path: Path, shard: Sequence[TensorPlan]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for plan in shard:
            span = [end, end + plan.num_bytes]
            dtype = _NAMES[plan.dtype]
            header[plan.name] = {"dtype": dtype, "shape": plan.shape, "data_offsets": span}
            end = span[1]
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file = path.open("wb")
        self._files.append(file)
        file.write(struct.pack("<Q", len(text)) + text)
        file.flush()
        data_start, start = file.tell(), 0
        for plan in shard:
            self._starts[plan.name] = (file, data_start + start)
            start += plan.num_bytes
        file.truncate(data_start + end)


_NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int32: "I32",
    torch.int64: "I64",
}


def _shards(plans: Sequence[TensorPlan], max_bytes: int) -> list[list[TensorPlan]]:
    shards: list[list[TensorPlan]] = [[]]
    size = 0
    for plan in plans:
        if shards[-1] and size + plan.num_bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(plan)
        size += plan.num_bytes
    return shards
