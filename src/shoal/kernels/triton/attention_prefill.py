"""Rows with several new tokens: tiles of queries walk the row's keys (arXiv 2205.14135).

A tile holds some consecutive queries of one row in all G query heads of one KV head, so that
keys and values are read once for the group:

    line m of a tile  →  query first + m // G, query head m % G of the group

Why not torch's SDPA: it knows neither pages, nor softcap, nor ragged rows; FlexAttention
compiles anew as shapes change; FlashInfer plans on the host. Attention is a few percent of a
prefill step until contexts are long.
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

_LINES = 64
_LINES_FP32 = 16  # fp32 has no tensor cores: its products would not fit the registers


def queries_per_tile(group: int, dtype: torch.dtype) -> int:
    """Queries in a tile, where `group` query heads share a KV head."""
    return _lines(group, dtype) // group


def _lines(group: int, dtype: torch.dtype) -> int:
    least = _LINES_FP32 if dtype == torch.float32 else _LINES
    return max(least, triton.next_power_of_2(group))


def prefill_attention(
    q_THD: Tensor,
    kv: LayerKV,
    out_THD: Tensor,
    tables_RB: Tensor,
    tiles: Tensor,
    starts: Tensor,
    contexts: Tensor,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> None:
    """Writes the outputs of every token in `tiles`.

    Args:
        tiles, starts, contexts: see `AttentionRows`.
    """
    num_heads, head_dim = q_THD.shape[1:]
    keys, values = kv_bits(kv)
    block_size, num_kv_heads = keys.shape[1:3]
    scales = kv.key_scales_NBH
    group = num_heads // num_kv_heads
    d_pad = max(16, triton.next_power_of_2(head_dim))
    is_fp32 = q_THD.dtype == torch.float32
    wide = d_pad * q_THD.element_size() > 256
    _prefill[(len(tiles), num_kv_heads)](
        q_THD,
        keys,
        values,
        keys if scales is None else scales,
        values if scales is None else kv.value_scales_NBH,
        out_THD,
        tables_RB,
        tiles,
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
        LINES=_lines(group, q_THD.dtype),
        D=head_dim,
        D_PAD=d_pad,
        BLOCK_SIZE=block_size,
        BLOCK_N=32 if wide else 64,
        KIND=kv_kind(kv),
        HAS_WINDOW=window is not None,
        HAS_SOFTCAP=softcap is not None,
        num_warps=8 if wide and not is_fp32 else 4,
        num_stages=1 if is_fp32 else 2,
    )


@triton.jit
def _prefill(
    q_ptr,
    keys_ptr,
    values_ptr,
    key_scales_ptr,
    value_scales_ptr,
    out_ptr,
    tables_ptr,
    tiles_ptr,
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
    LINES: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    KIND: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    QUERIES: tl.constexpr = LINES // GROUP
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    row = tl.load(tiles_ptr + 2 * tile)
    first = tl.load(tiles_ptr + 2 * tile + 1)
    first_token = tl.load(starts_ptr + row)
    num_queries = tl.load(starts_ptr + row + 1) - first_token
    context = tl.load(contexts_ptr + row)
    first_position = context - num_queries + first

    m = tl.arange(0, LINES)
    d = tl.arange(0, D_PAD)
    query = first + m // GROUP
    head = kv_head * GROUP + m % GROUP
    live = (m < QUERIES * GROUP) & (query < num_queries)
    position = context - num_queries + query
    token = (first_token + query).to(tl.int64)
    q_mask = live[:, None] & (d < D)[None, :]
    q_offset = token[:, None] * q_stride_t + head[:, None] * q_stride_h + d[None, :]
    q = tl.load(q_ptr + q_offset, mask=q_mask, other=0.0)

    best = tl.full([LINES], float("-inf"), tl.float32)
    total = tl.zeros([LINES], tl.float32)
    out = tl.zeros([LINES, D_PAD], tl.float32)
    begin = first_position * 0
    if HAS_WINDOW:
        begin = tl.maximum(first_position - window + 1, 0) // BLOCK_N * BLOCK_N
    end = tl.minimum(first_position + QUERIES, context)
    table_ptr = tables_ptr + row.to(tl.int64) * table_stride
    for start in range(begin, end, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        there = key < end
        block = tl.load(table_ptr + key // BLOCK_SIZE, mask=there, other=0)
        place = key % BLOCK_SIZE
        offset = block * stride_n + place * stride_b + kv_head * stride_h
        scale_offset = block * scale_stride_n + place * scale_stride_b + kv_head
        k_mask = (d < D)[:, None] & there[None, :]
        k = tl.load(keys_ptr + offset[None, :] + d[:, None], mask=k_mask, other=0)
        scores = tl.dot(q, to_number(k, KIND, q.dtype), input_precision="ieee") * scale
        if KIND != 0:
            scores *= tl.load(key_scales_ptr + scale_offset, mask=there, other=0.0)[None, :]
        if HAS_SOFTCAP:
            scores = softcap * tanh(scores / softcap)
        seen = there[None, :] & (key[None, :] <= position[:, None])
        if HAS_WINDOW:
            seen &= key[None, :] > position[:, None] - window
        scores = tl.where(seen, scores * 1.4426950408889634, float("-inf"))
        new_best = tl.maximum(best, tl.max(scores, 1))
        # A window may hide all keys of a first tile from a line: then nothing is added.
        anchor = tl.where(new_best == float("-inf"), 0.0, new_best)
        weights = tl.exp2(scores - anchor[:, None])
        fade = tl.exp2(best - anchor)
        total = total * fade + tl.sum(weights, 1)
        if KIND != 0:
            weights *= tl.load(value_scales_ptr + scale_offset, mask=there, other=0.0)[None, :]
        v_mask = there[:, None] & (d < D)[None, :]
        v = tl.load(values_ptr + offset[:, None] + d[None, :], mask=v_mask, other=0)
        v = to_number(v, KIND, q.dtype)
        out = out * fade[:, None] + tl.dot(weights.to(q.dtype), v, input_precision="ieee")
        best = new_best

    num_heads = tl.num_programs(1) * GROUP
    result = out / tl.where(live, total, 1.0)[:, None]
    out_offset = (token[:, None] * num_heads + head[:, None]) * D + d[None, :]
    tl.store(out_ptr + out_offset, result.to(out_ptr.dtype.element_ty), mask=q_mask)
