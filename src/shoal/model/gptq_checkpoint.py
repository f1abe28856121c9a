"""GPTQ checkpoints as AutoGPTQ and GPTQModel write them: 4 or 8 bits, groups, perhaps permuted.

    <module>.qweight  int32 [K·bits/32, F]   neighbouring columns of the weight in a word
    <module>.qzeros   int32 [G, F·bits/32]   less one, unless checkpoint_format is gptq_v2
    <module>.scales   float [G, F]
    <module>.g_idx    int32 [K]              group of each column; with desc_act in any order

Rows [start, stop) of the weight are columns here, columns are rows. How many bits a module has is
read off its shapes, since GPTQModel's `dynamic` may give each its own.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from shoal.core.errors import UnsupportedModelError
from shoal.core.split import Range
from shoal.model.fields import Fields
from shoal.model.safetensors_files import FLOAT_TYPES, SafetensorsFiles
from shoal.model.scale_layouts import group_indices
from shoal.model.stored_weights import IntegerWeight, StoredWeight, words_as_bytes, words_as_nibbles


def read_gptq(files: SafetensorsFiles, settings: Fields) -> dict[str, StoredWeight]:
    """Every module with a qweight; see `quantized_checkpoints.find_stored_weights` for errors."""
    layout = settings.text("checkpoint_format", settings.text("format", "gptq"))
    if layout not in ("gptq", "gptq_v2") or settings.flag("is_marlin_format"):
        raise UnsupportedModelError(
            f"{settings.source}: GPTQ in the layout {layout!r} is not supported; shoal reads "
            "gptq and gptq_v2: use the checkpoint it was made from"
        )
    bits = settings.integer("bits", 4)
    if bits not in (4, 8):
        raise UnsupportedModelError(
            f"{settings.source}: GPTQ with {bits} bits is not supported; shoal reads 4 and 8: "
            "use such a checkpoint, or a .gguf file"
        )
    group_size = settings.integer("group_size", 128)
    offset = 0 if layout == "gptq_v2" else 1
    modules = [name.removesuffix(".qweight") for name in files.names if name.endswith(".qweight")]
    return {f"{module}.weight": _weight(files, module, group_size, offset) for module in modules}


def _weight(files: SafetensorsFiles, module: str, group_size: int, offset: int) -> IntegerWeight:
    qweight, qzeros, scales, g_idx = (
        f"{module}.{part}" for part in ("qweight", "qzeros", "scales", "g_idx")
    )
    words, rows = files.expect(qweight, ("I32",), (None, None))
    num_groups, _ = files.expect(scales, FLOAT_TYPES, (None, rows))
    _, zero_words = files.expect(qzeros, ("I32",), (num_groups, None))
    bits = 8 if 4 * zero_words == rows else 4
    files.expect(qzeros, ("I32",), (num_groups, -(-rows * bits // 32)))
    columns = words * 32 // bits
    groups = None
    if g_idx in files.names:
        files.expect(g_idx, ("I32", "I64"), (columns,))
        groups = partial(group_indices, files, g_idx, num_groups)
        group_size = -(-columns // num_groups)
    else:
        group_size = columns if group_size < 1 else group_size
        files.expect(scales, FLOAT_TYPES, (-(-columns // group_size), rows))
    return IntegerWeight(
        shape=(rows, columns),
        num_bytes=files.num_bytes(qweight) + files.num_bytes(scales),
        bits=bits,
        group_size=group_size,
        codes=partial(_codes, files, qweight, bits),
        scales=lambda start, stop: files.columns(scales, start, stop).t().contiguous(),
        zeros=partial(_zeros, files, qzeros, bits, offset),
        groups=groups,
    )


def _codes(
    files: SafetensorsFiles, name: str, bits: int, start: int, stop: int, columns: Range
) -> Tensor:
    words = Range(columns.start * bits // 32, -(-columns.stop * bits // 32))
    # By rows the words are the codes one after the other, as they are kept here.
    codes = words_as_bytes(files.rows(name, words.start, words.stop, Range(start, stop)).t())
    return codes if bits == 4 else (codes ^ 128).view(torch.int8)


def _zeros(
    files: SafetensorsFiles, name: str, bits: int, offset: int, start: int, stop: int
) -> Tensor:
    per_word = 32 // bits
    first_word = start // per_word
    words = files.columns(name, first_word, -(-stop // per_word))
    zeros_GF = words_as_nibbles(words) if bits == 4 else words_as_bytes(words)
    zeros_GF = zeros_GF[:, start - per_word * first_word : stop - per_word * first_word]
    # An offset that runs over wraps around, as in AutoGPTQ's own dequantisation.
    zeros_FG = (zeros_GF.t().short() + offset).bitwise_and_(2**bits - 1)
    return zeros_FG if bits == 4 else zeros_FG.sub_(128)
