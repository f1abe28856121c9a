"""GGUF blocks as codes and scales, without a detour over their values.

    Q4_0, Q4_1, Q4_K → int4   Q8_0 → int8   groups of 32, scales and minimums as exact as the file's

Each function takes blocks as bytes [blocks, bytes in a block] and how many columns a row has.
Layouts are those of `gguf_blocks.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from shoal.kernels.quantized import QuantizedWeight, WeightFormat, pack_int4
from shoal.model.gguf_blocks import half, low_then_high, six_bit_pairs

FORMATS: Mapping[str, WeightFormat] = {
    "Q4_0": "int4",
    "Q4_1": "int4",
    "Q4_K": "int4",
    "Q8_0": "int8",
}


def q4_0(blocks: Tensor, columns: int) -> QuantizedWeight:
    codes = pack_int4(low_then_high(blocks[:, 2:]).view(-1, columns))
    return QuantizedWeight("int4", codes, _fp16(blocks, 0, columns))


def q4_1(blocks: Tensor, columns: int) -> QuantizedWeight:
    codes = pack_int4(low_then_high(blocks[:, 4:]).view(-1, columns))
    scales_FG, minimums_FG = _fp16(blocks, 0, columns), _fp16(blocks, 2, columns)
    return QuantizedWeight("int4", codes, scales_FG, minimums_FG)


def q4_k(blocks: Tensor, columns: int) -> QuantizedWeight:
    scale_8, minimum_8 = six_bit_pairs(blocks[:, 4:16])
    scales = half(blocks, 0) * scale_8.float()
    minimums = half(blocks, 2) * minimum_8.float()
    codes = low_then_high(blocks[:, 16:].reshape(-1, 4, 32)).view(-1, columns)
    return QuantizedWeight(
        "int4",
        pack_int4(codes),
        scales.view(-1, columns // 32),
        minimums.neg_().view(-1, columns // 32),
    )


def q8_0(blocks: Tensor, columns: int) -> QuantizedWeight:
    codes = blocks[:, 2:].contiguous().view(torch.int8).view(-1, columns)
    return QuantizedWeight("int8", codes, _fp16(blocks, 0, columns))


AS_QUANTIZED: Mapping[str, Callable[[Tensor, int], QuantizedWeight]] = {
    "Q4_0": q4_0,
    "Q4_1": q4_1,
    "Q4_K": q4_k,
    "Q8_0": q8_0,
}


def _fp16(blocks: Tensor, start: int, columns: int) -> Tensor:
    halves = blocks[:, start : start + 2].contiguous().view(torch.float16)
    return halves.view(-1, columns // 32)
