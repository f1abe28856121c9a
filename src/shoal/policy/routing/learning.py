"""How much longer than predicted a replica takes, lately: a factor for prompts, one for the rest.

    elapsed ≈ level x (shape of prompts x their seconds + shape of the rest x its seconds)

The level is what it lately took over what it should: all of a replica slows down together. It
forgets within half a second of work. The shape is what the prediction has wrong, prompts against
the rest: it changes little, and is found by least squares over stretches of work of the latest 20 s
or so, each measured by the level that it had, with a little pull to what was predicted. One that
holds little of a kind says little of that kind; where all hold the same share of both, the pull
decides. Knows nothing of what is predicted or why.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

_FORGET_S = 0.4
_FORGET_SHAPE_S = 20.0
_FORGET_USUAL_S = 60.0
_MOST_AT_ONCE = 20.0
_BELIEF_S = 0.5
_DOUBT_S = 0.02
_ANCHOR = 0.03
_LEAST = 1e-9
_LEAST_SHAPE, _MOST_SHAPE = 0.05, 20.0
_MOST_OFF = 3.0
_BAD = 1.5


@dataclass(slots=True)
class _Shape:
    """Least squares of two factors.

    Attributes:
        pull: seconds of work that the factors 1, 1 count for.
    """

    pull: float
    prompts: float = 1.0
    rest: float = 1.0
    _pp: float = 0.0
    _pr: float = 0.0
    _rr: float = 0.0
    _p: float = 0.0
    _r: float = 0.0

    def expected_s(self, prompts_s: float, rest_s: float) -> float:
        return self.prompts * prompts_s + self.rest * rest_s

    def note(self, prompts: float, rest: float, took: float, seconds: float) -> None:
        """A stretch of so long: what was predicted of both, and took, over what was expected."""
        kept = _FORGET_SHAPE_S / (_FORGET_SHAPE_S + seconds)
        self._pp = self._pp * kept + seconds * prompts * prompts
        self._pr = self._pr * kept + seconds * prompts * rest
        self._rr = self._rr * kept + seconds * rest * rest
        self._p = self._p * kept + seconds * prompts * took
        self._r = self._r * kept + seconds * rest * took
        self._solve()

    def _solve(self) -> None:
        # Where stretches differ little in what they hold, their noise must not decide.
        pull = max(self.pull, _ANCHOR * (self._pp + self._rr))
        pp, rr, pr = self._pp + pull, self._rr + pull, self._pr
        p, r = self._p + pull, self._r + pull
        size = pp * rr - pr * pr
        if size > _LEAST:
            self.prompts = _bounded((p * rr - r * pr) / size)
            self.rest = _bounded((r * pp - p * pr) / size)


class Correction:
    """Of one replica.

    Args:
        is_known: there is a cost model to believe at first.
    """

    __slots__ = ("_predicted_s", "_seen_s", "_shape", "decoding", "prompts", "usual")

    def __init__(self, is_known: bool) -> None:
        weight = _BELIEF_S if is_known else _DOUBT_S
        self._shape = _Shape(weight)
        # Of late: seconds that were seen, and those that its shape alone would have taken.
        self._seen_s = self._predicted_s = weight
        self.prompts = self.decoding = 1.0
        # What it comes back to when nothing is wrong.
        self.usual: float | None = 1.0 if is_known else None

    @property
    def factor(self) -> float:
        """Of both."""
        return math.sqrt(self.prompts * self.decoding)

    @property
    def looks_bad(self) -> bool:
        return self.usual is not None and self.factor > _BAD * self.usual

    @property
    def _level(self) -> float:
        return self._seen_s / self._predicted_s

    def assume(self, factor: float) -> None:
        """Of one of which nothing was seen yet."""
        self._seen_s = factor * self._predicted_s
        self.prompts = self.decoding = factor

    def usually(self, prompts_s: float, rest_s: float) -> float:
        """What work takes that should take so long, while nothing is wrong."""
        lately_s = self.prompts * prompts_s + self.decoding * rest_s
        return lately_s if self.usual is None else lately_s * self.usual / self.factor

    def note(self, prompts_s: float, rest_s: float, elapsed_s: float) -> None:
        """A stretch of work that should have taken so long without any factor."""
        expected_s = self._shape.expected_s(prompts_s, rest_s)
        if expected_s <= 0 or elapsed_s <= 0:
            return
        before = self._level
        most_s = _MOST_AT_ONCE * expected_s * before
        kept = _FORGET_S / (_FORGET_S + elapsed_s)
        self._seen_s = self._seen_s * kept + min(elapsed_s, most_s)
        self._predicted_s = self._predicted_s * kept + expected_s
        # By neither alone: a long stretch is most of the level after it, and says nothing then.
        now_s = math.sqrt(before * self._level) * expected_s
        self._note_shape(prompts_s / expected_s, rest_s / expected_s, now_s, elapsed_s)
        self.prompts = self._level * self._shape.prompts
        self.decoding = self._level * self._shape.rest
        self._note_usual(elapsed_s)

    def _note_shape(self, prompts: float, rest: float, now_s: float, elapsed_s: float) -> None:
        # One that is far off says more of chance than of prompts.
        took = min(max(elapsed_s / now_s, 1 / _MOST_OFF), _MOST_OFF)
        self._shape.note(prompts, rest, took, now_s)

    def _note_usual(self, elapsed_s: float) -> None:
        if self.usual is None or self.factor < self.usual:
            self.usual = self.factor
        else:
            share = elapsed_s / (_FORGET_USUAL_S + elapsed_s)
            self.usual += share * (self.factor - self.usual)


def _bounded(value: float) -> float:
    return min(max(value, _LEAST_SHAPE), _MOST_SHAPE)
