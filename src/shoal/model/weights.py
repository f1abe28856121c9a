"""From a checkpoint on disk to a decoder on its device: checked, converted, a little at a time.

Tensors are memory-mapped and go to their place in chunks of rows, so that beyond the weights
themselves only a few chunks are in memory. Of tensors that are shared out, a shard reads its own
ranges. Knows nothing of what a decoder computes.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import torch

from shoal.comm import Group
from shoal.core.errors import WeightsError
from shoal.core.model_spec import ModelSpec
from shoal.core.options import Quantization
from shoal.core.split import Range, Shard, whole
from shoal.kernels import KernelSet
from shoal.kernels.cpu.step import Session
from shoal.model.decoder import Decoder
from shoal.model.expert_loader import ExpertLoader
from shoal.model.fill import Progress
from shoal.model.gguf_source import GGUFSource
from shoal.model.names import TensorNames, gguf_names, hf_names
from shoal.model.packed_cache import PackedCache
from shoal.model.packed_decoder import PackedDecoder
from shoal.model.packed_weights import PackedLoad, load_packed
from shoal.model.parameters import granule_of
from shoal.model.placements import tensor_shapes
from shoal.model.plain_weights import PlainLoad, add_one_to_norms, load_plain
from shoal.model.precision import WeightFormats, choose_formats
from shoal.model.safetensors_source import SafetensorsSource
from shoal.model.sources import WeightSource


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
    weights_memory_bytes: int | None = None,
    host_memory_bytes: int | None = None,
    progress: Progress | None = None,
    source: WeightSource | None = None,
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
        weights_memory_bytes: what weights may take of the device; layers beyond it stay in host
            memory, or on disk (or experts alone) where that is the device. None: all are there.
        host_memory_bytes: what layers beyond a GPU's memory may take. None: what they need.
        progress: called with (bytes read, bytes to read) as loading goes on.
        source: of tensors, by their names of Hugging Face; None: the checkpoint's files.

    Raises:
        WeightsError: a missing tensor, a wrong shape, a truncated or corrupt file, pickles.
        UnsupportedModelError: a tensor type that is not read.
        ConfigError: a precision that the weights do not allow.
        DeviceError: no memory for them.
    """
    is_gguf = source is None and path.is_file()
    if source is None:
        source = GGUFSource(path) if is_gguf else SafetensorsSource(path)
    names = gguf_names(spec) if is_gguf else hf_names(spec, source.names)
    formats = choose_formats(spec, source, names, quantize)
    if not isinstance(kernels, Session):  # rows are looked up in plain tensors
        formats = replace(
            formats, embedding=None, head=None if spec.tied_embeddings else formats.head
        )
    _check(path, tensor_shapes(spec, names), source, names)
    shard = _snapped(spec, shard or whole(spec), formats, isinstance(kernels, Session))
    loader = None
    if spec.experts is not None:
        loader = ExpertLoader(
            spec=spec,
            source=source,
            names=names,
            formats=formats,
            device=device,
            dtype=dtype,
            native=kernels.native if isinstance(kernels, Session) else None,
        )
    if isinstance(kernels, Session):
        cache = PackedCache(fingerprint, path, (spec, formats, dtype, shard))
        native = kernels.native
        load = PackedLoad(spec, shard, formats, dtype, source, names, cache, native, loader)
        packed = load_packed(load, weights_memory_bytes, progress)
        if spec.norm_plus_one:
            add_one_to_norms(packed.parameters.layers, packed.parameters.final_norm_E)
        packed_decoder = PackedDecoder(
            spec,
            packed.parameters,
            kernels,
            dtype,
            None if formats.label == "fp8" else formats.label,  # kept in bfloat16
            shard=shard,
            group=group,
            stream=packed.stream,
            store=packed.store,
        )
        if loader is not None:
            packed_decoder.expert_loader = loader
        return packed_decoder
    cache = PackedCache(fingerprint, path, (spec, formats, dtype, shard))
    plain = load_plain(
        PlainLoad(spec, shard, formats, device, dtype, source, names, cache),
        weights_memory_bytes,
        host_memory_bytes,
        progress,
    )
    decoder = Decoder(
        spec,
        plain.parameters,
        kernels,
        formats.label,
        shard=shard,
        group=group,
        device=device,
        dtype=dtype,
        stream=plain.stream,
    )
    decoder.expert_loader = loader
    return decoder


_log = logging.getLogger(__name__)


def _snapped(spec: ModelSpec, shard: Shard, formats: WeightFormats, packed: bool) -> Shard:
    """The shard with its FFN columns cut between groups, as its neighbours cut theirs."""
    granules = [
        granule_of(each.down, spec.ffn_size, packed)
        for each, layer in zip(formats.layers, spec.layers, strict=True)
        if not layer.has_experts
    ]
    granule = max(granules, default=1)

    def nearest(edge: int) -> int:
        return min(round(edge / granule) * granule, spec.ffn_size)

    return replace(shard, ffn=Range(nearest(shard.ffn.start), nearest(shard.ffn.stop)))


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
