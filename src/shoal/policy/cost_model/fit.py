"""Constants from measured times: least squares of relative errors, of which large ones count less.

    measured ~ a / eta + b c + d / mfu + e      a, b, d, e: what the model says by itself

Which kernels wait for memory and which for arithmetic depends on eta and mfu, so a, b and d are
made again from what was found, until it stays; from several starts, of which the best is kept.
Knows nothing of where measurements come from.
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
_LEAST_SHARE, _MOST_SHARE = 0.02, 1.2
_MOST_LAYER_S = 0.1


@dataclass(frozen=True, slots=True)
class Observation:
    """A measured time, and what the model makes of it under some constants."""

    measured_s: float
    predict: Predict


def fit(observations: Sequence[Observation], start: Constants) -> Constants:
    """Constants of the kind, engine and precision of `start`.

    `error` of what comes back is the mean relative error over the observations.

    Raises:
        ConfigError: fewer than three observations, or a time that is not more than 0.
    """
    if len(observations) < 3:
        raise ConfigError(
            f"{len(observations)} times were measured; three constants need three at least"
        )
    if any(not 0 < each.measured_s < math.inf for each in observations):
        raise ConfigError("a measured time is not more than 0; leave it out")
    found = [
        _settled(observations, start, replace(start, eta=eta, mfu=mfu))
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
    observations: Sequence[Observation], expected: Constants, constants: Constants
) -> Constants:
    """Improved until it stays: first by all errors alike, since at first most are large."""
    for count in range(_ROUNDS):
        before, plain = constants, math.inf if count < _ROUNDS // 2 else _PLAIN
        constants = _improved(observations, expected, before, plain)
        if (
            count > _ROUNDS // 2
            and math.isclose(constants.eta, before.eta, rel_tol=_SAME)
            and math.isclose(constants.mfu, before.mfu, rel_tol=_SAME)
        ):
            break
    return constants


def _improved(
    observations: Sequence[Observation], expected: Constants, constants: Constants, plain: float
) -> Constants:
    """One linear fit of 1 / eta, c and 1 / mfu; what the times do not tell is as expected."""
    rows, wanted = [], []
    for each in observations:
        time = each.predict(constants)
        off = abs(time.total_s / each.measured_s - 1)
        doubt = math.sqrt(min(1.0, plain / off)) if off else 1.0
        weight = doubt / each.measured_s
        rows.append(
            [
                weight * time.memory_s * constants.eta,
                weight * time.overhead_s / constants.layer_s,
                weight * time.compute_s * constants.mfu,
            ]
        )
        wanted.append(doubt - weight * time.communication_s)
    old = [1 / constants.eta, constants.layer_s, 1 / constants.mfu]
    prior = [1 / expected.eta, expected.layer_s, 1 / expected.mfu]
    for index, value in enumerate(prior):
        share = _PRIOR / max(value, old[index])  # of ten times as much, no more than of a tenth
        rows.append([share if other == index else 0.0 for other in range(3)])
        wanted.append(share * value)
    inverse_eta, layer_s, inverse_mfu = _bounded(rows, wanted, old)
    return replace(constants, eta=1 / inverse_eta, layer_s=layer_s, mfu=1 / inverse_mfu)


def _bounded(rows: list[list[float]], wanted: list[float], old: list[float]) -> list[float]:
    """Least squares inside what can be; what leaves it is set to the edge, and the others again."""
    shares = (1 / _MOST_SHARE, 1 / _LEAST_SHARE)
    bounds = [shares, (1e-9, _MOST_LAYER_S), shares]
    values = list(old)
    free = [0, 1, 2]
    while free:
        left = [
            want - sum(row[index] * values[index] for index in range(3) if index not in free)
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
