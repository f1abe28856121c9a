"""compressed-tensors checkpoints (llm-compressor's, and those of `shoal quantize`).

    pack-quantized            <module>.weight_packed      int32 [F, ⌈K·bits/32⌉], code + 2^(bits-1)
                              <module>.weight_shape       [F, K]
    int-, naive-quantized     <module>.weight             int8 [F, K]
    float-, naive-quantized   <module>.weight             F8_E4M3 [F, K]
    all                       <module>.weight_scale       see scale_layouts.py
                              <module>.weight_zero_point  int8 like the scale, or int32 packed along
                                                          the rows
                              <module>.weight_g_idx       group of each column, if permuted

What a module has says how it is stored, so the config's targets and `ignore` need not be
matched: a module that is ignored has a plain weight. Knows nothing of activations.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from shoal.core.errors import WeightsError
from shoal.core.split import Range
from shoal.model.compressed_tensors_config import CompressionSettings, read_settings
from shoal.model.fields import Fields
from shoal.model.fp8_checkpoint import float8_weight
from shoal.model.safetensors_files import FLOAT_TYPES, SafetensorsFiles
from shoal.model.scale_layouts import group_indices, scale_layout
from shoal.model.stored_weights import (
    IntegerWeight,
    Read,
    ReadCodes,
    StoredWeight,
    words_as_bytes,
    words_as_nibbles,
)


def read_compressed_tensors(files: SafetensorsFiles, fields: Fields) -> dict[str, StoredWeight]:
    """Every quantised weight; see `quantized_checkpoints.find_stored_weights` for errors."""
    settings = read_settings(fields)
    stored: dict[str, StoredWeight] = {}
    for name in files.names:
        if name.endswith(".weight_packed"):
            weight = name.removesuffix("_packed")
            stored[weight] = _packed_weight(files, weight, settings)
        elif name.endswith(".weight") and files.dtype(name) == "I8":
            stored[name] = _int8_weight(files, name, settings)
        elif name.endswith(".weight") and files.dtype(name) == "F8_E4M3":
            stored[name] = float8_weight(
                files, name, group_sizes=settings.group_sizes, blocks=settings.blocks
            )
    return stored


def _packed_weight(
    files: SafetensorsFiles, name: str, settings: CompressionSettings
) -> IntegerWeight:
    packed = f"{name}_packed"
    rows, words = files.expect(packed, ("I32",), (None, None))
    files.expect(f"{name}_shape", ("I64", "I32"), (2,))
    said_rows, columns = files.whole(f"{name}_shape").tolist()
    fitting = [bits for bits in settings.bits if words == -(-columns // (32 // bits))]
    if said_rows != rows or not fitting:
        raise WeightsError(
            f"{files.folder}: {name}_shape says [{said_rows}, {columns}], and {packed} has shape "
            f"[{rows}, {words}] of words of 32 bits, for codes of "
            f"{' or '.join(map(str, settings.bits))} bits: the file is corrupt, fetch it again"
        )
    part = _Part(files, name, (rows, columns), fitting[0], settings)
    return part.weight(files.num_bytes(packed), partial(_packed_codes, files, packed, part.bits))


def _int8_weight(
    files: SafetensorsFiles, name: str, settings: CompressionSettings
) -> IntegerWeight:
    rows, columns = files.expect(name, ("I8",), (None, None))
    part = _Part(files, name, (rows, columns), 8, settings)
    return part.weight(files.num_bytes(name), partial(files.rows, name))


@dataclass(frozen=True, slots=True)
class _Part:
    """A weight's scales and zeros, which are read alike whatever holds its codes."""

    files: SafetensorsFiles
    name: str
    shape: tuple[int, int]
    bits: int
    settings: CompressionSettings

    def weight(self, code_bytes: int, codes: ReadCodes) -> IntegerWeight:
        files, scale = self.files, f"{self.name}_scale"
        if scale not in files.names:
            raise WeightsError(f"{files.folder}: {self.name} has no {scale}; fetch the model again")
        files.expect(scale, FLOAT_TYPES, (None,) * len(files.shape(scale)))
        layout = scale_layout(
            files,
            scale,
            self.shape,
            group_sizes=self.settings.group_sizes,
            blocks=self.settings.blocks,
        )
        num_groups = -(-self.shape[1] // layout.columns)
        return IntegerWeight(
            shape=self.shape,
            num_bytes=code_bytes + files.num_bytes(scale),
            bits=self.bits,
            group_size=layout.columns,
            codes=codes,
            scales=layout.reader(files, scale),
            zeros=self._zeros(num_groups),
            groups=self._groups(num_groups),
        )

    def _zeros(self, num_groups: int) -> Read | None:
        files, name = self.files, f"{self.name}_zero_point"
        if name not in files.names:
            return None
        if files.dtype(name) == "I32":
            files.expect(name, ("I32",), (-(-self.shape[0] * self.bits // 32), num_groups))
            return partial(_packed_zeros, files, name, self.bits)
        files.expect(name, ("I8",), (None,) * len(files.shape(name)))
        layout = scale_layout(
            files,
            name,
            self.shape,
            group_sizes=self.settings.group_sizes,
            blocks=self.settings.blocks,
        )
        read, middle = layout.reader(files, name), 8 if self.bits == 4 else 0
        return lambda start, stop: read(start, stop).short() + middle

    def _groups(self, num_groups: int) -> partial[Tensor] | None:
        files, name = self.files, f"{self.name}_g_idx"
        if name not in files.names:
            return None
        files.expect(name, ("I32", "I64"), (self.shape[1],))
        return partial(group_indices, files, name, num_groups)


def _packed_codes(
    files: SafetensorsFiles, name: str, bits: int, start: int, stop: int, columns: Range
) -> Tensor:
    words = Range(columns.start * bits // 32, -(-columns.stop * bits // 32))
    codes = words_as_bytes(files.rows(name, start, stop, words))
    if bits == 4:
        return codes[:, : -(-len(columns) // 2)].contiguous()
    return (codes[:, : len(columns)] ^ 128).view(torch.int8)


def _packed_zeros(files: SafetensorsFiles, name: str, bits: int, start: int, stop: int) -> Tensor:
    per_word = 32 // bits
    first_word = start // per_word
    words_GW = files.rows(name, first_word, -(-stop // per_word)).t()
    zeros_GF = words_as_nibbles(words_GW) if bits == 4 else words_as_bytes(words_GW)
    zeros_FG = zeros_GF[:, start - per_word * first_word : stop - per_word * first_word].t().short()
    return zeros_FG if bits == 4 else zeros_FG - 128
