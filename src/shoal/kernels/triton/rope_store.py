"""From [q | k | v] to rotated queries and stored KV in one pass: qk norm, rope, codes, slots.

    T tokens   H query heads   K KV heads   D head size   N KV blocks   B tokens in a block

One program does one head of one token.
"""
# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.kernels.batch import LayerKV, RaggedBatch
from shoal.kernels.triton.numbers import FP8, INT8, PLAIN, float_to_e4m3, round_half_even


def rope_and_store(
    qkv_TC: Tensor,
    qk_norm_HD: Tensor | None,
    eps: float,
    cos_T1D: Tensor,
    sin_T1D: Tensor,
    kv: LayerKV,
    batch: RaggedBatch,
) -> Tensor:
    """What `KernelSet.rope_and_store` says."""
    num_kv_heads, head_dim = kv.keys_NBHD.shape[2:]
    num_tokens = len(qkv_TC)
    num_heads = qkv_TC.shape[1] // head_dim - 2 * num_kv_heads
    q_THD = qkv_TC.new_empty((num_tokens, num_heads, head_dim))
    kind, (keys, values) = kv_kind(kv), kv_bits(kv)
    scales = kv.key_scales_NBH
    if num_tokens:
        _rope_and_store[(num_tokens, num_heads + 2 * num_kv_heads)](
            qkv_TC,
            qkv_TC if qk_norm_HD is None else qk_norm_HD,
            cos_T1D,
            sin_T1D,
            q_THD,
            keys,
            values,
            keys if scales is None else scales,
            values if scales is None else kv.value_scales_NBH,
            batch.slots_T,
            eps,
            qkv_TC.stride(0),
            *keys.stride()[:3],
            *((0, 0) if scales is None else scales.stride()[:2]),
            NUM_HEADS=num_heads,
            NUM_KV_HEADS=num_kv_heads,
            BLOCK_SIZE=keys.shape[1],
            HALF=head_dim // 2,
            HALF_PAD=triton.next_power_of_2(head_dim // 2),
            HAS_NORM=qk_norm_HD is not None,
            KIND=kind,
            num_warps=1,
        )
    return q_THD


def kv_kind(kv: LayerKV) -> int:
    """How the cache keeps its numbers."""
    if kv.key_scales_NBH is None:
        return PLAIN
    return INT8 if kv.keys_NBHD.dtype == torch.int8 else FP8


def kv_bits(kv: LayerKV) -> tuple[Tensor, Tensor]:
    """Keys and values as Triton gets them: fp8 as bytes."""
    if kv_kind(kv) == FP8:
        return kv.keys_NBHD.view(torch.uint8), kv.values_NBHD.view(torch.uint8)
    return kv.keys_NBHD, kv.values_NBHD


@triton.jit
def _rope_and_store(
    qkv_ptr,
    norm_ptr,
    cos_ptr,
    sin_ptr,
    q_ptr,
    keys_ptr,
    values_ptr,
    key_scales_ptr,
    value_scales_ptr,
    slots_ptr,
    eps,
    qkv_stride,
    stride_n,
    stride_b,
    stride_h,
    scale_stride_n,
    scale_stride_b,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PAD: tl.constexpr,
    HAS_NORM: tl.constexpr,
    KIND: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    i = tl.arange(0, HALF_PAD)
    mask = i < HALF
    head_ptr = qkv_ptr + token * qkv_stride + head * (2 * HALF)
    narrow = tl.load(head_ptr + i, mask=mask, other=0.0)
    first = narrow.to(tl.float32)
    second = tl.load(head_ptr + HALF + i, mask=mask, other=0.0).to(tl.float32)
    if head < NUM_HEADS + NUM_KV_HEADS:
        if HAS_NORM:
            squares = tl.sum(first * first, 0) + tl.sum(second * second, 0)
            scale = tl.rsqrt(squares / (2 * HALF) + eps)
            weight_ptr = norm_ptr + head * (2 * HALF)
            first *= scale * tl.load(weight_ptr + i, mask=mask, other=0.0)
            second *= scale * tl.load(weight_ptr + HALF + i, mask=mask, other=0.0)
            # Between two operations of the reference values take their own dtype.
            first = first.to(narrow.dtype).to(tl.float32)
            second = second.to(narrow.dtype).to(tl.float32)
        cos = tl.load(cos_ptr + token * (2 * HALF) + i, mask=mask, other=0.0)
        sin = tl.load(sin_ptr + token * (2 * HALF) + HALF + i, mask=mask, other=0.0)
        rotated = first * cos - second * sin
        second = second * cos + first * sin
        first = rotated
    low, high = first.to(narrow.dtype), second.to(narrow.dtype)
    if head < NUM_HEADS:
        out_ptr = q_ptr + (token * NUM_HEADS + head) * (2 * HALF)
        tl.store(out_ptr + i, low, mask=mask)
        tl.store(out_ptr + HALF + i, high, mask=mask)
    slot = tl.load(slots_ptr + token)
    if (head >= NUM_HEADS) & (slot >= 0):
        block, place = slot // BLOCK_SIZE, slot % BLOCK_SIZE
        if head < NUM_HEADS + NUM_KV_HEADS:
            kv_head = head - NUM_HEADS
            offset = block * stride_n + place * stride_b + kv_head * stride_h
            scale_offset = block * scale_stride_n + place * scale_stride_b + kv_head
            _store(keys_ptr + offset, key_scales_ptr + scale_offset, low, high, i, mask, HALF, KIND)
        else:
            kv_head = head - NUM_HEADS - NUM_KV_HEADS
            offset = block * stride_n + place * stride_b + kv_head * stride_h
            scale_offset = block * scale_stride_n + place * scale_stride_b + kv_head
            _store(
                values_ptr + offset, value_scales_ptr + scale_offset, low, high, i, mask, HALF, KIND
            )


@triton.jit
def _store(cache_ptr, scale_ptr, low, high, i, mask, HALF: tl.constexpr, KIND: tl.constexpr):
    if KIND == 0:
        tl.store(cache_ptr + i, low.to(cache_ptr.dtype.element_ty), mask=mask)
        tl.store(cache_ptr + HALF + i, high.to(cache_ptr.dtype.element_ty), mask=mask)
    else:
        first, second = low.to(tl.float32), high.to(tl.float32)
        largest = tl.maximum(tl.max(tl.abs(first), 0), tl.max(tl.abs(second), 0))
        scale = largest / (127.0 if KIND == 1 else 448.0)
        tl.store(scale_ptr, scale)
        # What is too small for an fp32 scale becomes 0.
        divisor = tl.where(scale == 0.0, 1.0, scale)
        first = tl.where(scale == 0.0, 0.0, first / divisor)
        second = tl.where(scale == 0.0, 0.0, second / divisor)
        if KIND == 1:
            tl.store(cache_ptr + i, _to_int8(first), mask=mask)
            tl.store(cache_ptr + HALF + i, _to_int8(second), mask=mask)
        else:
            tl.store(cache_ptr + i, float_to_e4m3(first), mask=mask)
            tl.store(cache_ptr + HALF + i, float_to_e4m3(second), mask=mask)


@triton.jit
def _to_int8(x):
    return round_half_even(tl.minimum(tl.maximum(x, -127.0), 127.0)).to(tl.int8)
