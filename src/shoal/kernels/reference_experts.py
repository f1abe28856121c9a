"""Mixtures of experts in plain torch: the definition (see `experts.py` for the letters)."""

from __future__ import annotations

from typing import Literal

import torch

from shoal.kernels.experts import SHARE_BITS, ExpertWeights, num_rows, rows_of
from shoal.kernels.products import gated_activation, linear


def route(
    x_TE: torch.Tensor,
    router_XE: torch.Tensor,
    *,
    num_active: int,
    renormalises: bool,
    scale: float,
    num_groups: int,
    num_active_groups: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which experts each token goes through: ids [T, K] in int64, their weights [T, K] in fp32.

    Scores are a softmax over all experts, in fp32. The highest come first, of equals the first.
    Only experts of the `num_active_groups` groups with the highest single score are chosen.

    Args:
        router_XE: fp32.
        renormalises: weights are made to sum to 1, before `scale`.
        num_groups: of consecutive experts, equally large; 1: all may be chosen.
    """
    scores_TX = torch.softmax(torch.nn.functional.linear(x_TE.float(), router_XE), -1)
    if num_active_groups < num_groups:
        scores_TGX = scores_TX.view(len(scores_TX), num_groups, -1)
        best_TG = torch.sort(scores_TGX.amax(-1), stable=True, dim=-1, descending=True)[1]
        hidden_TG = torch.ones_like(best_TG, dtype=torch.bool)
        hidden_TG.scatter_(1, best_TG[:, :num_active_groups], False)
        scores_TX = scores_TGX.masked_fill(hidden_TG[..., None], -1.0).view(scores_TX.shape)
    weights_TX, ids_TX = torch.sort(scores_TX, stable=True, dim=-1, descending=True)
    weights_TK, ids_TK = weights_TX[:, :num_active], ids_TX[:, :num_active]
    if renormalises:
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
    return ids_TK.contiguous(), weights_TK.contiguous() * scale


def experts(
    x_TE: torch.Tensor,
    ids_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    experts: ExpertWeights,
    phase: torch.Tensor,
    activation: Literal["silu", "gelu_tanh"],
) -> torch.Tensor:
    """What the experts held here add to each token, [T, E] in x's dtype, summed in fp32.

    Waits for the device: how many tokens an expert has decides the shapes.

    Args:
        ids_TK, weights_TK: as `route` gives them.
        phase: int64 scalar below 1 << 16, of the batch and layer.
    """
    out_TE = torch.zeros(x_TE.shape, dtype=torch.float32, device=x_TE.device)
    num_active, held = ids_TK.shape[1], experts.slots_X3[:, 0].tolist()
    order = torch.sort(ids_TK.flatten(), stable=True)[1]
    ends = torch.bincount(ids_TK.flatten(), minlength=len(held)).cumsum(0).tolist()
    num_held = max(held, default=-1) + 1
    if not num_held:
        return out_TE.to(x_TE.dtype)
    rows, hidden = num_rows(experts.gate_up_FE) // num_held, x_TE.shape[1]
    for expert, slot in enumerate(held):
        first = ends[expert - 1] if expert else 0
        if slot < 0 or first == ends[expert]:
            continue
        start, stop = _share(ends[expert] - first, experts.slots_X3[expert], phase)
        chosen = order[first + start : first + stop]
        if not len(chosen):
            continue
        tokens = chosen // num_active
        gate_up = linear(
            x_TE[tokens], rows_of(experts.gate_up_FE, slot * rows, (slot + 1) * rows), None
        )
        down = rows_of(experts.down_EF, slot * hidden, (slot + 1) * hidden)
        given = linear(gated_activation(gate_up, activation), down, None)
        out_TE.index_add_(0, tokens, given.float() * weights_TK.flatten()[chosen, None])
    return out_TE.to(x_TE.dtype)


def _share(num_tokens: int, slot_3: torch.Tensor, phase: torch.Tensor) -> tuple[int, int]:
    _, start, stop = slot_3.tolist()
    moved = int(phase)
    return (num_tokens * start + moved) >> SHARE_BITS, (num_tokens * stop + moved) >> SHARE_BITS
