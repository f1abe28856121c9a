"""Experts for many tokens: tokens sorted by expert, whole tiles of them times the expert's weights.

    T tokens   E hidden size   K experts of a token   J = T * K pairs   F columns of an expert
    S experts held here   P places: each expert's pairs, filled up to whole tiles

    places   | 3 7 9 · | 0 4 5 8 | 1 · · · |      pairs, of tiles of 4
    slots    |    0    |    0... |    2    |      of each tile; -1: it is not used

How many tiles there are is known on the device only; room is made for as many as there can be. What
a pair gives lies by itself, and a token's are summed in their order.
"""
# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.kernels.experts import ExpertWeights
from shoal.kernels.triton.experts_shares import share_of
from shoal.kernels.triton.numbers import gated
from shoal.kernels.triton.weight_tile import tile_arguments, weight_tile

_BLOCK_F = 64
_MAX_BLOCK_T = 64
_SCAN = 1024


def experts_in_tiles(
    x_TE: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    experts: ExpertWeights,
    phase: Tensor,
    is_silu: bool,
) -> Tensor:
    """What the experts held here add, [T, E]."""
    (num_tokens, hidden), num_active = x_TE.shape, ids_TK.shape[1]
    columns, num_held = experts.down_EF.shape[1], experts.down_EF.shape[0] // hidden
    per_expert = triton.cdiv(num_tokens * num_active, len(experts.slots_X3))
    block_t = max(16, min(_MAX_BLOCK_T, triton.next_power_of_2(per_expert)))
    pairs_P, slots = _sort(ids_TK, experts.slots_X3, phase, num_held, block_t)
    block_k = 64
    shape = {"BLOCK_F": _BLOCK_F, "BLOCK_T": block_t, "BLOCK_K": block_k, "num_warps": 4}
    inner_PF = x_TE.new_empty((len(pairs_P), columns))
    weight, constants = tile_arguments(experts.gate_up_FE, block_k)
    _expert_tiles_up[(len(slots), triton.cdiv(columns, _BLOCK_F))](
        x_TE,
        pairs_P,
        slots,
        *weight,
        inner_PF,
        columns,
        **constants,
        NUM_ACTIVE=num_active,
        IS_SILU=is_silu,
        **shape,
    )
    given_JE = torch.zeros(num_tokens * num_active, hidden, device=x_TE.device)
    weight, constants = tile_arguments(experts.down_EF, block_k)
    _expert_tiles_down[(len(slots), triton.cdiv(hidden, _BLOCK_F))](
        inner_PF,
        pairs_P,
        slots,
        *weight,
        weights_TK,
        given_JE,
        hidden,
        **constants,
        **shape,
    )
    return given_JE.view(num_tokens, num_active, hidden).sum(1).to(x_TE.dtype)


def _sort(
    ids_TK: Tensor, slots_X3: Tensor, phase: Tensor, num_held: int, block_t: int
) -> tuple[Tensor, Tensor]:
    """The pair in each place (-1: none), and the slot of each tile."""
    num_pairs, num_experts = ids_TK.numel(), len(slots_X3)
    num_tiles = num_pairs // block_t + min(num_held, num_pairs)
    device = ids_TK.device
    pairs_P = torch.full((num_tiles * block_t,), -1, dtype=torch.int32, device=device)
    slots = torch.full((num_tiles,), -1, dtype=torch.int32, device=device)
    taken_S = torch.zeros(num_held, dtype=torch.int32, device=device)
    chosen = (ids_TK, slots_X3, phase, num_pairs)
    _expert_counts[(num_experts,)](*chosen, taken_S, SCAN=_SCAN, num_warps=4)
    _expert_places[(num_experts,)](
        *chosen,
        taken_S,
        pairs_P,
        slots,
        num_held,
        BLOCK_S=triton.next_power_of_2(num_held),
        BLOCK_T=block_t,
        SCAN=_SCAN,
        num_warps=4,
    )
    return pairs_P, slots


@triton.jit
def _num_pairs_of(ids_ptr, expert, num_pairs, SCAN: tl.constexpr):
    total = tl.zeros([SCAN], tl.int32)
    for at in range(0, num_pairs, SCAN):
        j = at + tl.arange(0, SCAN)
        ids = tl.load(ids_ptr + j, mask=j < num_pairs, other=-1)
        total += (ids == expert).to(tl.int32)
    return tl.sum(total, 0)


@triton.jit
def _expert_counts(ids_ptr, slots_ptr, phase_ptr, num_pairs, taken_ptr, SCAN: tl.constexpr):
    expert = tl.program_id(0)
    found = _num_pairs_of(ids_ptr, expert, num_pairs, SCAN)
    slot, first, stop = share_of(slots_ptr, phase_ptr, expert, found)
    if slot >= 0:
        tl.store(taken_ptr + slot, (stop - first).to(tl.int32))


