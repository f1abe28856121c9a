"""Tokens that go to ranks with experts only, and what those give back: two uneven all-to-alls.

    ranks with hidden states   x of a token | ids | weights  ──►  ranks with experts only
                               what its experts there add    ◄──

    T tokens   E hidden size   X experts of a layer   K that a token goes through   N rows

All ranks with hidden states have the same ones and choose the same experts; each sends a part of
the tokens, so that each is sent once to a rank. Rows are fp32, as kernels and precision may differ
between the ranks. Knows nothing of how experts are computed.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from shoal.comm import Group
from shoal.core.model_spec import ExpertsSpec
from shoal.core.split import WHOLE_SHARE, Dealing, Range, Shard, cut

_FEW_PAIRS = 32  # of a token and an expert: up to so many, lists are faster than tensors
RunExperts = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x [N, E], ids [N, K], weights [N, K]) → what the experts held here add, [N, E]."""


class ExpertExchange:
    """One rank's end.

    Args:
        group: its `all_to_all` reaches all ranks of the instance.
    """

    def __init__(self, group: Group, shard: Shard, spec: ExpertsSpec, device: torch.device) -> None:
        self._group, self._shard, self._spec = group, shard, spec
        self._device = device
        self._away = {
            layer: self._bounds(shard.dealings[layer - shard.layers.start])
            for layer in range(shard.layers.start, shard.layers.stop)
        }

    def deal(self, layer: int, dealing: Dealing) -> None:
        """From the next Step on a layer's experts are dealt so."""
        self._away[layer] = self._bounds(dealing)

    def send(
        self, layer: int, x_TE: Tensor, ids_TK: Tensor, weights_TK: Tensor, phase: Tensor | int
    ) -> list[Tensor]:
        """Send this rank's part of the tokens to where their experts are.

        Args:
            phase: of the batch and layer (`share_phase`).

        Returns:
            Indices of those that each rank was sent.
        """
        own, away = _part(len(x_TE), self._shard), self._away[layer]
        if self._device.type == "cpu" and ids_TK.numel() <= _FEW_PAIRS:
            choices = _few_choices(ids_TK, weights_TK, own, away, int(phase))
        else:
            choices = _choices(ids_TK, weights_TK, own, away, phase)
        tokens_N, chosen_NJ, counts = choices
        rows = torch.cat((x_TE[tokens_N].float(), chosen_NJ), -1)
        self._group.all_to_all(torch.split(rows, counts))
        return list(torch.split(tokens_N, counts))

    def add_returned(self, sent: Sequence[Tensor], out_TE: Tensor) -> Tensor:
        """`out_TE` and what came back for the tokens that were sent; fp32 is added to in place."""
        nothing = torch.empty(0, out_TE.shape[-1], device=self._device)
        returned = self._group.all_to_all([nothing] * len(sent))
        wide_TE = out_TE.float()
        for tokens_N, given_NE in zip(sent, returned, strict=True):
            if len(tokens_N):
                wide_TE.index_add_(0, tokens_N, given_NE)
        return wide_TE.to(out_TE.dtype)

    def serve(self, hidden_size: int, run: RunExperts) -> None:
        """Run this rank's experts of a layer on what it is sent, and give it back."""
        K, size = self._spec.num_active, self._shard.num_ranks
        nothing = torch.empty(0, hidden_size + 2 * K, device=self._device)
        arrived = self._group.all_to_all([nothing] * size)
        rows = torch.cat(arrived)
        given_NE = rows[:, :hidden_size]
        if len(rows):
            x_NE, ids_NK, weights_NK = (
                part.contiguous() for part in torch.split(rows, [hidden_size, K, K], -1)
            )
            given_NE = run(x_NE, ids_NK.long(), weights_NK).float()
        lengths = [len(part) for part in arrived]
        self._group.all_to_all(list(torch.split(given_NE, lengths)))

    def _bounds(self, dealing: Dealing) -> Tensor:
        """int64 [X, ranks, 2]: shares of ranks with experts only; the others' are empty."""
        bounds = torch.zeros(self._spec.num_experts, self._shard.num_ranks, 2, dtype=torch.int64)
        for rank, shares in enumerate(dealing):
            if rank not in self._shard.streams:
                for share in shares:
                    bounds[share.expert, rank] = torch.tensor((share.start, share.stop))
        return bounds.to(self._device)


