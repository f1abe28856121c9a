"""From a checkpoint on disk to a decoder on its device: checked, converted, a little at a time.

Tensors are memory-mapped and go to their place in chunks of rows, so that beyond the weights
themselves only a few chunks are in memory. Of tensors that are shared out, a shard reads its own
ranges. Knows nothing of what a decoder computes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from shoal.comm import Group
from shoal.core.errors import DeviceError, WeightsError
from shoal.core.model_spec import ModelSpec
from shoal.core.options import Quantization
from shoal.core.split import Range, Shard, whole
from shoal.kernels import KernelSet
from shoal.kernels.cpu.arena import Arena, PackedWeight, packed_bytes
from shoal.kernels.cpu.step import Session
from shoal.model.decoder import Decoder
from shoal.model.gguf_source import GGUFSource
from shoal.model.names import TensorNames, gguf_names, hf_names
from shoal.model.packed_cache import PackedCache
from shoal.model.packed_decoder import PackedDecoder
from shoal.model.parameters import (
    Allocator,
    DecoderParameters,
    Placement,
    allocate,
    granule_of,
    packed_format,
    table_formats,
    weight_shapes,
)
from shoal.model.placements import placements, tensor_shapes
from shoal.model.precision import Format, WeightFormats, choose_formats
from shoal.model.safetensors_source import SafetensorsSource
from shoal.model.sources import WeightSource
from shoal.model.stow import stow

Progress = Callable[[int, int], None]


def load_decoder(
    path: Path,
    spec: ModelSpec,
    *,
    shard: Shard | None = None,
    group: Group | None = None,
    device: torch.device,
    dtype: torch.dtype,
    kernels: KernelSet | Session,
    quantize: Quantization = "none",
    fingerprint: str = "",
    progress: Progress | None = None,
) -> Decoder | PackedDecoder:
    """A decoder with the weights of a safetensors folder or .gguf file.

    Precision is chosen for the whole model, so that every split of it computes the same. Where
    FFN columns are kept in groups, the decoder's shard has its range of them moved to the nearest
    groups' edges.

    Args:
        shard: what it holds of the model; None: all.
        group: the ranks that hold the rest, where there are any.
        dtype: of what is not quantised.
        kernels: a kernel set, or a session of the compiled CPU path.
        quantize: see `precision.py`.
        fingerprint: of the checkpoint; packed weights that took long are kept under it.
        progress: called with (bytes read, bytes to read) as loading goes on.

    Raises:
        WeightsError: a missing tensor, a wrong shape, a truncated or corrupt file, pickles.
        UnsupportedModelError: a tensor type that is not read.
        ConfigError: a precision that the weights do not allow.
        DeviceError: no memory for them.
    """
    source: WeightSource = GGUFSource(path) if path.is_file() else SafetensorsSource(path)
    names = gguf_names(spec) if path.is_file() else hf_names(spec, source.names)
    formats = choose_formats(spec, source, names, quantize)
    if not isinstance(kernels, Session):  # rows are looked up in plain tensors
        formats = replace(
            formats, embedding=None, head=None if spec.tied_embeddings else formats.head
        )
    _check(path, tensor_shapes(spec, names), source, names)
    shard = _snapped(spec, shard or whole(spec), formats, isinstance(kernels, Session))
    arena = None
    if isinstance(kernels, Session):
        arena = _arena(spec, shard, formats, dtype, kernels)
    parameters = allocate(spec, shard, formats, Allocator(device, dtype, arena))
    needed = list(placements(spec, shard, parameters, names))
    if arena is None:
        _fill(needed, source, None, progress)
    else:
        held = shard.layers, shard.heads, shard.ffn, shard.vocab
        ends = shard.has_embedding, shard.has_head
        cache = PackedCache(fingerprint, path, (spec, formats, dtype, held, ends))
        _fill_arena(needed, source, arena, cache, progress)
    if spec.norm_plus_one:
        _add_one_to_norms(parameters)
    if isinstance(kernels, Session):
        label = None if formats.label == "fp8" else formats.label  # kept in bfloat16
        return PackedDecoder(spec, parameters, kernels, dtype, label, shard=shard, group=group)
    return Decoder(
        spec,
        parameters,
        kernels,
        formats.label,
        shard=shard,
        group=group,
        device=device,
        dtype=dtype,
    )


_CHUNK_BYTES = 4 * 2**20
_MAX_THREADS = 8
_WORTH_KEEPING_S = 0.5
_READ_BYTES_PER_S = 5e8  # of a modest disk: what is packed faster need not be kept
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class _Chunk:
    """Rows [start, stop) of a tensor of the checkpoint, and where they go."""

    placement: Placement
    start: int
    stop: int
    num_bytes: int


def _snapped(spec: ModelSpec, shard: Shard, formats: WeightFormats, packed: bool) -> Shard:
    """The shard with its FFN columns cut between groups, as its neighbours cut theirs."""
    granules = [granule_of(each.down, spec.ffn_size, packed) for each in formats.layers]
    granule = max(granules, default=1)

    def nearest(edge: int) -> int:
        return min(round(edge / granule) * granule, spec.ffn_size)

    return replace(shard, ffn=Range(nearest(shard.ffn.start), nearest(shard.ffn.stop)))


def _arena(
    spec: ModelSpec, shard: Shard, formats: WeightFormats, dtype: torch.dtype, session: Session
) -> Arena:
    wanted: list[tuple[Format, int, int]] = []
    for index in range(shard.layers.start, shard.layers.stop):
        layer = formats.layers[index]
        shapes = weight_shapes(spec, shard, layer, packed=True)
        wanted += [(getattr(layer, part), *shape) for part, shape in shapes.items()]
    tables = table_formats(spec, shard, formats).values()
    wanted += [(each, len(shard.vocab), spec.hidden_size) for each in tables]
    size = sum(
        packed_bytes(session.native, packed_format(weight_format, dtype), rows, columns)
        for weight_format, rows, columns in wanted
        if rows and columns
    )
    try:
        return Arena(session.native, size)
    except (OSError, MemoryError, OverflowError) as error:
        raise DeviceError(
            f"no memory for {size / 2**30:.1f} GiB of weights; use --quantize int4, or a smaller "
            "model"
        ) from error


def _check(
    path: Path, needed: dict[str, tuple[int, ...]], source: WeightSource, names: TensorNames
) -> None:
    """Everything is there in its shape, before anything is read; also what others hold."""
    for name, shape in needed.items():
        if name not in source.names:
            raise WeightsError(
                f"{path} lacks the tensor {name}; fetch the model again, or check that its config "
                "belongs to it"
            )
        found = source.shape(name)
        if found != shape:
            raise WeightsError(
                f"{path}: {name} has shape {list(found)}; the config needs {list(shape)}"
            )
    unknown = sorted(source.names - needed.keys())
    unknown = [name for name in unknown if not names.is_ignored(name)]
    if unknown:
        _log.warning("%s: %d tensors are not used, %s the first", path, len(unknown), unknown[0])


def _fill(
    needed: list[Placement], source: WeightSource, arena: Arena | None, progress: Progress | None
) -> None:
    chunks = [chunk for placement in needed for chunk in _chunks(placement, source)]
    total, done = sum(chunk.num_bytes for chunk in chunks), 0
    # Converting is bound by memory and by calls that drop the GIL.
    pool = ThreadPoolExecutor(min(torch.get_num_threads(), _MAX_THREADS), "load")
    try:
        futures = {
            pool.submit(stow, each.placement, each.start, each.stop, source, arena): each
            for each in chunks
        }
        for future in as_completed(futures):
            future.result()
            done += futures[future].num_bytes
            if progress is not None:
                progress(done, total)
    finally:
        pool.shutdown(cancel_futures=True)


def _fill_arena(
    needed: list[Placement],
    source: WeightSource,
    arena: Arena,
    cache: PackedCache,
    progress: Progress | None,
) -> None:
    """From what was kept at an earlier start, or from the checkpoint."""
    if cache.read_into(arena.data):
        _log.info("packed weights were kept at an earlier start")
        needed = [each for each in needed if not isinstance(each.target, PackedWeight)]
        _fill(needed, source, arena, progress)
        return
    began_s = time.perf_counter()
    _fill(needed, source, arena, progress)
    slow_s = max(_WORTH_KEEPING_S, len(arena.data) / _READ_BYTES_PER_S)
    if time.perf_counter() - began_s > slow_s:
        cache.keep(arena.data)


def _chunks(placement: Placement, source: WeightSource) -> Iterator[_Chunk]:
    num_rows, row_bytes = placement.num_rows, source.row_bytes(placement.name)
    if placement.columns is not None:
        row_bytes = row_bytes * len(placement.columns) // placement.shape[1]
    step = num_rows if placement.places is None else max(1, _CHUNK_BYTES // max(row_bytes, 1))
    for start in range(0, num_rows, step):
        stop = min(start + step, num_rows)
        yield _Chunk(placement, start, stop, (stop - start) * row_bytes)


def _add_one_to_norms(parameters: DecoderParameters) -> None:
    norms: list[Tensor | None] = [parameters.final_norm_E]
    for layer in parameters.layers:
        norms += [layer.attention_norm_E, layer.qk_norm_HD, layer.post_attention_norm_E]
        norms += [layer.ffn_norm_E, layer.post_ffn_norm_E]
    for norm in norms:
        if norm is not None:
            norm.add_(1.0)
