"""What a model makes of a text, and how far two models part on it: sums over logits.

    N rows of logits   V vocabulary

Perplexity is exp of the mean negative log-probability of each token of the text. The divergence
is KL(reference || model), in nats a token: what coding text from the reference costs more when
it is coded with the model (Kullback and Leibler, 1951). Knows nothing of files, windows or of
how logits come about.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.core.errors import ModelError


@dataclass(frozen=True, slots=True, kw_only=True)
class Perplexity:
    """`error`: its standard error, from the spread over tokens."""

    value: float
    error: float
    num_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """How far a model is from its reference over the same tokens.

    Attributes:
        kl_mean, kl_median, kl_p99, kl_max: KL(reference || model), nats a token.
        top1_agreement: share of positions where both find the same token likeliest.
        mean_abs_logprob_difference: of the text's own tokens, nats.
    """

    kl_mean: float
    kl_median: float
    kl_p99: float
    kl_max: float
    top1_agreement: float
    mean_abs_logprob_difference: float


class TextScore:
    """Collects log-probabilities of a text's tokens."""

    def __init__(self) -> None:
        self._logprobs: list[Tensor] = []

    def add(self, logits_NV: Tensor, targets_N: Tensor) -> Tensor:
        """Take rows and the token that stands at each; returns their log-probabilities [N, V].

        Raises:
            ModelError: a logit is not a number.
        """
        logprobs_NV = logits_NV.float().log_softmax(-1)
        chosen_N = logprobs_NV.gather(1, targets_N[:, None])[:, 0].double().cpu()
        if not chosen_N.isfinite().all():
            raise ModelError(
                "the model's logits are not all finite numbers: its weights are damaged, or too "
                "large for its precision; try --dtype float32"
            )
        self._logprobs.append(chosen_N)
        return logprobs_NV

    @property
    def logprobs(self) -> Tensor:
        """float64, one for each token so far."""
        return torch.cat(self._logprobs)

    def result(self) -> Perplexity:
        losses = -self.logprobs
        value = math.exp(min(losses.mean().item(), 700.0))
        spread = losses.std().item() if len(losses) > 1 else 0.0
        return Perplexity(
            value=value, error=value * spread / math.sqrt(len(losses)), num_tokens=len(losses)
        )


class Comparison:
    """Collects what sets a model apart from its reference."""

    def __init__(self) -> None:
        self._divergences: list[Tensor] = []
        self._num_agreed = 0

    def add(self, logprobs_NV: Tensor, reference_NV: Tensor) -> None:
        """Take log-probabilities of both at the same positions."""
        reference_NV = reference_NV.to(logprobs_NV.device)
        weights_NV = reference_NV.exp()
        # Where the reference has none (exp of -inf), a token counts nothing.
        gaps_NV = (reference_NV - logprobs_NV).masked_fill_(weights_NV == 0, 0.0)
        # Rounding alone can push it below 0.
        self._divergences.append((weights_NV * gaps_NV).sum(-1).clamp_(min=0).double().cpu())
        agreed_N = logprobs_NV.argmax(-1) == reference_NV.argmax(-1)
        self._num_agreed += int(agreed_N.sum())

    def result(self, score: TextScore, reference: TextScore) -> Divergence:
        """Args:
        score, reference: of the text's own tokens, over the same positions.
        """
        kl = torch.cat(self._divergences)
        return Divergence(
            kl_mean=kl.mean().item(),
            kl_median=kl.median().item(),
            kl_p99=kl.kthvalue(math.ceil(0.99 * len(kl))).values.item(),
            kl_max=kl.max().item(),
            top1_agreement=self._num_agreed / len(kl),
            mean_abs_logprob_difference=((score.logprobs - reference.logprobs).abs().mean().item()),
        )
