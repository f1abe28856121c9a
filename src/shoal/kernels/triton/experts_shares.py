"""Which pairs of a token and an expert are computed here: the shares of `kernels/experts.py`.

J = T * K pairs, a token's next to each other   X experts   S of them held here
"""
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def share_of(slots_ptr, phase_ptr, expert, num_pairs):
    """The slot of an expert that is held, and the first and last of its pairs that are taken."""
    phase = tl.load(phase_ptr).to(tl.int64)
    slot = tl.load(slots_ptr + expert * 3)
    start = tl.load(slots_ptr + expert * 3 + 1).to(tl.int64)
    stop = tl.load(slots_ptr + expert * 3 + 2).to(tl.int64)
    wide = num_pairs.to(tl.int64)
    return slot, (wide * start + phase) >> 16, (wide * stop + phase) >> 16


@triton.jit
def slot_of_pair(
    ids_ptr, slots_ptr, phase_ptr, pair, num_pairs, num_experts, BLOCK_J: tl.constexpr
):
    """The slot that a pair is computed in; -1: not here. BLOCK_J holds all pairs."""
    expert = tl.load(ids_ptr + pair)
    there = expert < num_experts
    safe = tl.where(there, expert, 0)
    j = tl.arange(0, BLOCK_J)
    ids = tl.load(ids_ptr + j, mask=j < num_pairs, other=-1)
    same = (ids == expert).to(tl.int32)
    slot, first, stop = share_of(slots_ptr, phase_ptr, safe, tl.sum(same, 0))
    turn = tl.sum(tl.where(j < pair, same, 0), 0)
    return tl.where(there & (turn >= first) & (turn < stop), slot, -1)
