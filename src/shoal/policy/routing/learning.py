"""How much longer than predicted a replica takes, lately: a factor for prompts, one for the rest.

    elapsed ≈ prompts x (their predicted seconds) + decoding x (predicted seconds of the rest)

Each stretch of work blames both for what it took longer, by their shares of it. What is older
counts for less, by time and not by number: a replica that slows down to a fifth is believed within
half a second of its work. Knows nothing of what is predicted or why.
"""

from __future__ import annotations

from dataclasses import dataclass

_FORGET_S = 0.4
_FORGET_USUAL_S = 60.0
_MOST_AT_ONCE = 20.0
_BELIEF_S = 0.5
_DOUBT_S = 0.02
_LEAST = 1e-9


@dataclass(slots=True)
class _Factor:
    """Seconds that were seen over those predicted, weighed by how long ago."""

    seen: float
    predicted: float

    @property
    def value(self) -> float:
        return self.seen / self.predicted

    def note(self, predicted_s: float, ratio: float, kept: float) -> None:
        if self.predicted * kept > _LEAST:
            seen_s = predicted_s * self.value * ratio
            self.seen = self.seen * kept + seen_s
            self.predicted = self.predicted * kept + predicted_s


class Correction:
    """Of one replica.

    Args:
        is_known: there is a cost model to believe at first.
    """

    __slots__ = ("_decoding", "_is_known", "_prompts", "decoding", "prompts", "usual")

    def __init__(self, is_known: bool) -> None:
        weight = _BELIEF_S if is_known else _DOUBT_S
        self._is_known = is_known
        self._prompts, self._decoding = _Factor(weight, weight), _Factor(weight, weight)
        self.prompts = self.decoding = 1.0
        # What it comes back to when nothing is wrong.
        self.usual: float | None = 1.0 if is_known else None

    @property
    def factor(self) -> float:
        """The larger one."""
        return max(self.prompts, self.decoding)

    @property
    def looks_bad(self) -> bool:
        return self.usual is not None and self.factor > _BAD * self.usual

    def note(self, prompts_s: float, rest_s: float, elapsed_s: float) -> None:
        """A stretch of work that should have taken so long without any factor."""
        expected_s = self.prompts * prompts_s + self.decoding * rest_s
        if expected_s <= 0 or elapsed_s <= 0:
            return
        ratio = min(max(elapsed_s / expected_s, 1 / _MOST_AT_ONCE), _MOST_AT_ONCE)
        kept = _FORGET_S / (_FORGET_S + elapsed_s)
        self._prompts.note(prompts_s, ratio, kept)
        self._decoding.note(rest_s, ratio, kept)
        self.prompts, self.decoding = self._prompts.value, self._decoding.value
        self._note_usual(elapsed_s)

    def _note_usual(self, elapsed_s: float) -> None:
        if self.usual is None or self.factor < self.usual:
            self.usual = self.factor
        else:
            share = elapsed_s / (_FORGET_USUAL_S + elapsed_s)
            self.usual += share * (self.factor - self.usual)


_BAD = 1.5
