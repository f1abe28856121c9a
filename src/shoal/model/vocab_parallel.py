"""A vocabulary shared out over ranks: they exchange candidates, not logits.

    greedy, no cut     each rank's best score and its id; the best of them wins
    top-k, top-p, min-p    before that, each rank's K best logits and the mass of all it has. Of all
                       logits down to the largest K-th best of a rank, everybody then has every one:

            rank 0   9.1 7.2 5.5 | ...          everything above 5.5 is known, so a cut that falls
            rank 1   8.0 3.1 2.9 | ...          there is decided; a flat row's may fall below

                       where it does, that row's logits are gathered whole
    logprobs           sums, and the best of each rank

Every rank comes to the same tokens: they follow from what all have received. Equal scores are
settled by the lower id, as on one rank. Knows nothing of requests, sequences or noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from shoal.comm import Group
from shoal.core.split import Range
from shoal.model.logits import cutoff, finite_, first_reaching, to_device
from shoal.model.vocabulary import LogprobTensors, Vocabulary, WholeVocabulary

_TOP_P_CANDIDATES = 256
_MORE_THAN_K = 8
"""Candidates beyond top-k: then ties with the k-th seldom hide behind the last one sent."""
_LOWEST = -1e38
"""A row where all is forbidden has no best: anything finite keeps NaN out."""


def vocabulary_of(vocab: Range | None, group: Group | None) -> Vocabulary:
    """How the ranks of a group settle what concerns the whole vocabulary.

    Args:
        vocab: token ids that this rank has logits of.
        group: None: it has all of them.
    """
    if group is None or group.size == 1:
        return WholeVocabulary()
    assert vocab is not None, "a rank of a group has a range of the vocabulary"
    return SharedVocabulary(vocab, group)


class SharedVocabulary:
    """One rank's range of the vocabulary, perhaps empty."""

    def __init__(self, vocab: Range, group: Group) -> None:
        self._vocab = vocab
        self._group = group

    @property
    def first_id(self) -> int:
        return self._vocab.start

    def pick(self, scores_RV: Tensor, best_R: Tensor | None = None) -> Tensor:
        """Score and id, float64 [R, 2]."""
        if not len(self._vocab):
            nothing = torch.tensor([-math.inf, self.first_id], dtype=torch.float64)
            return nothing.to(scores_RV.device).expand(len(scores_RV), 2).contiguous()
        best_R = scores_RV.argmax(dim=-1) if best_R is None else best_R
        scores_R = scores_RV.gather(1, best_R[:, None])[:, 0]
        return torch.stack((scores_R.double(), (best_R + self.first_id).double()), -1)

    def chosen(self, picked: Tensor) -> Tensor:
        """The first of the best: ranks are in the order of their token ids."""
        picked_SR2 = self._group.all_gather(picked)
        winner_1R = picked_SR2[..., 0].argmax(dim=0, keepdim=True)
        return picked_SR2[..., 1].gather(0, winner_1R)[0].long()

    def everywhere(self, flags_R: Tensor) -> Tensor:
        return self._group.all_gather(flags_R.to(torch.uint8)).bool().all(dim=0)

    def cutoff(
        self,
        logits_RV: Tensor,
        top_k: Sequence[int],
        top_p: Sequence[float],
        min_p: Sequence[float],
    ) -> Tensor:
        """See `logits.cutoff`; with top-p it waits for the device: is all decided?"""
        device = logits_RV.device
        known = self._exchange(logits_RV, top_k, top_p)
        log_min_p = [math.log(value) if value > 0 else -math.inf for value in min_p]
        cut_R1 = known.best + to_device(log_min_p, torch.float32, device)[:, None]
        if any(top_k):
            cut_R1 = torch.maximum(cut_R1, known.kth(top_k))
        if all(p >= 1.0 for p in top_p):
            return cut_R1
        top_p_R1 = to_device(top_p, torch.float64, device)[:, None]
        found_R1, is_sure_R1 = known.top_p_cut(cut_R1, top_p_R1)
        cut_R1 = torch.maximum(cut_R1, found_R1)
        unsure = (~is_sure_R1[:, 0]).nonzero()[:, 0].tolist()
        if unsure:
            cut_R1[unsure] = cutoff(
                self._gather(logits_RV[unsure]),
                [top_k[row] for row in unsure],
                [top_p[row] for row in unsure],
                [min_p[row] for row in unsure],
            )
        return cut_R1

    def logprobs(self, logits_NV: Tensor, token_ids_N: Tensor, num_best: int) -> LogprobTensors:
        logits_NV = finite_(logits_NV.float().clone())
        best_NK, best_ids_NK = _best(logits_NV, max(1, num_best))
        numbers = _mass(logits_NV, best_NK[:, :1]), self._logits_of(token_ids_N, logits_NV)
        sent_NJ = torch.cat((*numbers, best_NK, best_ids_NK + self.first_id), -1)
        got_SNJ = self._group.all_gather(sent_NJ)
        best_SNK, ids_SNK = got_SNJ[..., 2:].chunk(2, -1)
        top_N1, mass_N1 = _total(best_SNK[..., :1], got_SNJ[..., :1])
        # In the order in which one rank's log_softmax works: logits may be as large as LIMIT.
        top_N1, log_mass_N1 = top_N1.float(), mass_N1.log().float()
        chosen_N1 = (got_SNJ[..., 1:2].amax(dim=0).float() - top_N1) - log_mass_N1
        num_above_N = ((logits_NV - top_N1) - log_mass_N1 > chosen_N1).sum(dim=-1)
        ranks_N = self._group.all_gather(num_above_N).sum(dim=0) + 1
        best_NJ = (_side_by_side(best_SNK).float() - top_N1) - log_mass_N1
        return chosen_N1[:, 0], ranks_N, best_NJ, _side_by_side(ids_SNK).long()

    def _logits_of(self, token_ids_N: Tensor, logits_NV: Tensor) -> Tensor:
        """float64 [N, 1]; -inf where another rank has them."""
        if not len(self._vocab):
            return torch.full((len(logits_NV), 1), -math.inf, device=logits_NV.device).double()
        columns_N1 = token_ids_N[:, None] - self.first_id
        outside_N1 = (columns_N1 < 0) | (columns_N1 >= len(self._vocab))
        found_N1 = logits_NV.gather(1, columns_N1.masked_fill(outside_N1, 0))
        return found_N1.masked_fill_(outside_N1, -math.inf).double()

    def _exchange(
        self, logits_RV: Tensor, top_k: Sequence[int], top_p: Sequence[float]
    ) -> _Candidates:
        has_top_p = any(p < 1.0 for p in top_p)
        num_best = max(
            max(top_k) + _MORE_THAN_K if any(top_k) else 1, has_top_p * _TOP_P_CANDIDATES
        )
        best_RK = _best(logits_RV, num_best)[0]
        mass_R1 = _mass(logits_RV, best_RK[:, :1]) if has_top_p else best_RK[:, :1]
        floor_R1 = best_RK[:, -1:]
        if len(self._vocab) <= num_best:
            floor_R1 = torch.full_like(floor_R1, -math.inf)
        got_SRJ = self._group.all_gather(torch.cat((mass_R1, floor_R1, best_RK), -1))
        return _Candidates(
            values_RJ=_side_by_side(got_SRJ[..., 2:]).float().sort(dim=-1, descending=True).values,
            floor_R1=got_SRJ[..., 1:2].amax(dim=0).float(),
            mass_R1=_total(got_SRJ[..., 2:3], got_SRJ[..., :1])[1],
        )

    def _gather(self, logits_RV: Tensor) -> Tensor:
        """Of the whole vocabulary."""
        width = torch.tensor([len(self._vocab)], device=logits_RV.device)
        widths: list[int] = self._group.all_gather(width).flatten().tolist()
        padded_RW = pad(logits_RV, (0, max(widths) - len(self._vocab)))
        parts_SRW = self._group.all_gather(padded_RW)
        return torch.cat(
            [part[:, :width] for part, width in zip(parts_SRW, widths, strict=True)], -1
        )


