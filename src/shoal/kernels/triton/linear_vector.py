"""One or two tokens times a weight in few bits, as fast as the codes can be read.

    T tokens   F rows   K columns   W words (int32) of codes in a row

A code becomes an fp32 by putting it into a mantissa: c in bits 19-22 of 1.0 reads as 1 + c/16,
which is a shift and a mask where a conversion would take the slow unit. The ones are taken off
again once a word, with the sum of x. Everything is summed in fp32 without rounding weights.
"""
# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.kernels.quantized import QuantizedWeight
from shoal.kernels.triton.dequantize import KINDS

_MAX_WORDS = 512
_WORDS_PER_WARP = 128


def vector_linear(x_TK: Tensor, weight: QuantizedWeight, bias_F: Tensor | None) -> Tensor:
    """x @ weight.T + bias; codes must be whole words within one group."""
    rows, columns = weight.shape
    kind = KINDS[weight.format]
    words_FW = weight.codes.view(torch.int32)
    num_words = words_FW.shape[1]
    per_word = columns // num_words
    minimums = weight.minimums_FG
    block_w = max(32, min(_MAX_WORDS, triton.next_power_of_2(num_words)))
    # As many rows as registers hold: each x that is loaded serves them all.
    block_f = 8 if minimums is None else 4
    out_TF = x_TK.new_empty((len(x_TK), rows))
    if out_TF.numel():
        # Tokens are neighbours in the grid: the second finds the codes in the cache.
        _vector[(len(x_TK), triton.cdiv(rows, block_f))](
            x_TK,
            words_FW,
            weight.scales_FG,
            weight.scales_FG if minimums is None else minimums,
            x_TK if bias_F is None else bias_F,
            out_TF,
            rows,
            num_words,
            weight.scales_FG.shape[1],
            GROUP_WORDS=weight.group_size // per_word,
            KIND=kind,
            PER_WORD=per_word,
            HAS_MINIMUM=minimums is not None,
            HAS_BIAS=bias_F is not None,
            IS_EVEN=rows % block_f == 0 and num_words % block_w == 0,
            BLOCK_F=block_f,
            BLOCK_W=block_w,
            num_warps=max(1, block_w // _WORDS_PER_WARP),
        )
    return out_TF


@triton.jit
def _vector(
    x_ptr,
    words_ptr,
    scales_ptr,
    minimums_ptr,
    bias_ptr,
    out_ptr,
    rows,
    num_words,
    groups,
    GROUP_WORDS: tl.constexpr,
    KIND: tl.constexpr,
    PER_WORD: tl.constexpr,
    HAS_MINIMUM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_EVEN: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    token = tl.program_id(0)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    x_row_ptr = x_ptr + token * (num_words * PER_WORD)
    f_wide = f.to(tl.int64)[:, None]
    acc = tl.zeros([BLOCK_F, BLOCK_W], tl.float32)
    for start in range(0, num_words, BLOCK_W):
        w = start + tl.arange(0, BLOCK_W)
        there = (w < num_words) | IS_EVEN
        mask = ((f < rows)[:, None] & there[None, :]) | IS_EVEN
        words = tl.load(words_ptr + f_wide * num_words + w[None, :], mask=mask, other=0)
        cell = f_wide * groups + (w // GROUP_WORDS)[None, :]
        scale = tl.load(scales_ptr + cell, mask=mask, other=0.0).to(tl.float32)
        if KIND == 1:
            words = words ^ -2139062144  # 0x80808080: codes from 0 to 255
        products = tl.zeros([BLOCK_F, BLOCK_W], tl.float32)
        x_sum = tl.zeros([BLOCK_W], tl.float32)
        for i in tl.static_range(PER_WORD):
            x = tl.load(x_row_ptr + w * PER_WORD + i, mask=there, other=0.0).to(tl.float32)
            if KIND == 2:
                x *= 1.152921504606847e18
            else:
                x_sum += x
            products += _number(words, i, KIND) * x[None, :]
        if KIND == 1:
            acc += scale * (256.0 * products - 384.0 * x_sum[None, :])
        elif KIND == 2:
            acc += scale * products * 1.152921504606847e18
        elif HAS_MINIMUM:
            minimum = tl.load(minimums_ptr + cell, mask=mask, other=0.0).to(tl.float32)
            acc += scale * (16.0 * products - 16.0 * x_sum[None, :]) + minimum * x_sum[None, :]
        else:
            acc += scale * (16.0 * products - 24.0 * x_sum[None, :])
    out = tl.sum(acc, 1)
    if HAS_BIAS:
        out += tl.load(bias_ptr + f, mask=f < rows, other=0.0).to(tl.float32)
    out_offset = token.to(tl.int64) * rows + f
    tl.store(out_ptr + out_offset, out.to(out_ptr.dtype.element_ty), mask=f < rows)


@triton.jit
def _number(words, i: tl.constexpr, KIND: tl.constexpr):
    """Code i of each word: 1 + c/16 (int4), 1 + (c+128)/256 (int8), itself / 2^120 (fp8)."""
    if KIND == 2:
        # See e4m3_to_float. Half of 2^120 is in x, half comes last: neither overflows.
        return (((words << (24 - 8 * i)) >> 4) & -2014314496).to(tl.float32, bitcast=True)
    if KIND == 1:
        WIDTH: tl.constexpr = 8
        MASK: tl.constexpr = 0x7F8000
    else:
        WIDTH: tl.constexpr = 4
        MASK: tl.constexpr = 0x780000
    LEFT: tl.constexpr = 23 - WIDTH * (i + 1)
    moved = words << LEFT if LEFT >= 0 else words >> (-LEFT)
    return ((moved & MASK) | 0x3F800000).to(tl.float32, bitcast=True)
