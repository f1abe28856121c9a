"""Exhaustive search of plans, written apart from the planner: nested loops over everything.

    replicas    every set of disjoint sets of devices
    pipelines   every ordered partition of a replica's devices into tensor-parallel groups
    layers      every composition, at least one for each stage
    splits      every composition of heads, and of FFN columns in sixteenths, over a group's ranks
    batches     every count of micro-batches up to one for each stage, every batch

Shares with the planner what a split costs and holds (`Variant`), not how the best is looked for.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache

from shoal.core.cluster import Device
from shoal.core.split import Split, cut, stacked
from shoal.planner.profiles import Problem, Variant, numbers_for
from shoal.planner.prompts import moved_s
from shoal.policy.cost_model.transport import message_s

SIXTEENTHS = 16
_MOST_MICRO_BATCHES = 6


class BruteForce:
    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.layers = problem.spec.num_layers
        self.devices = {each.name: each for each in problem.cluster.devices}
        self.variants = cache(self._variants)
        self.option_tables = cache(self._option_tables)

    def most_goodput(self) -> float:
        """Requests per second of the best replicas."""
        best = self._of_all_sets(self._peak)
        return self._packed(frozenset(self.devices), best)

    def most_goodput_with_roles(self) -> float:
        """The same where some devices only start requests, and others only go on with them."""
        names = frozenset(self.devices)
        starting, decoding = self._of_all_sets(self._started), self._of_all_sets(self._decoded)
        best = 0.0
        for count in range(1, len(names)):
            for own in map(frozenset, itertools.combinations(sorted(names), count)):
                started = self._packed(own, starting)
                best = max(best, min(started, self._packed(names - own, decoding)))
        return best

    def _of_all_sets(
        self, rate_of: Callable[[tuple[tuple[str, ...], ...]], float]
    ) -> dict[frozenset[str], float]:
        names = tuple(self.devices)
        return {
            frozenset(own): max(map(rate_of, _pipelines(own)), default=0.0)
            for count in range(1, len(names) + 1)
            for own in itertools.combinations(names, count)
        }

    def _started(self, stages: tuple[tuple[str, ...], ...]) -> float:
        """Prompts per second; each stage is busy for nine tenths of the time at most."""
        tables = []
        for index, own in enumerate(stages):
            table = [math.inf] * (self.layers + 1)
            for each in self.variants(own):
                most = each.most_layers(len(stages) + 1, *_ends(index, stages))
                for n in range(1, most + 1):
                    table[n] = min(table[n], n * each.prompt_layer_s)
            tables.append(table)
        slowest = min(
            (
                max(table[n] for table, n in zip(tables, layers, strict=True))
                for layers in compositions(self.layers, len(stages))
            ),
            default=math.inf,
        )
        return 0.9 / slowest

    def _decoded(self, stages: tuple[tuple[str, ...], ...]) -> float:
        names = {name for own in stages for name in own}
        return self._peak(stages, prompts=False, moved_s=moved_s(self.problem, names))

    def least_latency(self) -> float:
        """Seconds of a request that is alone; prompts are of one chunk."""
        names = tuple(self.devices)
        return min(
            self._alone(stages)
            for count in range(1, len(names) + 1)
            for own in itertools.combinations(names, count)
            for stages in _pipelines(own)
        )

    def _packed(self, names: frozenset[str], best: dict[frozenset[str], float]) -> float:
        if not names:
            return 0.0
        first = min(names)
        rest = names - {first}
        found = self._packed(rest, best)
        for count in range(len(rest) + 1):
            for others in itertools.combinations(sorted(rest), count):
                own = frozenset((first, *others))
                found = max(found, best[own] + self._packed(names - own, best))
        return found

    def _peak(
        self, stages: tuple[tuple[str, ...], ...], prompts: bool = True, moved_s: float = 0.0
    ) -> float:
        goal = self.problem.goal
        late_s = moved_s / (goal.output_tokens - 1)
        best = 0.0
        for micro_batches in range(1, min(len(stages), _MOST_MICRO_BATCHES) + 1):
            for batch in range(1, goal.max_concurrency // micro_batches + 1):
                tables = [
                    self.option_tables(own, micro_batches, batch, _ends(index, stages), prompts)
                    for index, own in enumerate(stages)
                ]
                hops = self._hops(stages, batch)
                for layers in compositions(self.layers, len(stages)):
                    times = [table[n][0] for table, n in zip(tables, layers, strict=True)]
                    ways = [table[n][1] for table, n in zip(tables, layers, strict=True)]
                    tpot = max(sum(ways) + hops, micro_batches * max(times)) + late_s
                    if tpot < math.inf and tpot <= (goal.slo.tpot_s or math.inf):
                        best = max(best, micro_batches * batch / (goal.output_tokens * tpot))
        return min(best, 1 / moved_s) if moved_s else best

    def _alone(self, stages: tuple[tuple[str, ...], ...]) -> float:
        goal = self.problem.goal
        hops = self._hops(stages, 1)
        prompt = self._hops(stages, goal.input_tokens)
        best = math.inf
        tables = []
        for index, own in enumerate(stages):
            ends, table = _ends(index, stages), [math.inf]
            for n in range(1, self.layers + 1):
                # Tokens after the first, half a step that was under way, the prompt, the head.
                costs = [
                    (goal.output_tokens - 0.5)
                    * (
                        n * (each.layer_s(1) + each.prompt_layer_s / goal.output_tokens)
                        + (each.end_s(1) if ends[1] else 0.0)
                    )
                    + n * each.prompt_layer_s
                    + (each.end_s(1) if ends[1] else 0.0)
                    for each in self.variants(own)
                    if each.most_layers(1, *ends) >= n
                ]
                table.append(min(costs, default=math.inf))
            tables.append(table)
        for layers in compositions(self.layers, len(stages)):
            total = sum(table[n] for table, n in zip(tables, layers, strict=True))
            best = min(best, total + (goal.output_tokens - 1) * hops + prompt)
        return best

    def _option_tables(
        self,
        own: tuple[str, ...],
        micro_batches: int,
        batch: int,
        ends: tuple[bool, bool],
        with_prompts: bool,
    ) -> list[tuple[float, float]]:
        """Seconds of a step by layers, and of its way behind prompts of the others; each with the
        best split that has room for them."""
        goal = self.problem.goal
        prompts = batch / goal.output_tokens if with_prompts else 0.0
        # A chunk of up to 512 tokens in any of the steps under way is in the way of all.
        chunk = 1 - math.exp(-512 / goal.input_tokens)
        met = max(prompts, chunk * (1 - max(1 - prompts, 0) ** micro_batches))
        table = [(math.inf, math.inf)] * (self.layers + 1)
        for each in self.variants(own):
            fixed = each.end_s(batch) if ends[1] else each.step_s
            decode_s, prompt_s = each.layer_s(batch), each.prompt_layer_s
            for n in range(1, each.most_layers(micro_batches * batch, *ends) + 1):
                own_s = n * (decode_s + prompts * prompt_s) + fixed
                way_s = n * (decode_s + met * prompt_s) + fixed
                table[n] = min(table[n][0], own_s), min(table[n][1], way_s)
        return table

    def _variants(self, own: tuple[str, ...]) -> tuple[Variant, ...]:
        spec, goal = self.problem.spec, self.problem.goal
        devices = [self.devices[each] for each in own]
        numbers = numbers_for(devices, goal.precisions[0], goal.kv_precision)
        if numbers is None:
            return ()
        unit = spec.ffn_size // SIXTEENTHS
        vocab = cut(spec.vocab_size, [_rate(each) for each in devices], 16)
        return tuple(
            Variant(
                self.problem,
                devices,
                Split(heads=stacked(heads), ffn=stacked(n * unit for n in columns), vocab=vocab),
                numbers,
            )
            for heads in _shares(spec.num_heads, len(own))
            for columns in _shares(SIXTEENTHS, len(own))
        )

    def _hops(self, stages: Sequence[tuple[str, ...]], tokens: float) -> float:
        size = tokens * self.problem.spec.hidden_size * 2
        cluster = self.problem.cluster
        return sum(
            max(message_s(cluster.link(x, y), size) for x in a for y in b)
            for a, b in itertools.pairwise(stages)
        )


def _pipelines(names: Sequence[str]) -> Iterator[tuple[tuple[str, ...], ...]]:
    """Ordered partitions."""
    if not names:
        yield ()
        return
    for count in range(1, len(names) + 1):
        for first in itertools.combinations(names, count):
            left = [each for each in names if each not in first]
            for rest in _pipelines(left):
                yield (first, *rest)


def compositions(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    """All ways to share out a number, none getting nothing."""
    for edges in itertools.combinations(range(1, total), parts - 1):
        yield tuple(b - a for a, b in itertools.pairwise((0, *edges, total)))


def _shares(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    if parts == 1:
        yield (total,)
        return
    for first in range(total + 1):
        for rest in _shares(total - first, parts - 1):
            yield (first, *rest)


def _ends(index: int, stages: Sequence[object]) -> tuple[bool, bool]:
    return index == 0, index == len(stages) - 1


def _rate(device: Device) -> float:
    return device.bandwidth_bytes_per_s * device.speed