@dataclass(frozen=True, slots=True, eq=False)
class _Candidates:
    """What is known of the whole vocabulary's logits, R rows.

    Attributes:
        values_RJ: every rank's best, in descending order.
        floor_R1: above it all logits are among them; -inf: they are all there are.
        mass_R1: sum of all exponentials over that of the best, float64; needed for top-p alone.
    """

    values_RJ: Tensor
    floor_R1: Tensor
    mass_R1: Tensor

    @property
    def best(self) -> Tensor:
        return self.values_RJ[:, :1].clamp(min=_LOWEST)

    def kth(self, top_k: Sequence[int]) -> Tensor:
        """The k-th largest logit, [R, 1]; -inf where k is 0."""
        index_R1 = to_device(top_k, torch.int64, self.values_RJ.device)[:, None] - 1
        return self.values_RJ.gather(1, index_R1.clamp(min=0)).masked_fill(index_R1 < 0, -math.inf)

    def top_p_cut(self, cut_R1: Tensor, top_p_R1: Tensor) -> tuple[Tensor, Tensor]:
        """Top-p's own cut after that of top-k and min-p, and whether it is decided."""
        best_R1, floor_R1 = self.best, self.floor_R1
        weights_RJ = (self.values_RJ - best_R1).exp_().masked_fill_(self.values_RJ < cut_R1, 0.0)
        is_uncut_R1 = cut_R1 == -math.inf
        mass_R1 = torch.where(
            is_uncut_R1,
            self.mass_R1,
            weights_RJ.sum(dim=-1, keepdim=True, dtype=torch.float64),
        )
        known_RJ = self.values_RJ.masked_fill(self.values_RJ < floor_R1, -math.inf)
        found_R1 = first_reaching(known_RJ, best_R1, top_p_R1 * mass_R1)
        is_off_R1 = top_p_R1 >= 1.0
        is_sure_R1 = (is_uncut_R1 | (cut_R1 > floor_R1)) & (found_R1 > -math.inf)
        return found_R1.masked_fill(is_off_R1, -math.inf), is_sure_R1 | is_off_R1


