"""One new token a row: the keys of each row and KV head are split over many programs.

    split 0     split 1     split 2          each: softmax over its own keys, partial result
    [ keys   ]  [ keys   ]  [ keys ]    →    merge: partial results weighted by their sums

(Flash-Decoding.) Lengths are read on the device, so a CUDA graph can hold this; how many splits
there are depends on shapes alone. All G query heads of a KV head share its keys in one program.
"""
# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.kernels.batch import LayerKV
from shoal.kernels.triton.numbers import tanh, to_number
from shoal.kernels.triton.rope_store import kv_bits, kv_kind

_MAX_SPLITS = 64
_PROGRAMS_PER_PROCESSOR = 2
_PROCESSORS_OF_INTERPRETER = 8


def decode_attention(
    q_THD: Tensor,
    kv: LayerKV,
    out_THD: Tensor,
    tables_RB: Tensor,
    rows: Tensor,
    starts: Tensor,
    contexts: Tensor,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> None:
    """Writes the outputs of `rows`' only tokens.

    Args:
        rows, starts, contexts: see `AttentionRows`.
    """
    num_heads, head_dim = q_THD.shape[1:]
    keys, values = kv_bits(kv)
    block_size, num_kv_heads = keys.shape[1:3]
    scales = kv.key_scales_NBH
    group = num_heads // num_kv_heads
    d_pad = max(16, triton.next_power_of_2(head_dim))
    block_n = 64 if d_pad * q_THD.element_size() <= 256 else 32
    most_keys = tables_RB.shape[1] * block_size
    if window is not None:
        most_keys = min(most_keys, window)
    splits = _num_splits(len(rows) * num_kv_heads, most_keys, block_n, q_THD.device)
    shape = (len(rows), num_heads, splits)
    partial = out_THD if splits == 1 else q_THD.new_empty((*shape, head_dim), dtype=torch.float32)
    sums = out_THD if splits == 1 else q_THD.new_empty(shape, dtype=torch.float32)
    limits = {
        "BLOCK_N": block_n,
        "NUM_SPLITS": splits,
        "HAS_WINDOW": window is not None,
        "D": head_dim,
    }
    _decode[(len(rows), num_kv_heads, splits)](
        q_THD,
        keys,
        values,
        keys if scales is None else scales,
        values if scales is None else kv.value_scales_NBH,
        partial,
        sums,
        out_THD,
        tables_RB,
        rows,
        starts,
        contexts,
        scale,
        softcap or 0.0,
        window or 0,
        q_THD.stride(0),
        q_THD.stride(1),
        *keys.stride()[:3],
        *((0, 0) if scales is None else scales.stride()[:2]),
        tables_RB.stride(0),
        GROUP=group,
        GROUP_PAD=max(16, triton.next_power_of_2(group)),
        D_PAD=d_pad,
        BLOCK_SIZE=block_size,
        KIND=kv_kind(kv),
        HAS_SOFTCAP=softcap is not None,
        **limits,
        num_warps=4,
        num_stages=1 if q_THD.dtype == torch.float32 else 2,
    )
    if splits > 1:
        _merge[(len(rows), num_heads)](
            partial,
            sums,
            out_THD,
            rows,
            starts,
            contexts,
            window or 0,
            D_PAD=d_pad,
            **limits,
            num_warps=4,
        )


def _num_splits(num_programs: int, most_keys: int, block_n: int, device: torch.device) -> int:
    """A power of two: few enough variants to compile."""
    processors = _PROCESSORS_OF_INTERPRETER
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    wanted = processors * _PROGRAMS_PER_PROCESSOR // num_programs
    useful = triton.cdiv(most_keys, block_n)
    splits = max(1, min(wanted, useful, _MAX_SPLITS))
    return 1 << (splits.bit_length() - 1)


@triton.jit
def _keys_of(
    context, window, HAS_WINDOW: tl.constexpr, NUM_SPLITS: tl.constexpr, BLOCK_N: tl.constexpr
):
    """First key to see, and keys in a split."""
    begin = context * 0
    if HAS_WINDOW:
        begin = tl.maximum(context - window, 0)
    per_split = (context - begin + NUM_SPLITS - 1) // NUM_SPLITS
    return begin, (per_split + BLOCK_N - 1) // BLOCK_N * BLOCK_N


@triton.jit
def _decode(
    q_ptr,
    keys_ptr,
    values_ptr,
    key_scales_ptr,
    value_scales_ptr,
    partial_ptr,
    sums_ptr,
    out_ptr,
    tables_ptr,
    rows_ptr,
    starts_ptr,
    contexts_ptr,
    scale,
    softcap,
    window,
    q_stride_t,
    q_stride_h,
    stride_n,
    stride_b,
    stride_h,
    scale_stride_n,
    scale_stride_b,
    table_stride,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    KIND: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    index = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    row = tl.load(rows_ptr + index)
    token = tl.load(starts_ptr + row).to(tl.int64)
    context = tl.load(contexts_ptr + row)
    begin, per_split = _keys_of(context, window, HAS_WINDOW, NUM_SPLITS, BLOCK_N)
    first = begin + split * per_split
    last = tl.minimum(first + per_split, context)

    g = tl.arange(0, GROUP_PAD)
    d = tl.arange(0, D_PAD)
    head = kv_head * GROUP + g
    q_mask = (g < GROUP)[:, None] & (d < D)[None, :]
    q_offset = token * q_stride_t + head[:, None] * q_stride_h + d[None, :]
    q = tl.load(q_ptr + q_offset, mask=q_mask, other=0.0)
    best = tl.full([GROUP_PAD], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_PAD], tl.float32)
    out = tl.zeros([GROUP_PAD, D_PAD], tl.float32)
    table_ptr = tables_ptr + row.to(tl.int64) * table_stride
    for start in range(first, last, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        seen = key < last
        block = tl.load(table_ptr + key // BLOCK_SIZE, mask=seen, other=0)
        place = key % BLOCK_SIZE
        offset = block * stride_n + place * stride_b + kv_head * stride_h
        scale_offset = block * scale_stride_n + place * scale_stride_b + kv_head
        k_mask = (d < D)[:, None] & seen[None, :]
        k = tl.load(keys_ptr + offset[None, :] + d[:, None], mask=k_mask, other=0)
        scores = tl.dot(q, to_number(k, KIND, q.dtype), input_precision="ieee") * scale
        if KIND != 0:
            scores *= tl.load(key_scales_ptr + scale_offset, mask=seen, other=0.0)[None, :]
        if HAS_SOFTCAP:
            scores = softcap * tanh(scores / softcap)
        # In base 2: exp2 is what the hardware has.
        scores = tl.where(seen[None, :], scores * 1.4426950408889634, float("-inf"))
        new_best = tl.maximum(best, tl.max(scores, 1))
        weights = tl.exp2(scores - new_best[:, None])
        fade = tl.exp2(best - new_best)
        total = total * fade + tl.sum(weights, 1)
        if KIND != 0:
            weights *= tl.load(value_scales_ptr + scale_offset, mask=seen, other=0.0)[None, :]
        v_mask = seen[:, None] & (d < D)[None, :]
        v = tl.load(values_ptr + offset[:, None] + d[None, :], mask=v_mask, other=0)
        v = to_number(v, KIND, q.dtype)
        out = out * fade[:, None] + tl.dot(weights.to(q.dtype), v, input_precision="ieee")
        best = new_best

    total = tl.where(total == 0.0, 1.0, total)  # a split without keys: nothing is stored
    if NUM_SPLITS == 1:
        num_heads = tl.num_programs(1) * GROUP
        out_offset = (token * num_heads + head[:, None]) * D + d[None, :]
        result = out / total[:, None]
        tl.store(out_ptr + out_offset, result.to(out_ptr.dtype.element_ty), mask=q_mask)
    else:
        cell = (index * tl.num_programs(1) * GROUP + head).to(tl.int64) * NUM_SPLITS + split
        written = (g < GROUP) & (first + 0 * g < last)
        tl.store(sums_ptr + cell, best + tl.log2(total), mask=written)
        # Divided here, so that the merge weighs averages.
        result = out / total[:, None]
        part_mask = written[:, None] & (d < D)[None, :]
        tl.store(partial_ptr + cell[:, None] * D + d[None, :], result, mask=part_mask)


@triton.jit
def _merge(
    partial_ptr,
    sums_ptr,
    out_ptr,
    rows_ptr,
    starts_ptr,
    contexts_ptr,
    window,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    index = tl.program_id(0)
    head = tl.program_id(1)
    row = tl.load(rows_ptr + index)
    token = tl.load(starts_ptr + row).to(tl.int64)
    context = tl.load(contexts_ptr + row)
    begin, per_split = _keys_of(context, window, HAS_WINDOW, NUM_SPLITS, BLOCK_N)
    split = tl.arange(0, NUM_SPLITS)
    written = begin + split * per_split < context
    d = tl.arange(0, D_PAD)
    cell = (index * tl.num_programs(1) + head).to(tl.int64) * NUM_SPLITS + split
    sums = tl.load(sums_ptr + cell, mask=written, other=float("-inf"))
    # A row of padding has no keys at all: its result is 0, not nan.
    weights = tl.where(written, tl.exp2(sums - tl.maximum(tl.max(sums, 0), -1e30)), 0.0)
    mask = written[:, None] & (d < D)[None, :]
    parts = tl.load(partial_ptr + cell[:, None] * D + d[None, :], mask=mask, other=0.0)
    total = tl.sum(weights, 0)
    result = tl.sum(parts * weights[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    out_offset = (token * tl.num_programs(1) + head) * D + d
    tl.store(out_ptr + out_offset, result.to(out_ptr.dtype.element_ty), mask=d < D)
