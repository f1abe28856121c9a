"""What sampling asks of a vocabulary: here all of it is held by one rank.

Where it is shared out (`vocab_parallel.py`) the same questions are settled among ranks.

    N, R rows   V token ids held here   K best tokens

Knows nothing of requests, sequences or noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from shoal.model.logits import cutoff, finite_

LogprobTensors = tuple[Tensor, Tensor, Tensor, Tensor]
"""Of the token chosen: log-probability [N], rank [N]; of the best: log-probabilities and ids
[N, K or more], in any order; what is no token has -inf."""


class Vocabulary(Protocol):
    """Rows are the same on every rank, and so are calls."""

    @property
    def first_id(self) -> int:
        """Token id of the first column of logits."""

    def pick(self, scores_RV: Tensor, best_R: Tensor | None = None) -> Tensor:
        """This rank's candidate of each row, [R, ...]: its best score, the first of equals.

        Args:
            best_R: where that is, if it is known.
        """

    def chosen(self, picked: Tensor) -> Tensor:
        """int64 [R], the best of all candidates: on every rank the same."""

    def everywhere(self, flags_R: Tensor) -> Tensor:
        """Whether a flag is set on every rank."""

    def cutoff(
        self,
        logits_RV: Tensor,
        top_k: Sequence[int],
        top_p: Sequence[float],
        min_p: Sequence[float],
    ) -> Tensor:
        """See `logits.cutoff`."""

    def logprobs(self, logits_NV: Tensor, token_ids_N: Tensor, num_best: int) -> LogprobTensors:
        """Of raw logits, which are not changed."""


class WholeVocabulary:
    """One rank holds every token id."""

    first_id = 0

    def pick(self, scores_RV: Tensor, best_R: Tensor | None = None) -> Tensor:
        return scores_RV.argmax(dim=-1) if best_R is None else best_R

    def chosen(self, picked: Tensor) -> Tensor:
        return picked

    def everywhere(self, flags_R: Tensor) -> Tensor:
        return flags_R

    def cutoff(
        self,
        logits_RV: Tensor,
        top_k: Sequence[int],
        top_p: Sequence[float],
        min_p: Sequence[float],
    ) -> Tensor:
        return cutoff(logits_RV, top_k, top_p, min_p)

    def logprobs(self, logits_NV: Tensor, token_ids_N: Tensor, num_best: int) -> LogprobTensors:
        logprobs_NV = finite_(logits_NV.float().clone()).log_softmax(dim=-1)
        chosen_N1 = logprobs_NV.gather(1, token_ids_N[:, None])
        ranks_N = (logprobs_NV > chosen_N1).sum(dim=-1) + 1
        best_NK, best_ids_NK = logprobs_NV.topk(min(num_best, logprobs_NV.shape[1]), dim=-1)
        return chosen_N1[:, 0], ranks_N, best_NK, best_ids_NK
