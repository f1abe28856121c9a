"""What a pipeline does at its best, with every composition of layers and every batch at once.

    arrays     (batches 1, 2, ..., compositions of layers)

Where one split is quickest in a step and another for a prompt, a stage has both, so that what is
found is the best or better: a plan that is within a hundredth of it is within a hundredth of the
best. `paired_latency_s` has one for both, and finds what can be had. The formulas are those of
`planner/pipeline.py`, written again.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from brute_force_groups import Array, Group

from shoal.planner.profiles import Problem
from shoal.policy.cost_model.transport import message_s

Stage = tuple[tuple[str, ...], ...]
"""Devices of each instance; all are alike."""

_CHUNK = 512
_LEAST_S = 1e-12
_FAR = 1e300
"""Seconds: as good as infinite, but a number."""


@dataclass(frozen=True, slots=True)
class Role:
    """What replicas do: of every request all, or only what comes after its first token."""

    prompts: bool = True
    moved_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Times:
    """Of all batches and compositions: a token's way without hops, TPOT, requests per second; and
    prompts: through all stages, and in the slowest."""

    path_s: Array
    tpot_s: Array
    rate_per_s: Array
    through_s: Array
    slowest_s: Array


class Pipelines:
    """
    Args:
        group_of: devices, by their names.
    """

    def __init__(self, problem: Problem, group_of: Callable[[tuple[str, ...]], Group]) -> None:
        self.problem, self.goal, self.group_of = problem, problem.goal, group_of
        self._hop_s = cache(self._slowest_message_s)
        self.shares = cache(lambda parts: _compositions(problem.spec.num_layers, parts))

    def peak(self, stages: Sequence[Stage], role: Role) -> float:
        """The most requests per second that keep the SLO."""
        best = 0.0
        for num_batches in self._counts(stages):
            times = self._times(stages, num_batches, role)
            best = max(best, float(self._carried(stages, times, num_batches, role).max(initial=0)))
        return min(best, 1 / role.moved_s) if role.moved_s else best

    def _carried(
        self, stages: Sequence[Stage], times: Times, num_batches: int, role: Role
    ) -> Array:
        """Requests per second of each batch and column, with places for bunches; 0: late."""
        slo = self.goal.slo
        kept = times.tpot_s <= (math.inf if slo.tpot_s is None else slo.tpot_s)
        kept &= np.isfinite(times.tpot_s)
        carried = times.rate_per_s * self._shares_in_use(num_batches)
        if role.prompts:
            limit_s = _FAR if slo.ttft_s is None else slo.ttft_s
            kept &= self._ttft_s(stages, times, carried, late=True) <= limit_s
        return np.where(kept, carried, 0.0)

    def started(self, stages: Sequence[Stage]) -> float:
        """Prompts per second, one after another; they keep it busy for nine tenths of the time."""
        tables = [
            self.group_of(stage[0]).prompt_table(len(stages) + 1, ends) / len(stage)
            for stage, ends in _placed(stages)
        ]
        return 0.9 / float(self._each(tables).sum(axis=0).min(initial=math.inf))

    def latencies_s(self, stages: Sequence[Stage], rates: Sequence[float]) -> Array:
        """The least of a request at each of these rates, within the SLO."""
        best = np.full(len(rates), np.inf)
        for num_batches in self._counts(stages):
            times = self._times(stages, num_batches, Role())
            for index, rate in enumerate(rates):
                found = self._latency_s(stages, times, rate, num_batches)
                best[index] = min(best[index], found.min(initial=np.inf))
        return best

    def paired_latency_s(self, stages: Sequence[Stage], rate: float) -> float:
        """The same with one split of each stage for steps and for prompts; only compositions for
        which what `latencies_s` counts is less than the best are looked at."""
        best = math.inf
        compositions = self.shares(len(stages))
        for num_batches in self._counts(stages):
            times = self._times(stages, num_batches, Role())
            floors = self._latency_s(stages, times, rate, num_batches)
            for index in np.argsort(floors):
                if floors[index] >= best:
                    break
                own = self._paired_times(stages, compositions[index], num_batches)
                found = self._latency_s(stages, own, rate, num_batches)
                best = min(best, float(found.min(initial=np.inf)))
        return best

    def _latency_s(
        self, stages: Sequence[Stage], times: Times, rate: float, num_batches: int
    ) -> Array:
        """Of each column of the times, with the batch at which it is least; by latency as the
        objective, with the wait for a place where all that there is memory for are taken
        (Sakasegawa's M/M/c)."""
        slo, arrivals = self.goal.slo, np.minimum(times.rate_per_s, rate)
        took_s = self._ttft_s(stages, times, arrivals)
        took_s = took_s + (self.goal.output_tokens - 1) * times.tpot_s
        wait_s = np.zeros(times.path_s.shape[1])
        if rate and self.goal.objective == "latency":
            wait_s = self._wait_s(times, took_s, rate, num_batches)
        kept = times.rate_per_s >= rate
        if slo.tpot_s is not None:
            kept &= times.tpot_s <= slo.tpot_s
        if slo.ttft_s is not None:
            kept &= self._ttft_s(stages, times, arrivals, late=True) + wait_s <= slo.ttft_s
        found = np.where(kept, took_s, np.inf).min(axis=0) + wait_s
        if not rate or self.goal.objective != "latency":
            return np.asarray(found)
        most = self._carried(stages, times, num_batches, Role()).max(axis=0, initial=0.0)
        return np.asarray(np.where(most >= rate, found, np.inf))

    def _wait_s(self, times: Times, took_s: Array, rate: float, num_batches: int) -> Array:
        has_room = np.isfinite(times.tpot_s)
        batches = has_room.sum(axis=0)  # it has room for so many, and for all below
        rows = np.maximum(batches - 1, 0)[None]
        full = np.take_along_axis(times.rate_per_s, rows, 0)[0]
        residence_s = np.take_along_axis(took_s, rows, 0)[0]
        places = np.maximum(batches * num_batches, 1)
        busy = rate / np.maximum(full, _LEAST_S)
        free = np.maximum(1 - busy, _LEAST_S)
        queued = np.minimum(busy, 1.0) ** (np.sqrt(2 * (places + 1)) - 1)
        return np.where((batches > 0) & (busy < 1), residence_s * queued / (places * free), np.inf)

    def _counts(self, stages: Sequence[Stage]) -> range:
        most = min(sum(map(len, stages)), self.goal.max_concurrency)
        return range(1, most + 1)

    def _times(self, stages: Sequence[Stage], num_batches: int, role: Role) -> Times:
        """A column for each composition."""
        tables = [
            self.group_of(stage[0]).tables(self.goal, num_batches, len(stage), ends, role.prompts)
            for stage, ends in _placed(stages)
        ]
        own, way, prompt = (
            self._each([getattr(each, name) for each in tables])
            for name in ("own", "way", "prompt")
        )
        return self._together(stages, num_batches, role, (own, way, prompt))

    def _paired_times(
        self, stages: Sequence[Stage], layers: Sequence[int], num_batches: int
    ) -> Times:
        """A column for each choice of one split in each stage."""
        placed = zip(_placed(stages), layers, strict=True)
        tables = [
            self.group_of(stage[0]).paired(self.goal, num_batches, len(stage), ends, int(count))
            for (stage, ends), count in placed
        ]
        chosen = np.indices([each.own.shape[-1] for each in tables]).reshape(len(tables), -1)
        own, way, prompt = (
            np.stack([getattr(t, name)[..., c] for t, c in zip(tables, chosen, strict=True)])
            for name in ("own", "way", "prompt")
        )
        return self._together(stages, num_batches, Role(), (own, way, prompt))

    def _together(
        self,
        stages: Sequence[Stage],
        num_batches: int,
        role: Role,
        tables: tuple[Array, Array, Array],
    ) -> Times:
        """Of tables (stages, batches, columns): steps, those that wait for prompts, prompts."""
        goal, (own, way, prompts) = self.goal, tables
        sharing = np.array([len(each) for each in stages])[:, None, None]
        batches = np.arange(1, goal.max_concurrency // num_batches + 1)[:, None]
        path_s = way.sum(axis=0)
        hops_s = np.array([[self.hops_s(stages, int(batch))] for (batch,) in batches])
        slowest_s = (own / sharing).max(axis=0)
        tpot_s = np.maximum(path_s + hops_s, num_batches * slowest_s)
        tpot_s = tpot_s + role.moved_s / (goal.output_tokens - 1)
        passing = np.minimum(prompts, _FAR)
        chunks = max(1.0, goal.input_tokens / _CHUNK)
        return Times(
            path_s=path_s,
            tpot_s=tpot_s,
            rate_per_s=num_batches * batches / (goal.output_tokens * tpot_s),
            through_s=passing.sum(axis=0) / chunks + passing.max(axis=0) * (1 - 1 / chunks),
            slowest_s=(prompts / sharing).max(axis=0),
        )

    def _shares_in_use(self, num_batches: int) -> Array:
        """Of seats, on average, so that a Poisson number has one for 95 % of the time."""
        batches = np.arange(1, self.goal.max_concurrency // num_batches + 1)[:, None]
        seats = batches * num_batches
        return np.asarray(np.square((np.sqrt(1.645**2 + 4 * seats) - 1.645) / 2) / seats)

    def _ttft_s(
        self, stages: Sequence[Stage], times: Times, arrivals: Array, *, late: bool = False
    ) -> Array:
        """Without the wait for a place; infinite where prompts alone are too many.

        Args:
            late: not the mean, but what 95 % are below.
        """
        with np.errstate(invalid="ignore"):
            busy = np.nan_to_num(arrivals * times.slowest_s, nan=np.inf, posinf=np.inf)
        free = np.maximum(1 - busy, _LEAST_S)
        with np.errstate(invalid="ignore", over="ignore"):
            over = np.log(np.maximum(busy / 0.05, 1.0)) if late else busy
            wait_s = np.where(busy < 1, over * times.slowest_s / (2 * free), np.inf)
        hop_s = self.hops_s(stages, min(self.goal.input_tokens, _CHUNK))
        last_s = self.group_of(stages[-1][0]).end_s(1)
        found = wait_s + times.through_s + last_s + hop_s + times.path_s / 2
        return np.nan_to_num(found, nan=np.inf, posinf=np.inf)

    def _each(self, tables: Sequence[Array]) -> Array:
        """(stages, ..., compositions): of each stage, with its part of each composition."""
        shares = self.shares(len(tables))
        return np.stack([table[..., shares[:, index]] for index, table in enumerate(tables)])

    def hops_s(self, stages: Sequence[Stage], tokens: float) -> float:
        return sum(self._hop_s(a, b, tokens) for a, b in itertools.pairwise(stages))

    def _slowest_message_s(self, sender: Stage, receiver: Stage, tokens: float) -> float:
        size, link = tokens * self.problem.spec.hidden_size * 2, self.problem.cluster.link
        pairs = itertools.product(itertools.chain(*sender), itertools.chain(*receiver))
        return max(message_s(link(x, y), size) for x, y in pairs)


def _placed(stages: Sequence[Stage]) -> list[tuple[Stage, tuple[bool, bool]]]:
    """Each stage, and whether it has the embedding and the head."""
    last = len(stages) - 1
    return [(each, (index == 0, index == last)) for index, each in enumerate(stages)]


def _compositions(total: int, parts: int) -> Array:
    """All ways to share out a number, none getting nothing: (ways, parts)."""
    edges = itertools.combinations(range(1, total), parts - 1)
    found = [[b - a for a, b in itertools.pairwise((0, *own, total))] for own in edges]
    return np.array(found, dtype=int).reshape(-1, parts)
