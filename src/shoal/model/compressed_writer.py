"""Writes a quantised checkpoint in the compressed-tensors format, a few rows at a time.

What is written is decided in `export_targets.py`. Knows nothing of where values come from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch
from torch import Tensor

from shoal.core.errors import WeightsError
from shoal.kernels.quantized import QuantizedWeight, quantize
from shoal.model.export_targets import Target
from shoal.model.exports import Export
from shoal.model.safetensors_writer import MAX_SHARD_BYTES, SafetensorsWriter, TensorPlan

Progress = Callable[[int, int], None]


def write_compressed(
    folder: Path,
    targets: Sequence[Target],
    progress: Progress,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> int:
    """Writes the tensors into the folder; returns their bytes.

    Args:
        progress: called with (bytes written, bytes to write).

    Raises:
        WeightsError: values that are not finite.
        OSError: such as a full disk.
    """
    planned = [(target, target.plans()) for target in targets]
    every = [plan for _, plans in planned for plan in plans]
    total, done = sum(plan.num_bytes for plan in every), 0
    with SafetensorsWriter(folder, every, max_shard_bytes) as writer:
        # Threads of our own: torch's wait for each other, which is slow on busy cores.
        pool = ThreadPoolExecutor(min(torch.get_num_threads(), _MAX_THREADS), "quantize")
        try:
            futures = [
                pool.submit(_convert, writer, target, plans, start, stop)
                for target, plans in planned
                for start, stop in _row_ranges(target.export)
            ]
            for future in as_completed(futures):
                done += future.result()
                progress(min(done, total), total)
        finally:
            pool.shutdown(cancel_futures=True)
    return total


_CHUNK_VALUES = 2**20
_MAX_THREADS = 8


def _row_ranges(export: Export) -> Iterator[tuple[int, int]]:
    shape = export.shape
    if not shape:
        yield 0, 1
        return
    columns = max(1, torch.Size(shape[1:]).numel())
    step = max(1, _CHUNK_VALUES // (columns * export.row_step)) * export.row_step
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


def _convert(
    writer: SafetensorsWriter, target: Target, plans: list[TensorPlan], start: int, stop: int
) -> int:
    """Reads, quantises and writes rows of a tensor; returns the bytes written."""
    num_bytes = 0
    for plan, values in zip(plans, _rows(target, start, stop), strict=True):
        _write(writer, plan, start, values)
        num_bytes += values.nbytes
    return num_bytes


def _write(writer: SafetensorsWriter, plan: TensorPlan, start: int, values: Tensor) -> None:
    if plan.name.endswith(".weight_shape"):  # whole, with every part of its weight
        writer.write(plan.name, 0, values)
        return
    row_bytes = plan.num_bytes // plan.shape[0] if plan.shape else 0
    writer.write(plan.name, start * row_bytes, values.to(plan.dtype, copy=False))


def _rows(target: Target, start: int, stop: int) -> tuple[Tensor, ...]:
    export = target.export
    if target.format is None:
        return (export.values(start, stop),)
    rows = export.codes(target.format, target.group_size, start, stop)
    if rows is None:
        try:
            rows = quantize(export.values(start, stop), target.format, target.group_size)
        except ValueError as error:
            raise WeightsError(f"{export.name} cannot be quantised: {error}") from error
    return _stored(rows, export.shape)


def _stored(rows: QuantizedWeight, shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    if rows.format == "fp8":
        return rows.codes, rows.scales_FG
    codes = rows.codes if rows.format == "int4" else rows.codes.view(torch.uint8) ^ 128
    return codes.contiguous().view(torch.int32), rows.scales_FG, torch.tensor(shape)
