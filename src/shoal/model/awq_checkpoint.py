"""AWQ checkpoints in AutoAWQ's "gemm" layout: 4 bits, groups with a zero point.

    <module>.qweight  int32 [K, F/8]   eight rows of the weight in a word, in the order below
    <module>.qzeros   int32 [G, F/8]   the same
    <module>.scales   float [G, F]

Everything lies by columns of the weight: rows [start, stop) of it are columns here, columns rows.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from shoal.core.errors import UnsupportedModelError
from shoal.core.split import Range
from shoal.kernels.quantized import pack_int4
from shoal.model.fields import Fields
from shoal.model.safetensors_files import FLOAT_TYPES, SafetensorsFiles
from shoal.model.stored_weights import IntegerWeight, StoredWeight, words_as_nibbles


def read_awq(files: SafetensorsFiles, settings: Fields) -> dict[str, StoredWeight]:
    """Every module with a qweight; see `quantized_checkpoints.find_stored_weights` for errors."""
    bits = settings.integer("bits", settings.integer("w_bit", 4))
    version = settings.text("version", "gemm").lower()
    backend = settings.text("backend", "autoawq")
    for what, found, read in (
        ("bits", bits, 4),
        ("version", version, "gemm"),
        ("backend", backend, "autoawq"),
    ):
        if found != read:
            raise UnsupportedModelError(
                f"{settings.source}: AWQ with {what} {found!r} is not supported; shoal reads "
                f"{what} {read!r}: use such a checkpoint, or another format"
            )
    group_size = settings.integer("group_size", settings.integer("q_group_size", 128))
    modules = [name.removesuffix(".qweight") for name in files.names if name.endswith(".qweight")]
    return {f"{module}.weight": _weight(files, module, group_size) for module in modules}


_PLACES = [0, 4, 1, 5, 2, 6, 3, 7]
"""Where in its word each of eight rows stands: words are packed as rows 0 2 4 6 1 3 5 7."""


def _weight(files: SafetensorsFiles, module: str, group_size: int) -> IntegerWeight:
    qweight, qzeros, scales = (f"{module}.{part}" for part in ("qweight", "qzeros", "scales"))
    columns, words = files.expect(qweight, ("I32",), (None, None))
    group_size = columns if group_size < 1 else group_size
    num_groups = -(-columns // group_size)
    files.expect(scales, FLOAT_TYPES, (num_groups, 8 * words))
    zeros = None
    if qzeros in files.names:
        files.expect(qzeros, ("I32",), (num_groups, words))
        zeros = partial(_rows, files, qzeros, Range(0, num_groups))
    return IntegerWeight(
        shape=(8 * words, columns),
        num_bytes=files.num_bytes(qweight) + files.num_bytes(scales),
        bits=4,
        group_size=group_size,
        codes=partial(_codes, files, qweight),
        scales=lambda start, stop: files.columns(scales, start, stop).t().contiguous(),
        zeros=zeros,
    )


def _codes(files: SafetensorsFiles, name: str, start: int, stop: int, columns: Range) -> Tensor:
    codes_FK = _rows(files, name, columns, start, stop)
    if codes_FK.shape[1] % 2:
        codes_FK = torch.nn.functional.pad(codes_FK, (0, 1))
    return pack_int4(codes_FK)


def _rows(files: SafetensorsFiles, name: str, columns: Range, start: int, stop: int) -> Tensor:
    first_word = start // 8
    words = files.rows(name, columns.start, columns.stop, Range(first_word, -(-stop // 8)))
    rows_KF = words_as_nibbles(words).view(len(words), -1, 8)[..., _PLACES].flatten(1)
    return rows_KF[:, start - 8 * first_word : stop - 8 * first_word].t().contiguous()
