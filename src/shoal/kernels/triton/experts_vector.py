"""Experts for a few tokens: dot products, each token with the weights of its own experts.

T tokens   E hidden size   K experts of a token   J = T * K pairs   F columns of an expert
"""
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from shoal.kernels.experts import ExpertWeights
from shoal.kernels.triton.experts_shares import slot_of_pair
from shoal.kernels.triton.numbers import gated
from shoal.kernels.triton.weight_tile import tile_arguments, weight_tile

_BLOCK_F = 8
_BLOCK_K = 256


def experts_by_token(
    x_TE: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    experts: ExpertWeights,
    phase: Tensor,
    is_silu: bool,
) -> Tensor:
    """What the experts held here add, [T, E]."""
    (num_tokens, hidden), num_active = x_TE.shape, ids_TK.shape[1]
    columns, num_experts = experts.down_EF.shape[1], len(experts.slots_X3)
    inner_JF = x_TE.new_empty((num_tokens * num_active, columns))
    out_TE = x_TE.new_empty((num_tokens, hidden))
    chosen = (ids_TK, experts.slots_X3, phase, num_tokens * num_active, num_experts)
    block_j = triton.next_power_of_2(num_tokens * num_active)
    weight, constants = tile_arguments(experts.gate_up_FE, _BLOCK_K)
    _expert_vector_up[(num_tokens * num_active, triton.cdiv(columns, _BLOCK_F))](
        x_TE,
        *chosen,
        *weight,
        inner_JF,
        columns,
        **constants,
        NUM_ACTIVE=num_active,
        IS_SILU=is_silu,
        BLOCK_J=block_j,
        BLOCK_F=_BLOCK_F,
        BLOCK_K=_BLOCK_K,
        num_warps=4,
    )
    weight, constants = tile_arguments(experts.down_EF, _BLOCK_K)
    _expert_vector_down[(num_tokens, triton.cdiv(hidden, _BLOCK_F))](
        inner_JF,
        *chosen,
        *weight,
        weights_TK,
        out_TE,
        hidden,
        **constants,
        NUM_ACTIVE=num_active,
        BLOCK_J=block_j,
        BLOCK_F=_BLOCK_F,
        BLOCK_K=_BLOCK_K,
        num_warps=4,
    )
    return out_TE


@triton.jit
def _expert_vector_up(
    x_ptr,
    ids_ptr,
    slots_ptr,
    phase_ptr,
    num_pairs,
    num_experts,
    codes_ptr,
    scales_ptr,
    minimums_ptr,
    hidden,
    row_bytes,
    groups,
    inner_ptr,
    columns,
    GROUP: tl.constexpr,
    RUN: tl.constexpr,
    KIND: tl.constexpr,
    HAS_MINIMUM: tl.constexpr,
    NUM_ACTIVE: tl.constexpr,
    IS_SILU: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    pair = tl.program_id(0)
    slot = slot_of_pair(ids_ptr, slots_ptr, phase_ptr, pair, num_pairs, num_experts, BLOCK_J)
    if slot < 0:
        return
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    there = f < columns
    gate_row = slot.to(tl.int64) * 2 * columns + f
    gate = tl.zeros([BLOCK_F], tl.float32)
    up = tl.zeros([BLOCK_F], tl.float32)
    x_row_ptr = x_ptr + (pair // NUM_ACTIVE).to(tl.int64) * hidden
    for start in range(0, hidden, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_row_ptr + k, mask=k < hidden, other=0.0).to(tl.float32)[None, :]
        weight = weight_tile(
            codes_ptr, scales_ptr, minimums_ptr, gate_row, there, start, hidden, row_bytes, groups,
            GROUP, RUN, KIND, HAS_MINIMUM, BLOCK_F, BLOCK_K,
        )  # fmt: skip
        gate += tl.sum(weight * x, 1)
        weight = weight_tile(
            codes_ptr, scales_ptr, minimums_ptr, gate_row + columns, there, start, hidden,
            row_bytes, groups, GROUP, RUN, KIND, HAS_MINIMUM, BLOCK_F, BLOCK_K,
        )  # fmt: skip
        up += tl.sum(weight * x, 1)
    inner = gated(gate, up, IS_SILU, inner_ptr.dtype.element_ty)
    tl.store(inner_ptr + pair.to(tl.int64) * columns + f, inner, mask=there)


@triton.jit
def _expert_vector_down(
    inner_ptr,
    ids_ptr,
    slots_ptr,
    phase_ptr,
    num_pairs,
    num_experts,
    codes_ptr,
    scales_ptr,
    minimums_ptr,
    columns,
    row_bytes,
    groups,
    weights_ptr,
    out_ptr,
    hidden,
    GROUP: tl.constexpr,
    RUN: tl.constexpr,
    KIND: tl.constexpr,
    HAS_MINIMUM: tl.constexpr,
    NUM_ACTIVE: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    token = tl.program_id(0)
    e = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    there = e < hidden
    total = tl.zeros([BLOCK_F], tl.float32)
    for i in range(NUM_ACTIVE):
        pair = token * NUM_ACTIVE + i
        slot = slot_of_pair(ids_ptr, slots_ptr, phase_ptr, pair, num_pairs, num_experts, BLOCK_J)
        if slot >= 0:
            row = slot.to(tl.int64) * hidden + e
            inner_row_ptr = inner_ptr + pair.to(tl.int64) * columns
            down = tl.zeros([BLOCK_F], tl.float32)
            for start in range(0, columns, BLOCK_K):
                k = start + tl.arange(0, BLOCK_K)
                inner = tl.load(inner_row_ptr + k, mask=k < columns, other=0.0)
                weight = weight_tile(
                    codes_ptr, scales_ptr, minimums_ptr, row, there, start, columns, row_bytes,
                    groups, GROUP, RUN, KIND, HAS_MINIMUM, BLOCK_F, BLOCK_K,
                )  # fmt: skip
                down += tl.sum(weight * inner.to(tl.float32)[None, :], 1)
            rounded = down.to(out_ptr.dtype.element_ty).to(tl.float32)
            total += rounded * tl.load(weights_ptr + pair)
    out_offset = token.to(tl.int64) * hidden + e
    tl.store(out_ptr + out_offset, total.to(out_ptr.dtype.element_ty), mask=there)