@triton.jit
def _expert_places(
    ids_ptr,
    slots_ptr,
    phase_ptr,
    num_pairs,
    taken_ptr,
    pairs_ptr,
    tile_slots_ptr,
    num_held,
    BLOCK_S: tl.constexpr,
    BLOCK_T: tl.constexpr,
    SCAN: tl.constexpr,
):
    expert = tl.program_id(0)
    found = _num_pairs_of(ids_ptr, expert, num_pairs, SCAN)
    slot, first, stop = share_of(slots_ptr, phase_ptr, expert, found)
    if slot < 0:
        return
    s = tl.arange(0, BLOCK_S)
    taken = tl.load(taken_ptr + s, mask=s < slot, other=0)
    first_tile = tl.sum((taken + BLOCK_T - 1) // BLOCK_T, 0)
    for tile in range(0, (stop - first + BLOCK_T - 1) // BLOCK_T):
        tl.store(tile_slots_ptr + first_tile + tile, slot)
    before = 0
    for at in range(0, num_pairs, SCAN):
        j = at + tl.arange(0, SCAN)
        same = (tl.load(ids_ptr + j, mask=j < num_pairs, other=-1) == expert).to(tl.int32)
        turn = before + tl.cumsum(same, 0) - same
        is_taken = (same > 0) & (turn >= first) & (turn < stop)
        place = first_tile * BLOCK_T + turn - first
        tl.store(pairs_ptr + place, j, mask=is_taken)
        before += tl.sum(same, 0)


@triton.jit
def _expert_tiles_up(
    x_ptr,
    pairs_ptr,
    tile_slots_ptr,
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
    BLOCK_F: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    slot = tl.load(tile_slots_ptr + tl.program_id(0))
    if slot < 0:
        return
    place = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    pair = tl.load(pairs_ptr + place)
    token = (tl.maximum(pair, 0) // NUM_ACTIVE).to(tl.int64)[None, :]
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    gate_row = slot.to(tl.int64) * 2 * columns + f
    gate = tl.zeros([BLOCK_F, BLOCK_T], tl.float32)
    up = tl.zeros([BLOCK_F, BLOCK_T], tl.float32)
    for start in range(0, hidden, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x_mask = (k < hidden)[:, None] & (pair >= 0)[None, :]
        x = tl.load(x_ptr + token * hidden + k[:, None], mask=x_mask, other=0.0)
        weight = weight_tile(
            codes_ptr, scales_ptr, minimums_ptr, gate_row, f < columns, start, hidden, row_bytes,
            groups, GROUP, RUN, KIND, HAS_MINIMUM, BLOCK_F, BLOCK_K,
        )  # fmt: skip
        gate = tl.dot(weight.to(x.dtype), x, gate, input_precision="ieee")
        weight = weight_tile(
            codes_ptr, scales_ptr, minimums_ptr, gate_row + columns, f < columns, start, hidden,
            row_bytes, groups, GROUP, RUN, KIND, HAS_MINIMUM, BLOCK_F, BLOCK_K,
        )  # fmt: skip
        up = tl.dot(weight.to(x.dtype), x, up, input_precision="ieee")
    inner = gated(gate, up, IS_SILU, inner_ptr.dtype.element_ty)
    mask = (f < columns)[:, None] & (pair >= 0)[None, :]
    tl.store(inner_ptr + place.to(tl.int64)[None, :] * columns + f[:, None], inner, mask=mask)


@triton.jit
def _expert_tiles_down(
    inner_ptr,
    pairs_ptr,
    tile_slots_ptr,
    codes_ptr,
    scales_ptr,
    minimums_ptr,
    columns,
    row_bytes,
    groups,
    weights_ptr,
    given_ptr,
    hidden,
    GROUP: tl.constexpr,
    RUN: tl.constexpr,
    KIND: tl.constexpr,
    HAS_MINIMUM: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    slot = tl.load(tile_slots_ptr + tl.program_id(0))
    if slot < 0:
        return
    place = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    pair = tl.load(pairs_ptr + place)
    e = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    row = slot.to(tl.int64) * hidden + e
    down = tl.zeros([BLOCK_F, BLOCK_T], tl.float32)
    for start in range(0, columns, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        mask = (k < columns)[:, None] & (pair >= 0)[None, :]
        inner = tl.load(inner_ptr + place[None, :] * columns + k[:, None], mask=mask, other=0.0)
        weight = weight_tile(
            codes_ptr, scales_ptr, minimums_ptr, row, e < hidden, start, columns, row_bytes,
            groups, GROUP, RUN, KIND, HAS_MINIMUM, BLOCK_F, BLOCK_K,
        )  # fmt: skip
        down = tl.dot(weight.to(inner.dtype), inner, down, input_precision="ieee")
    # Rounded before it is weighted, as two operations would.
    rounded = down.to(inner_ptr.dtype.element_ty).to(tl.float32)
    weights = tl.load(weights_ptr + pair, mask=pair >= 0, other=0.0)
    given_offset = tl.maximum(pair, 0).to(tl.int64)[None, :] * hidden + e[:, None]
    given_mask = (e < hidden)[:, None] & (pair >= 0)[None, :]
    tl.store(given_ptr + given_offset, rounded * weights[None, :], mask=given_mask)
