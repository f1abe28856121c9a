"""Which experts each token goes through: softmax, groups, the highest few and their weights in one.

T tokens   E hidden size   X experts   G groups   K that a token goes through
"""
# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def route(
    x_TE: Tensor,
    router_XE: Tensor,
    *,
    num_active: int,
    renormalises: bool,
    scale: float,
    num_groups: int,
    num_active_groups: int,
) -> tuple[Tensor, Tensor]:
    """As the reference; the product with the router is torch's, in fp32."""
    logits_TX = torch.nn.functional.linear(x_TE.float(), router_XE)
    num_tokens, num_experts = logits_TX.shape
    ids_TK = torch.empty(num_tokens, num_active, dtype=torch.int64, device=x_TE.device)
    weights_TK = torch.empty(num_tokens, num_active, device=x_TE.device)
    if num_tokens:
        _route[(num_tokens,)](
            logits_TX,
            ids_TK,
            weights_TK,
            scale,
            NUM_GROUPS=num_groups,
            NUM_ACTIVE_GROUPS=num_active_groups,
            GROUP=num_experts // num_groups,
            NUM_ACTIVE=num_active,
            RENORMALISES=renormalises,
            BLOCK_G=triton.next_power_of_2(num_groups),
            BLOCK_X=triton.next_power_of_2(num_experts // num_groups),
            BLOCK_A=triton.next_power_of_2(num_active),
            num_warps=1,
        )
    return ids_TK, weights_TK


@triton.jit
def _route(
    logits_ptr,
    ids_ptr,
    weights_ptr,
    scale,
    NUM_GROUPS: tl.constexpr,
    NUM_ACTIVE_GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    NUM_ACTIVE: tl.constexpr,
    RENORMALISES: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_A: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    g, n = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_X)
    expert = g[:, None] * GROUP + n[None, :]
    there = (g < NUM_GROUPS)[:, None] & (n < GROUP)[None, :]
    row_ptr = logits_ptr + token * (NUM_GROUPS * GROUP)
    logits = tl.load(row_ptr + expert, mask=there, other=float("-inf"))
    exps = tl.exp(logits - tl.max(tl.max(logits, 1), 0))
    scores = tl.where(there, exps / tl.sum(tl.sum(exps, 1), 0), -2.0)
    if NUM_ACTIVE_GROUPS < NUM_GROUPS:
        left = tl.max(scores, 1)
        is_open = g < 0
        for _ in tl.static_range(NUM_ACTIVE_GROUPS):
            first = tl.min(tl.where(left == tl.max(left, 0), g, BLOCK_G), 0)
            is_open = is_open | (g == first)
            left = tl.where(g == first, -3.0, left)
        scores = tl.where(is_open[:, None] | (scores < 0.0), scores, -1.0)
    a = tl.arange(0, BLOCK_A)
    ids = tl.zeros([BLOCK_A], tl.int64)
    weights = tl.zeros([BLOCK_A], tl.float32)
    for i in range(NUM_ACTIVE):
        best = tl.max(tl.max(scores, 1), 0)
        at_best = tl.where(scores == best, expert, NUM_GROUPS * GROUP)
        first_expert = tl.min(tl.min(at_best, 1), 0)
        ids = tl.where(a == i, first_expert.to(tl.int64), ids)
        weights = tl.where(a == i, best, weights)
        scores = tl.where(expert == first_expert, -3.0, scores)
    if RENORMALISES:
        weights = weights / tl.sum(weights, 0)
    tl.store(ids_ptr + token * NUM_ACTIVE + a, ids, mask=a < NUM_ACTIVE)
    tl.store(weights_ptr + token * NUM_ACTIVE + a, weights * scale, mask=a < NUM_ACTIVE)
