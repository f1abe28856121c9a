"""Which replicas could begin a new request soon, were it sent there now.

    waits         for less than a share of the TTFT to be kept, or than others have waited for a
                  replica; or its pipeline is not full. Only the policy that predicts asks for this
    TPOT          those that run there keep it, one more of them too; the same
    seats, KV     there are some
    or            it has nothing at all

Worked out for all of a fleet at once, and kept until something happens: with every request it is
asked several times. Of a few replicas one by one, which is faster than arrays. Knows nothing of who
chooses among them.
"""

from __future__ import annotations

import numpy as np

from shoal.core.latency import Slo
from shoal.core.stats import EngineInfo
from shoal.policy.routing.fleet import FEW, Ask, Fleet, Floats, Numbers, Row
from shoal.policy.routing.predicted import Prediction, prediction
from shoal.policy.routing.standing import Standing
from shoal.router.loads import Loads

_SOON = 0.3
"""Of the TTFT that is to be kept: so long may prompts wait at a replica while others wait here."""
_TIMES_WAITED = 2.0
"""The same, of what those here have waited: steps with more prompts carry more."""
_SEATS_PER_CREDIT = 16
_UNPROVEN = 2
"""Prompts at once for who has shown nothing yet, where a TTFT is to be kept."""


class Vacancies:
    """
    Args:
        fleet, loads: the router's.
        predicts: whether seconds are known; otherwise seats and KV are all that counts.
    """

    def __init__(self, slo: Slo | None, fleet: Fleet, loads: Loads, *, predicts: bool) -> None:
        self._slo, self._fleet, self._loads = slo, fleet, loads
        self._predicts, self._waited_s = predicts, 0.0
        num = fleet.num_replicas
        # What waits at each, by how fast prompts lately went there.
        self._waits_s = np.zeros(num)
        self._seen_token_s = np.zeros(num)
        # Tokens of prompts that wait at each, and below which a pipeline is not full.
        self._queued = np.zeros(num)
        self._filling = np.zeros(num)
        # When streams there have tokens as fast as is to be kept.
        self._tpot_s = None if slo is None or not predicts else slo.tpot_s
        self._keeps_from_s = np.zeros(num)
        # Requests that each may have: as many as run there, and a few that come next.
        self._places = np.ones(num)
        self._seats = np.ones(num)
        self._num_changes = 0
        nobody = Prediction(np.zeros(num), np.zeros(num), np.zeros(num))
        # Of a request, at a time, after so many changes.
        self._foreseen: tuple[Ask | None, float, int, Prediction[Floats]] = None, 0.0, 0, nobody
        self._found: tuple[tuple[float, int, int], list[bool] | np.ndarray] | None = None
        self._among: tuple[np.ndarray, Numbers, Numbers] | None = None

    def ready(self, number: int, info: EngineInfo) -> None:
        """A replica can take requests."""
        self._seats[number] = info.max_num_seqs + max(info.max_num_seqs // _SEATS_PER_CREDIT, 1)
        self._filling[number] = info.filling_tokens

    def renew(self, number: int, standing: Standing) -> None:
        """Something happened to a replica; the fleet knows already."""
        self._seen_token_s[number] = seen_token_s = standing.seen_token_s
        self._waits_s[number] = seen_token_s * standing.queued
        self._queued[number] = standing.queued
        if self._tpot_s is not None:
            self._keeps_from_s[number] = standing.keeps_from_s(self._tpot_s)
        self._places[number] = self._seats[number]
        if self._slo is not None and self._slo.ttft_s is not None and standing.is_unproven:
            self._places[number] = min(standing.begun + _UNPROVEN, self._seats[number])
        self._num_changes += 1

    def waited(self, seconds: float) -> None:
        """So long has the request that waits here longest."""
        if seconds != self._waited_s:
            self._waited_s = seconds
            self._num_changes += 1

    def among(self, fit: Numbers, now: float) -> Numbers:
        """Those that could, of some."""
        is_free = self._is_free(now)
        if isinstance(is_free, list):
            found = [number for number in fit.tolist() if is_free[number]]
            return fit if len(found) == len(fit) else np.array(found, dtype=int)
        # With every request this is asked several times, of the same.
        if self._among is None or self._among[0] is not is_free or self._among[1] is not fit:
            self._among = is_free, fit, fit[is_free[fit]]
        return self._among[2]

    def soonest_s(self, fit: Numbers, ask: Ask, now: float) -> float:
        """The shortest predicted TTFT at some replicas; there is one."""
        return float(self._expected(ask, now).ttft_s[fit].min())

    def in_time(self, fit: Numbers, ask: Ask, left_s: float, now: float) -> Numbers:
        """Those of some where a request gets its first token within `left_s`; if that is nowhere,
        where it comes first."""
        ttft_s = self._expected(ask, now).ttft_s[fit]
        return fit[ttft_s <= max(left_s, float(ttft_s.min()))]

    def _expected(self, ask: Ask, now: float) -> Prediction[Floats]:
        """At all replicas, by how they stand and by how fast prompts lately went there."""
        known, when, num_changes, found = self._foreseen
        if known is not ask or (when, num_changes) != (now, self._num_changes):
            found = prediction(self._fleet.rows, ask, ask.cached, now, np.maximum)
            found = found._replace(ttft_s=np.maximum(found.ttft_s, self._seen_ttft_s(ask)))
            self._foreseen = ask, now, self._num_changes, found
        return found

    def _seen_ttft_s(self, ask: Ask) -> Floats:
        """At each replica, by how fast prompts lately went there; 0: none did."""
        new = ask.num_tokens if ask.cached is None else np.maximum(ask.num_tokens - ask.cached, 1)
        return self._waits_s + new * self._seen_token_s

    def _is_free(self, now: float) -> list[bool] | np.ndarray:
        """Of each replica of the fleet."""
        moment = now, self._num_changes, self._loads.num_changes
        if self._found is None or self._found[0] != moment:
            is_few = self._fleet.num_replicas <= FEW
            self._found = moment, self._one_by_one(now) if is_few else self._at_once(now)
        return self._found[1]

    def _longest_s(self) -> float:
        """That a request may wait at a replica."""
        if not self._predicts:
            return np.inf
        return max(_SOON * self._fleet.target_ttft_s, _TIMES_WAITED * self._waited_s)

    def _at_once(self, now: float) -> np.ndarray:
        rows, counts = self._fleet.rows, self._loads.counts
        waits_s = np.maximum(rows[Row.FREE] - now, self._waits_s)
        is_free = waits_s <= self._longest_s()
        is_free |= self._queued < self._filling
        is_free &= counts < self._places
        is_free &= rows[Row.ROOM] > 0
        is_free &= self._keeps_from_s <= now
        is_free |= counts == 0
        return is_free

    def _one_by_one(self, now: float) -> list[bool]:
        rows, longest_s = self._fleet.rows, self._longest_s()
        each = zip(
            self._loads.counts.tolist(),
            self._places.tolist(),
            rows[Row.FREE].tolist(),
            self._waits_s.tolist(),
            self._queued.tolist(),
            self._filling.tolist(),
            rows[Row.ROOM].tolist(),
            self._keeps_from_s.tolist(),
            strict=True,
        )
        return [
            count == 0
            or (
                count < places
                and room > 0
                and keeps_from_s <= now
                and (max(free_s - now, waits_s) <= longest_s or queued < filling)
            )
            for count, places, free_s, waits_s, queued, filling, room, keeps_from_s in each
        ]
