"""From a checkpoint on disk to a Decoder on its device: checked, converted, a little at a time.

Tensors are memory-mapped and go to their place in chunks of rows, so that beyond the weights
themselves only a few chunks are in memory. Knows nothing of what a decoder computes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from shoal.core.errors import WeightsError
from shoal.core.model_spec import ModelSpec
from shoal.kernels import KernelSet
from shoal.model.decoder import Decoder
from shoal.model.gguf_source import GGUFSource
from shoal.model.names import TensorNames, gguf_names, hf_names
from shoal.model.parameters import DecoderParameters, Placement, allocate, placements
from shoal.model.safetensors_source import SafetensorsSource

Progress = Callable[[int, int], None]


class WeightSource(Protocol):
    """Named tensors of a checkpoint, read by rows (indices into the first dimension)."""

    @property
    def names(self) -> frozenset[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def row_bytes(self, name: str) -> int: ...

    def rows(self, name: str, start: int, stop: int) -> Tensor: ...


def load_decoder(
    path: Path,
    spec: ModelSpec,
    *,
    device: torch.device,
    dtype: torch.dtype,
    kernels: KernelSet,
    progress: Progress | None = None,
) -> Decoder:
    """A decoder with the weights of a safetensors folder or .gguf file.

    Args:
        progress: called with (bytes read, bytes to read) as loading goes on.

    Raises:
        WeightsError: a missing tensor, a wrong shape, a truncated or corrupt file, pickles.
        UnsupportedModelError: a tensor type that is not read.
    """
    source: WeightSource = GGUFSource(path) if path.is_file() else SafetensorsSource(path)
    names = gguf_names(spec) if path.is_file() else hf_names(spec, source.names)
    parameters = allocate(spec, device, dtype)
    needed = list(placements(spec, parameters, names))
    _check(path, needed, source, names)
    _fill(needed, source, progress)
    if spec.norm_plus_one:
        _add_one_to_norms(parameters)
    return Decoder(spec, parameters, kernels)


_CHUNK_BYTES = 4 * 2**20
_MAX_THREADS = 8
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class _Chunk:
    """Rows [start, stop) of a tensor of the checkpoint, and their place."""

    name: str
    start: int
    stop: int
    target: Tensor
    num_bytes: int


def _check(path: Path, needed: list[Placement], source: WeightSource, names: TensorNames) -> None:
    """Everything is there in its shape, before anything is read."""
    for placement in needed:
        if placement.name not in source.names:
            raise WeightsError(
                f"{path} lacks the tensor {placement.name}; fetch the model again, or check that "
                "its config belongs to it"
            )
        found = source.shape(placement.name)
        if found != placement.shape:
            raise WeightsError(
                f"{path}: {placement.name} has shape {list(found)}; the config needs "
                f"{list(placement.shape)}"
            )
    unknown = sorted(source.names - {placement.name for placement in needed})
    unknown = [name for name in unknown if not names.is_ignored(name)]
    if unknown:
        _log.warning("%s: %d tensors are not used, %s the first", path, len(unknown), unknown[0])


def _fill(needed: list[Placement], source: WeightSource, progress: Progress | None) -> None:
    chunks = [chunk for placement in needed for chunk in _chunks(placement, source)]
    total, done = sum(chunk.num_bytes for chunk in chunks), 0
    # Converting is bound by memory and by numpy and torch calls that drop the GIL.
    pool = ThreadPoolExecutor(min(torch.get_num_threads(), _MAX_THREADS), "load")
    try:
        futures = {pool.submit(_fill_chunk, chunk, source): chunk for chunk in chunks}
        for future in as_completed(futures):
            future.result()
            done += futures[future].num_bytes
            if progress is not None:
                progress(done, total)
    finally:
        pool.shutdown(cancel_futures=True)


def _chunks(placement: Placement, source: WeightSource) -> Iterator[_Chunk]:
    name, target, num_rows = placement.name, placement.target, placement.shape[0]
    row_bytes = source.row_bytes(name)
    if target.numel() != torch.Size(placement.shape).numel():  # copies of a shared norm
        yield _Chunk(name, 0, num_rows, target, num_rows * row_bytes)
        return
    # A target may be a view by heads: then a step along it is several rows of the file.
    rows_per_step = num_rows // len(target)
    num_steps = max(1, _CHUNK_BYTES // (row_bytes * rows_per_step))
    for step, part in enumerate(torch.split(target, num_steps)):
        start = step * num_steps * rows_per_step
        stop = start + len(part) * rows_per_step
        yield _Chunk(name, start, stop, part, (stop - start) * row_bytes)


def _fill_chunk(chunk: _Chunk, source: WeightSource) -> None:
    values = source.rows(chunk.name, chunk.start, chunk.stop)
    if values.numel() == chunk.target.numel():
        values = values.view(chunk.target.shape)
    chunk.target.copy_(values)


def _add_one_to_norms(parameters: DecoderParameters) -> None:
    norms: list[Tensor | None] = [parameters.final_norm_E]
    for layer in parameters.layers:
        norms += [layer.attention_norm_E, layer.qk_norm_HD, layer.post_attention_norm_E]
        norms += [layer.ffn_norm_E, layer.post_ffn_norm_E]
    for norm in norms:
        if norm is not None:
            norm.add_(1.0)
