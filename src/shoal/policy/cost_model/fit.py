"""Constants from measured times: least squares of relative errors, of which large ones count less.

    measured ~ a / eta + b c + d / mfu + e      a, b, d, e: what the model says by itself
               (+ f step + g row + h / attention + i exposed, where those are wanted too)

Which kernels wait for memory and which for arithmetic depends on eta and mfu, so a, b and d (how
what is predicted grows with each) are made again from what was found, until it stays; from several
starts, of which the best is kept. Knows nothing of where measurements come from.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from shoal.core.cluster import Constants
from shoal.core.errors import ConfigError
from shoal.policy.cost_model.times import StepTime

Predict = Callable[[Constants], StepTime]

_ROUNDS, _SAME = 12, 1e-4
_STARTS = (0.9, 0.3)
_PRIOR = 0.1
"""What the start counts for, beside times: one of them that is ten times less sure. Of answers of
8,192 tokens, prefill is too small a part to tell mfu by."""

_PLAIN = 0.05
"""Relative errors beyond this count by themselves, not by their squares (Huber, 1964)."""
_SHARES = (1 / 1.2, 1 / 0.02)
_NUDGE = 1e-3
_NUMBERS = {3: "three", 7: "seven"}


@dataclass(frozen=True, slots=True)
class _Unknown:
    """A constant that times are straight lines in: itself, or of a share its inverse."""

    name: str
    low: float
    high: float
    is_share: bool = False
    usual: float = 1.0
    doubt: float = 0.0  # it may well be that much

    def of(self, constants: Constants) -> float:
        value: float | None = getattr(constants, self.name)
        if value is None or value <= 0:
            return self.usual
        return 1 / value if self.is_share else value


_THREE = (
    _Unknown("eta", *_SHARES, is_share=True),
    _Unknown("layer_s", 1e-9, 0.1),
    _Unknown("mfu", *_SHARES, is_share=True),
)
# Of one device they also make up for rates that were measured too low.
_OWN_SHARES = (1 / 4.0, 1 / 0.01)
_ALL = (
    _Unknown("eta", *_OWN_SHARES, is_share=True),
    _Unknown("layer_s", 1e-9, 0.1, doubt=1e-3),
    _Unknown("mfu", *_OWN_SHARES, is_share=True),
    _Unknown("step_s", 1e-9, 1.0, usual=1e-4, doubt=5e-3),
    _Unknown("row_s", 1e-9, 0.1, usual=1e-5, doubt=1e-3),
    _Unknown("attention", 1 / 4.0, 1e4, is_share=True, usual=4.0),
    _Unknown("exposed", 1e-6, 1.0, usual=0.5, doubt=0.5),
)

NUM_ALL = len(_ALL)


@dataclass(frozen=True, slots=True)
class Observation:
    """A measured time, and what the model makes of it under some constants.

    `weight`: it counts as so many.
    """

    measured_s: float
    predict: Predict
    weight: float = 1.0


def fit(observations: Sequence[Observation], start: Constants, *, every: bool = False) -> Constants:
    """Constants of the kind, engine and precision of `start`.

    `error` of what comes back is the mean relative error over the observations.

    Args:
        every: also what a Step and a row cost, and attention's share of the flops, which times of
            Steps at several sizes tell apart and times of whole answers do not.

    Raises:
        ConfigError: fewer observations than constants, or a time that is not more than 0.
    """
    unknowns = _ALL if every else _THREE
    if len(observations) < len(unknowns):
        raise ConfigError(
            f"{len(observations)} times were measured; {_NUMBERS[len(unknowns)]} constants need "
            f"{_NUMBERS[len(unknowns)]} at least"
        )
    if any(not 0 < each.measured_s < math.inf for each in observations):
        raise ConfigError("a measured time is not more than 0; leave it out")
    found = [
        _settled(observations, unknowns, start, replace(start, eta=eta, mfu=mfu))
        for eta, mfu in ((start.eta, start.mfu), *itertools.product(_STARTS, _STARTS))
    ]
    errors = [(mean_error(observations, each), index) for index, each in enumerate(found)]
    error, best = min(errors)
    return replace(found[best], error=error)


def mean_error(observations: Sequence[Observation], constants: Constants) -> float:
    """Mean of |predicted - measured| / measured."""
    errors = [abs(each.predict(constants).total_s / each.measured_s - 1) for each in observations]
    return sum(errors) / len(errors)


def _settled(
    observations: Sequence[Observation],
    unknowns: Sequence[_Unknown],
    expected: Constants,
    constants: Constants,
) -> Constants:
    """Improved until it stays: first by all errors alike, since at first most are large."""
    prior = [each.of(expected) for each in unknowns]
    values = [each.of(constants) for each in unknowns]
    for count in range(_ROUNDS):
        before, plain = values, math.inf if count < _ROUNDS // 2 else _PLAIN
        values = _improved(observations, unknowns, expected, prior, before, plain)
        if count > _ROUNDS // 2 and all(
            math.isclose(new, old, rel_tol=_SAME) for new, old in zip(values, before, strict=True)
        ):
            break
    return _under(expected, unknowns, values)


def _under(
    constants: Constants, unknowns: Sequence[_Unknown], values: Sequence[float]
) -> Constants:
    given = {
        each.name: 1 / value if each.is_share else value
        for each, value in zip(unknowns, values, strict=True)
    }
    return replace(constants, **given)  # type: ignore[arg-type]


def _improved(
    observations: Sequence[Observation],
    unknowns: Sequence[_Unknown],
    expected: Constants,
    prior: Sequence[float],
    values: Sequence[float],
    plain: float,
) -> list[float]:
    """One linear fit; what the times do not tell is as expected."""
    now = _under(expected, unknowns, values)
    nudged = [
        _under(expected, unknowns, [*values[:n], values[n] * (1 + _NUDGE), *values[n + 1 :]])
        for n in range(len(unknowns))
    ]
    rows, wanted = [], []
    for each in observations:
        total = each.predict(now).total_s
        off = abs(total / each.measured_s - 1)
        doubt = math.sqrt(min(1.0, plain / off)) if off else 1.0
        doubt *= math.sqrt(each.weight)
        weight = doubt / each.measured_s
        slopes = [
            (each.predict(other).total_s - total) / (value * _NUDGE)
            for other, value in zip(nudged, values, strict=True)
        ]
        fixed = total - sum(a * b for a, b in zip(slopes, values, strict=True))
        rows.append([weight * slope for slope in slopes])
        wanted.append(doubt - weight * fixed)
    for index, value in enumerate(prior):
        # Of ten times as much, no more than of a tenth.
        share = _PRIOR / max(value, values[index], unknowns[index].doubt)
        rows.append([share if other == index else 0.0 for other in range(len(prior))])
        wanted.append(share * value)
    return _bounded(rows, wanted, values, [(each.low, each.high) for each in unknowns])


def _bounded(
    rows: list[list[float]],
    wanted: list[float],
    old: Sequence[float],
    bounds: Sequence[tuple[float, float]],
) -> list[float]:
    """Least squares inside what can be; what leaves it is set to the edge, and the others again."""
    values = list(old)
    free = list(range(len(bounds)))
    while free:
        left = [
            want - sum(row[n] * values[n] for n in range(len(bounds)) if n not in free)
            for row, want in zip(rows, wanted, strict=True)
        ]
        found = _least_squares([[row[index] for index in free] for row in rows], left)
        outside = [
            (index, low if value < low else high)
            for index, value in zip(free, found, strict=True)
            for low, high in [bounds[index]]
            if not low <= value <= high
        ]
        if not outside:
            for index, value in zip(free, found, strict=True):
                values[index] = value
            break
        for index, edge in outside:
            values[index] = edge
            free.remove(index)
    return values


def _least_squares(rows: list[list[float]], wanted: list[float]) -> list[float]:
    """By the normal equations, of scaled columns; every column has a row of its own."""
    count = len(rows[0])
    norms = [math.sqrt(sum(row[index] ** 2 for row in rows)) for index in range(count)]
    scaled = [[value / norm for value, norm in zip(row, norms, strict=True)] for row in rows]
    matrix = [[sum(row[i] * row[j] for row in scaled) for j in range(count)] for i in range(count)]
    right = [
        sum(row[i] * want for row, want in zip(scaled, wanted, strict=True)) for i in range(count)
    ]
    return [value / norm for value, norm in zip(_solved(matrix, right), norms, strict=True)]


def _solved(matrix: list[list[float]], right: list[float]) -> list[float]:
    """Gauss, with the largest pivot; positive definite, so there is one."""
    size = len(right)
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    for column in range(size):
        pivot = max(range(column, size), key=lambda index: abs(rows[index][column]))
        rows[column], rows[pivot] = rows[pivot], rows[column]
        for index in range(column + 1, size):
            factor = rows[index][column] / rows[column][column]
            rows[index] = [a - factor * b for a, b in zip(rows[index], rows[column], strict=True)]
    values = [0.0] * size
    for index in reversed(range(size)):
        known = sum(rows[index][other] * values[other] for other in range(index + 1, size))
        values[index] = (rows[index][size] - known) / rows[index][index]
    return values
