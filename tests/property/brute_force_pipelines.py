"""What a pipeline does at its best, with every composition of layers and every batch at once.

    arrays     (batches 1, 2, ..., compositions of layers)

Where one split is quickest in a step and another for a prompt, a stage has both, so that what is
found is the best or better: a plan that is within a hundredth of it is within a hundredth of the
best. The formulas are those of `planner/pipeline.py`, written again.
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
        slo, best = self.goal.slo, 0.0
        for num_batches in self._counts(stages):
            times = self._times(stages, num_batches, role)
            kept = times.tpot_s <= (math.inf if slo.tpot_s is None else slo.tpot_s)
            kept &= np.isfinite(times.tpot_s)
            if role.prompts:
                limit_s = _FAR if slo.ttft_s is None else slo.ttft_s
                kept &= self._ttft_s(stages, times, times.rate_per_s) <= limit_s
            best = max(best, float(times.rate_per_s.max(where=kept, initial=0.0)))
        return min(best, 1 / role.moved_s) if role.moved_s else best

    def started(self, stages: Sequence[Stage]) -> float:
        """Prompts per second; each stage is busy for nine tenths of the time at most."""
        tables = [
            self.group_of(stage[0]).prompt_table(len(stages) + 1, ends) / len(stage)
            for stage, ends in _placed(stages)
        ]
        return 0.9 / float(self._each(tables).max(axis=0).min(initial=math.inf))

    def latencies_s(self, stages: Sequence[Stage], rates: Sequence[float], *, waits: bool) -> Array:
        """The least of a request at each of these rates.

        Args:
            waits: for a place (Sakasegawa's M/M/c), where all that there is memory for are taken.
        """
        best = np.full(len(rates), np.inf)
        for num_batches in self._counts(stages):
            times = self._times(stages, num_batches, Role())
            for index, rate in enumerate(rates):
                arrivals = np.minimum(times.rate_per_s, rate)
                took_s = self._ttft_s(stages, times, arrivals)
                took_s = took_s + (self.goal.output_tokens - 1) * times.tpot_s
                found = np.where(times.rate_per_s >= rate, took_s, np.inf).min(axis=0)
                if waits and rate:
                    found = found + self._wait_s(times, took_s, rate, num_batches)
                best[index] = min(best[index], found.min(initial=np.inf))
        return best

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
        goal = self.goal
        own, way, prompts, alone = [], [], [], []
        for stage, ends in _placed(stages):
            group = self.group_of(stage[0])
            tables = group.tables(goal, num_batches, len(stage), ends, role.prompts)
            own.append(tables.own / len(stage))
            way.append(tables.way)
            prompts.append(tables.prompt)
            alone.append(tables.prompt / len(stage))
        batches = np.arange(1, goal.max_concurrency // num_batches + 1)[:, None]
        path_s = self._each(way).sum(axis=0)
        hops_s = np.array([[self.hops_s(stages, int(batch))] for (batch,) in batches])
        slowest_s = self._each(own).max(axis=0)
        tpot_s = np.maximum(path_s + hops_s, num_batches * slowest_s)
        tpot_s = tpot_s + role.moved_s / (goal.output_tokens - 1)
        passing = np.minimum(self._each(prompts), _FAR)
        chunks = max(1.0, goal.input_tokens / _CHUNK)
        return Times(
            path_s=path_s,
            tpot_s=tpot_s,
            rate_per_s=num_batches * batches / (goal.output_tokens * tpot_s),
            through_s=passing.sum(axis=0) / chunks + passing.max(axis=0) * (1 - 1 / chunks),
            slowest_s=self._each(alone).max(axis=0),
        )

    def _ttft_s(self, stages: Sequence[Stage], times: Times, arrivals: Array) -> Array:
        """Without the wait for a place; infinite where prompts alone are too many."""
        with np.errstate(invalid="ignore"):
            busy = np.nan_to_num(arrivals * times.slowest_s, nan=np.inf, posinf=np.inf)
        free = np.maximum(1 - busy, _LEAST_S)
        with np.errstate(invalid="ignore", over="ignore"):
            wait_s = np.where(busy < 1, busy * times.slowest_s / (2 * free), np.inf)
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