def _part(num_tokens: int, shard: Shard) -> Range:
    """The tokens that a rank sends."""
    return cut(num_tokens, [1.0] * len(shard.streams))[shard.streams.index(shard.rank)]


Choices = tuple[Tensor, Tensor, list[int]]
"""Tokens [N] that leave, rank by rank; [ids | weights] of what they go through there, in fp32; how
many to each rank."""


def _choices(
    ids_TK: Tensor, weights_TK: Tensor, own: Range, bounds_XR2: Tensor, phase: Tensor | int
) -> Choices:
    num_experts, num_ranks, _ = bounds_XR2.shape
    taken_TK = _takers(ids_TK, bounds_XR2, phase)[own.start : own.stop]
    here_RTK = taken_TK == torch.arange(num_ranks, device=ids_TK.device)[:, None, None]
    ranks_N, places_N = here_RTK.any(-1).nonzero(as_tuple=True)
    missing_NK, tokens_N = ~here_RTK[ranks_N, places_N], places_N + own.start
    ids_NK = ids_TK[tokens_N].masked_fill_(missing_NK, num_experts)
    weights_NK = weights_TK[tokens_N].float().masked_fill_(missing_NK, 0.0)
    counts = torch.bincount(ranks_N, minlength=num_ranks).tolist()
    return tokens_N, torch.cat((ids_NK, weights_NK), -1), counts


def _few_choices(
    ids_TK: Tensor, weights_TK: Tensor, own: Range, bounds_XR2: Tensor, phase: int
) -> Choices:
    """The same in lists: an operation on tensors takes as long as dozens of theirs."""
    num_experts, num_ranks, _ = bounds_XR2.shape
    num_active, ids, weights = ids_TK.shape[1], ids_TK.tolist(), weights_TK.tolist()
    loads = Counter(itertools.chain.from_iterable(ids))
    ends = {
        expert: [
            ((load * start + phase) // WHOLE_SHARE, (load * stop + phase) // WHOLE_SHARE)
            for start, stop in bounds_R2
        ]
        for (expert, load), bounds_R2 in zip(
            loads.items(), bounds_XR2[list(loads)].tolist(), strict=True
        )
    }
    turns, leaving = Counter[int](), [dict[int, list[float]]() for _ in range(num_ranks)]
    for token, row in enumerate(ids):
        for k, expert in enumerate(row):
            turn, turns[expert] = turns[expert], turns[expert] + 1
            for rank, (first, stop) in enumerate(ends[expert]):
                if first <= turn < stop and token in own:
                    nothing = [float(num_experts)] * num_active + [0.0] * num_active
                    chosen = leaving[rank].setdefault(token, nothing)
                    chosen[k], chosen[num_active + k] = expert, weights[token][k]
    tokens = [token for each in leaving for token in each]
    chosen_NJ = torch.tensor([row for each in leaving for row in each.values()])
    counts = [len(each) for each in leaving]
    return torch.tensor(tokens, dtype=torch.int64), chosen_NJ.view(-1, 2 * num_active), counts


def _takers(ids_TK: Tensor, bounds_XR2: Tensor, phase: Tensor | int) -> Tensor:
    """Which rank with experts only has each token's share of an expert, [T, K]; -1: none has.

    The same lines as `ExpertShare.of` draws, for all tokens at once.
    """
    ids_J = ids_TK.flatten()
    order_J = torch.sort(ids_J, stable=True)[1]
    counts_X = torch.bincount(ids_J, minlength=len(bounds_XR2))
    before_X = counts_X.cumsum(0) - counts_X
    turns_J = torch.empty_like(ids_J)
    turns_J[order_J] = torch.arange(len(ids_J), device=ids_J.device) - before_X[ids_J[order_J]]
    lines_XR2 = (counts_X[:, None, None] * bounds_XR2 + phase) // WHOLE_SHARE
    first_JR, stop_JR = lines_XR2[ids_J].unbind(-1)
    takes_JR = (turns_J[:, None] >= first_JR) & (turns_J[:, None] < stop_JR)
    rank_J = takes_JR.int().argmax(-1).masked_fill(~takes_JR.any(-1), -1)
    return rank_J.view(ids_TK.shape)