def _best(logits_RV: Tensor, num_best: int) -> tuple[Tensor, Tensor]:
    """The largest of each row and where they are, float64 [R, num_best]; -inf beyond the last."""
    found = min(num_best, logits_RV.shape[1])
    values_RK, columns_RK = logits_RV.topk(found, dim=-1)
    missing = (0, num_best - found)
    return pad(values_RK.double(), missing, value=-math.inf), pad(columns_RK.double(), missing)


def _mass(logits_RV: Tensor, best_R1: Tensor) -> Tensor:
    """Sum of exponentials over that of the best, float64 [R, 1]; of nothing 0."""
    weights_RV = (logits_RV - best_R1.float().clamp(min=_LOWEST)).exp_()
    return weights_RV.sum(dim=-1, keepdim=True, dtype=torch.float64)


def _total(best_SR1: Tensor, mass_SR1: Tensor) -> tuple[Tensor, Tensor]:
    """The best of all ranks, and all their masses over its exponential, float64 [R, 1]."""
    best_R1 = best_SR1.amax(dim=0).clamp(min=_LOWEST)
    return best_R1, (mass_SR1 * (best_SR1 - best_R1).exp()).sum(dim=0)


def _side_by_side(parts_SRJ: Tensor) -> Tensor:
    """[R, S * J]."""
    return parts_SRJ.transpose(0, 1).flatten(1)
