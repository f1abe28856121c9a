"""When a request is worth a second attempt elsewhere, and what all of those may cost.

    first token   later than nearly all are against what was predicted, by times or by seconds
    whole answer  the same, where nothing is told before it; how long answers are is part of that
    a stream      silent for several times as long as its tokens take, and as a Step may take
    budget        a share of the tokens that are computed anyway, with little saved up
    retries       a share of the requests, likewise

Quantiles of lateness follow Dean and Barroso (The Tail at Scale, 2013), a budget by tokens what
gRPC's retry throttling does by requests. Knows nothing of replicas.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from shoal.policy.window import Window

EXTRA_SHARE = 0.05
"""Of all computed tokens, that second attempts may add."""

_NUM_KEPT, _FEWEST = 256, 16
_QUANTILE, _SLACK, _FIRST_RATIO = 0.95, 1.2, 3.0
_MOST_MEDIANS = 4.0
"""Where many are late, what is usual is not made of them."""
_LEAST_LATE_S, _FIRST_LATE_S = 0.1, 0.75
_LEAST_STALL_S, _LEAST_HUSH_S = 1.0, 0.2
_STALL_GAPS, _STALL_STEPS = 8.0, 3.0
LEAST_SILENCE_S, SURELY_SILENT_S = 1.25, 2.25
"""Of a replica that is not believed in any more; of one that is not just pausing."""
_FIRST_TOKENS, _MOST_TOKENS = 4096.0, 65_536.0
KEPT_FOR_HEDGES = 2048.0
"""Of the budget, that streams of a replica which may just pause leave to late first tokens, and
whole answers too."""
_RESCUE_SHARE = 0.5
"""Of the same, that they may take: late first tokens find the rest."""
_RETRY_SHARE, _FIRST_RETRIES, _MOST_RETRIES = 0.2, 10.0, 100.0
KEPT_FOR_FAILURES = 3.0
"""Of the budget of retries, that requests at busy replicas leave to those at failing ones: after so
many failures a replica is given up, and the rest of its requests cost nothing of it."""


class Lateness:
    """How something came, against what was predicted.

    Args:
        most_medians: that anybody is waited for, of what is usual.
    """

    def __init__(self, most_medians: float = _MOST_MEDIANS) -> None:
        self._ratios, self._delays = Window(_NUM_KEPT), Window(_NUM_KEPT)
        self._most_medians = most_medians

    @property
    def is_known(self) -> bool:
        """Enough came to tell what is late."""
        return len(self._ratios) >= _FEWEST

    def usually_s(self, predicted_s: float) -> float:
        """That what was predicted to take so long takes, as of late."""
        return predicted_s * self._ratios.quantile(0.5) if self.is_known else predicted_s

    def note(self, seconds: float, predicted_s: float, now: float) -> None:
        """Of one that came; or did not within `seconds`, as another one was faster."""
        if predicted_s > 0:
            self._ratios.add(seconds / predicted_s, now)
            self._delays.add(seconds - predicted_s, now)

    def due_s(self, predicted_s: float | None) -> float:
        """After which it should have come, usually."""
        if predicted_s is None or not self.is_known:
            return self.patience_s(predicted_s)
        return self.usually_s(predicted_s) + _LEAST_LATE_S

    def patience_s(self, predicted_s: float | None) -> float:
        """After which it is later than nearly all are; None: nothing was predicted."""
        if predicted_s is None:
            return _FIRST_LATE_S
        if not self.is_known:
            return max(predicted_s * _FIRST_RATIO, predicted_s + _FIRST_LATE_S)
        usual = self._ratios.quantile(0.5)
        ratio = min(self._ratios.quantile(_QUANTILE) * _SLACK, usual * self._most_medians)
        # Short prompts are late by times, which says little of long ones, and the other way round.
        delay_s = max(self._delays.quantile(_QUANTILE), 0.0) * _SLACK + _LEAST_LATE_S
        late_s = min(predicted_s * ratio, predicted_s + delay_s)
        return max(late_s, predicted_s * usual + _LEAST_LATE_S)


@dataclass(frozen=True, slots=True)
class Patience:
    """With requests that tell their progress, and with those whose answers come as a whole.

    Of the latter some take so many times the median because they are long, and would elsewhere.
    """

    first_tokens: Lateness = field(default_factory=Lateness)
    answers: Lateness = field(default_factory=lambda: Lateness(math.inf))

    def of(self, *, tells_progress: bool) -> Lateness:
        return self.first_tokens if tells_progress else self.answers


def stalled_after_s(gap_s: float, step_s: float) -> float:
    """Silence after which a stream stalls.

    Args:
        gap_s: between its tokens so far; step_s: of a Step that also computes prompts.
    """
    return max(_LEAST_STALL_S, _STALL_GAPS * gap_s, _STALL_STEPS * step_s)


def hushed_after_s(gap_s: float, step_s: float) -> float:
    """Silence of all streams of a replica after which a first token that is due there is not waited
    for: a second attempt at it costs little, and its replica is not held to be gone."""
    return max(_LEAST_HUSH_S, _STALL_GAPS * gap_s, _STALL_STEPS * step_s)


def silent_after_s(gap_s: float, step_s: float) -> float:
    """Silence of all streams of a replica after which it is not believed in any more."""
    return max(LEAST_SILENCE_S, stalled_after_s(gap_s, step_s))


class Budget:
    """What may be done besides: a share of what is done anyway.

    Args:
        first, most: that there is at the start, and that is saved up.
    """

    __slots__ = ("_credit", "_most", "_share")

    def __init__(self, share: float, first: float, most: float) -> None:
        self._share, self._credit, self._most = share, first, most

    def earn(self, amount: float) -> None:
        """So much was done anyway."""
        self._credit = min(self._credit + self._share * amount, self._most)

    def has(self, amount: float, leaving: float = 0.0) -> bool:
        """Whether there is so much left, and would be some `leaving`."""
        return amount + leaving <= self._credit

    def spend(self, amount: float, leaving: float = 0.0) -> bool:
        """Whether there was."""
        if not self.has(amount, leaving):
            return False
        self._credit -= amount
        return True

    def charge(self, amount: float) -> None:
        """It was done, whether there was so much left or not."""
        self._credit = max(self._credit - amount, -self._most)


def hedge_budget() -> Budget:
    """Of computed tokens."""
    return Budget(EXTRA_SHARE, _FIRST_TOKENS, _MOST_TOKENS)


def rescue_budget() -> Budget:
    """Of the same tokens, for streams whose replica may just pause."""
    first, most = _RESCUE_SHARE * _FIRST_TOKENS, _RESCUE_SHARE * _MOST_TOKENS
    return Budget(_RESCUE_SHARE * EXTRA_SHARE, first, most)


def retry_budget() -> Budget:
    """Of requests: as Finagle's."""
    return Budget(_RETRY_SHARE, _FIRST_RETRIES, _MOST_RETRIES)
