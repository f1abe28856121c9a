"""The policy that predicts: a request goes where it does best, and least harm to others.

    TTFT   what waits there + its own prompt, less what is cached + a seat and room for its KV
    TPOT   a Step with one more sequence, and what prompts take of the time

    cost of both        share of its target; beyond 0.7 of that, steeply more
    harm                what those that run there, and those that will come, lose of theirs

A replica that lets an expected first token wait counts as slow as it has been late so far. One
that looks bad and is idle gets one of many requests, to see whether it still is. Knows nothing of
how numbers are come by.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from shoal.policy.routing.fleet import FEW, Ask, Fleet, Floats, Numbers, Row
from shoal.policy.routing.standing import KNEE, STEEPNESS

Value = TypeVar("Value", Floats, float)

_PROBE_ONE_OF = 50
_PROBE_TOKENS = 2048
_MOST_IN_VAIN = 4
"""Times as many replicas as a request may go to: so far, looking at all takes less than picking."""


class Prediction(NamedTuple, Generic[Value]):
    """Of one request at each of some replicas, or at one.

    Attributes:
        own_s: that computing its prompt takes; a part of `ttft_s`.
    """

    ttft_s: Value
    tpot_s: Value
    own_s: Value


def predicted(fleet: Fleet, fit: Numbers, ask: Ask, now: float, rng: Random) -> int:
    del rng
    if fleet.num_decided - fleet.num_at_probe >= _PROBE_ONE_OF and ask.num_tokens <= _PROBE_TOKENS:
        probes_s = fleet.rows[Row.PROBE][fit]
        due = int(probes_s.argmin())
        if probes_s[due] <= now:
            fleet.num_at_probe = fleet.num_decided
            return int(fit[due])
    if len(fit) <= FEW:
        held = [None] * len(fit) if ask.cached is None else ask.cached[fit].tolist()
        columns = zip(fleet.table[:, fit].T.tolist(), held, strict=True)
        totals = [_total(fleet, column, ask, each, now, max) for column, each in columns]
        return int(fit[totals.index(min(totals))])
    if _MOST_IN_VAIN * len(fit) >= fleet.num_replicas:
        return int(fit[_total(fleet, fleet.rows, ask, ask.cached, now, np.maximum)[fit].argmin()])
    cached = None if ask.cached is None else ask.cached[fit]
    rows = list(fleet.table[:, fit])
    return int(fit[_total(fleet, rows, ask, cached, now, np.maximum).argmin()])


def _total(
    fleet: Fleet,
    rows: Sequence[Value],
    ask: Ask,
    cached: Value | None,
    now: float,
    larger: Callable[[Value, Any], Value],
) -> Value:
    """What a request costs itself and others, as shares of targets; as `prediction`."""
    ttft_s, tpot_s, own_s = prediction(rows, ask, cached, now, larger)
    total = _cost(ttft_s / fleet.target_ttft_s, larger) + _cost(
        tpot_s / fleet.target_tpot_s, larger
    )
    total = total + (rows[Row.HARM] + rows[Row.HARM_PER_TOKEN] * ask.num_tokens)
    return total + (rows[Row.HARM_PER_SECOND] + rows[Row.HARM_PER_SQUARE] * own_s) * own_s


def prediction(
    rows: Sequence[Value],
    ask: Ask,
    cached: Value | None,
    now: float,
    larger: Callable[[Value, Any], Value],
) -> Prediction[Value]:
    """
    Args:
        rows: of the table, of some replicas or of one.
        cached: there; None: nothing.
    """
    known = ask.num_tokens
    if cached is None:
        own_s = rows[Row.PER_TOKEN] * known + rows[Row.PER_PAIR] * (known * known / 2)
    else:
        # The last token is computed in any case.
        new = larger(known - cached, 1.0)
        own_s = rows[Row.PER_TOKEN] * new + rows[Row.PER_PAIR] * (new * (known - new / 2))
    missing = larger((known + ask.output_tokens / 2) - rows[Row.ROOM], 0.0)
    ttft_s = larger(rows[Row.FREE] - now, 0.0) + rows[Row.FIXED] + own_s
    ttft_s = ttft_s + larger(missing * rows[Row.PER_MISSING], rows[Row.WAIT])
    slower = larger((now - rows[Row.SINCE]) * rows[Row.DUE], 1.0)
    tpot_s = (rows[Row.GAP] + rows[Row.GAP_PER_TOKEN] * known) * slower
    return Prediction(ttft_s * slower, tpot_s, own_s)


def _cost(shares: Value, larger: Callable[[Value, Any], Value]) -> Value:
    beyond = larger(shares - KNEE, 0.0)
    return shares + STEEPNESS * beyond * beyond
