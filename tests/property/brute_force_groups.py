"""Every split of a tensor-parallel group, as arrays: what a layer takes, and how many have room.

    entries    every composition of heads over ranks x every one of FFN columns in sixteenths
    tables     by batch and by layers of a stage: the least of any entry that has room for them

A rank's times and bytes depend on its heads and its columns alone, so they are worked out once for
each of these and looked up; an entry is as slow as its slowest rank and holds what its fullest one
holds. Written from the cost model, apart from the planner's own `Variant`, with which a test
compares it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from shoal.core.cluster import Device, Precision
from shoal.core.split import Range, Shard, Split, cut, shards, stacked
from shoal.core.step import BLOCK_SIZE
from shoal.planner.formats import numbers_for
from shoal.planner.goal import Goal
from shoal.planner.profiles import Problem
from shoal.policy.cost_model.constants import constants_for
from shoal.policy.cost_model.loads import StepLoad
from shoal.policy.cost_model.memory import activation_bytes, kv_token_bytes, weight_bytes
from shoal.policy.cost_model.numbers import Numbers
from shoal.policy.cost_model.times import InstanceCost, Rates, rank_time
from shoal.policy.cost_model.work import shard_work

SIXTEENTHS = 16
_STEP_TOKENS = 2048

_CHUNK = 512
_WEIGHTS = (0.0, 0.3, 0.6, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 20.0, 50.0, 1e6)
"""Of a prompt for each request, where splits are told apart."""

Ends = tuple[bool, bool]
Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Tables:
    """Seconds by batch (1, 2, ...) and layers (0, ..., all); infinite where there is no room: of a
    step, of one that waits for prompts of others, of a prompt."""

    own: Array
    way: Array
    prompt: Array


class Group:
    """Devices of one instance, the fastest first; all precisions that they may have."""

    def __init__(self, problem: Problem, devices: Sequence[Device]) -> None:
        goal = problem.goal
        self.devices = tuple(sorted(devices, key=lambda each: (-_rate(each), each.name)))
        known = ((p, numbers_for(self.devices, p, goal.kv_precision)) for p in goal.precisions)
        self.ways = tuple(
            Ways(problem, self.devices, p, numbers) for p, numbers in known if numbers is not None
        )
        self._tables: dict[tuple[object, ...], Tables] = {}

    def tables(
        self, goal: Goal, num_batches: int, num_instances: int, ends: Ends, has_prompts: bool
    ) -> Tables:
        """As one of so many instances of a stage; a prompt has room beside the batch."""
        key = num_batches, num_instances, ends, has_prompts
        if key not in self._tables:
            sharing = max(num_batches / num_instances, 1.0)
            own, way, alone = [], [], []
            for batch in range(1, goal.max_concurrency // num_batches + 1):
                held = -(-num_batches * batch // num_instances)
                prompts, met = _met(goal, batch, sharing) if has_prompts else (0.0, 0.0)
                own.append(self._least(each.step(batch, held, ends, prompts) for each in self.ways))
                way.append(self._least(each.step(batch, held, ends, met) for each in self.ways))
                alone.append(self.prompt_table(held, ends))
            self._tables[key] = Tables(np.array(own), np.array(way), np.array(alone))
        return self._tables[key]

    def paired(
        self, goal: Goal, num_batches: int, num_instances: int, ends: Ends, num_layers: int
    ) -> Tables:
        """Of so many layers, by batch and by split: each that is the least of all at a batch, at
        some weight of prompts."""
        key = num_batches, num_instances, ends, num_layers, "paired"
        if key not in self._tables:
            sharing = max(num_batches / num_instances, 1.0)
            batches = range(1, goal.max_concurrency // num_batches + 1)
            found = [
                each.paired(
                    [
                        (n, -(-num_batches * n // num_instances), *_met(goal, n, sharing))
                        for n in batches
                    ],
                    ends,
                    num_layers,
                )
                for each in self.ways
            ]
            own, way, prompt = (np.concatenate(each, axis=1) for each in zip(*found, strict=True))
            self._tables[key] = Tables(own, way, prompt)
        return self._tables[key]

    def prompt_table(self, num_sequences: int, ends: Ends) -> Array:
        """Seconds of a prompt, by layers."""
        return self._least(each.prompt(num_sequences, ends) for each in self.ways)

    def end_s(self, batch: int) -> float:
        """Of the head, and of any step."""
        return min(each.end_s(batch) for each in self.ways)

    @staticmethod
    def _least(tables: Iterable[Array]) -> Array:
        return np.asarray(np.minimum.reduce(list(tables)))


class Ways:
    """All splits of a group in one precision."""

    def __init__(
        self, problem: Problem, devices: Sequence[Device], precision: Precision, numbers: Numbers
    ) -> None:
        self.problem, self.devices, self.numbers = problem, devices, numbers
        self.spec = problem.spec
        self.num_layers = problem.spec.num_layers
        self.rates = [
            Rates.of(each, constants_for(problem.cluster, each, problem.engine, precision), numbers)
            for each in devices
        ]
        self.heads = list(compositions(self.spec.num_heads, len(devices)))
        columns = 1 if len(devices) == 1 else SIXTEENTHS
        self.unit = self.spec.ffn_size // columns
        self.columns = np.array(list(compositions(columns, len(devices))))
        self.split = Split(
            heads=stacked(self.heads[0]),
            ffn=stacked(int(each) * self.unit for each in self.columns[0]),
            vocab=cut(self.spec.vocab_size, [_rate(each) for each in devices], 16),
        )
        self.step_s = max(each.step_s for each in self.rates)
        self._layer_s: dict[int, Array] = {}
        self._end_s: dict[int, float] = {}
        self._rooms: dict[tuple[int, Ends], Array] = {}
        self._tables: dict[tuple[object, ...], Array] = {}

    def paired(
        self, loads: Sequence[tuple[int, int, float, float]], ends: Ends, num_layers: int
    ) -> tuple[Array, Array, Array]:
        """Seconds of steps, of those that wait for prompts, and of a prompt: (loads, splits).

        Args:
            loads: a batch, sequences that there is room for, prompts in a step, and in its way.
        """
        chosen: set[int] = set()
        for batch, held, *_ in loads:
            fits = self.room(held, ends) >= num_layers
            if fits.any():
                for weight in _WEIGHTS:
                    cost = (
                        self.layer_s(batch)
                        + weight / self.problem.goal.output_tokens * self.prompt_s
                    )
                    chosen.add(int(np.where(fits, cost, np.inf).argmin()))
        index = np.array(sorted(chosen), dtype=int)
        own: list[Array] = []
        way: list[Array] = []
        alone: list[Array] = []
        for batch, held, prompts, met in loads:
            fits = self.room(held, ends)[index] >= num_layers
            fixed = self.end_s(batch) if ends[1] else self.step_s
            step_s, prompt_s = self.layer_s(batch)[index], self.prompt_s[index]
            for seconds, table in (
                (step_s + prompts * prompt_s, own),
                (step_s + met * prompt_s, way),
            ):
                table.append(np.where(fits, num_layers * seconds + fixed, np.inf))
            alone.append(np.where(fits, num_layers * prompt_s, np.inf))
        return np.array(own), np.array(way), np.array(alone)

    def step(self, batch: int, num_sequences: int, ends: Ends, prompts: float) -> Array:
        key = batch, num_sequences, ends, prompts
        if key not in self._tables:
            seconds = self.layer_s(batch) + prompts * self.prompt_s
            fixed = self.end_s(batch) if ends[1] else self.step_s
            counts = np.arange(self.num_layers + 1)
            self._tables[key] = counts * self._by_room(seconds, num_sequences, ends) + fixed
        return self._tables[key]

    def prompt(self, num_sequences: int, ends: Ends) -> Array:
        key = num_sequences, ends
        if key not in self._tables:
            counts = np.arange(self.num_layers + 1)
            self._tables[key] = counts * self._by_room(self.prompt_s, num_sequences, ends)
        return self._tables[key]

    def layer_s(self, batch: int) -> Array:
        """Of a decode step, for each layer."""
        if batch not in self._layer_s:
            self._layer_s[batch] = self._of_layer(self.problem.decode(batch))
        return self._layer_s[batch]

    @cached_property
    def prompt_s(self) -> Array:
        return self._of_layer(self.problem.prompt())

    def end_s(self, batch: int) -> float:
        """Of embedding and head, and of any step."""
        if batch not in self._end_s:
            nothing = Range(self.num_layers, self.num_layers)
            cost = self._cost(nothing, has_ends=True)
            self._end_s[batch] = cost.time(self.problem.decode(batch)).total_s
        return self._end_s[batch]

    def room(self, num_sequences: int, ends: Ends) -> Array:
        """Layers that fit beside the KV of so many sequences, or of the longest one."""
        key = num_sequences, ends
        if key not in self._rooms:
            whole = -(-round(self.problem.goal.context_tokens) // BLOCK_SIZE) * BLOCK_SIZE
            tokens = max(num_sequences * whole, self.problem.goal.longest_tokens)
            most = [self._rank_room(rank, tokens, ends) for rank in range(len(self.devices))]
            self._rooms[key] = np.minimum(self._combined(most, np.minimum), self.num_layers)
        return self._rooms[key]

    def _by_room(self, seconds: Array, num_sequences: int, ends: Ends) -> Array:
        room = self.room(num_sequences, ends)
        least = np.full(self.num_layers + 1, np.inf)
        for count in range(1, self.num_layers + 1):
            least[count] = seconds.min(where=room >= count, initial=np.inf)
        least[0] = 0.0
        return least

    def _of_layer(self, load: StepLoad) -> Array:
        def of_rank(rank: int) -> list[Array]:
            def total_s(shard: Shard) -> float:
                work = shard_work(self.spec, shard, self.numbers)
                return rank_time(work, self.rates[rank], load).total_s

            return self._looked_up(rank, total_s)

        parts = [of_rank(rank) for rank in range(len(self.devices))]
        together = self._cost(Range(0, self.num_layers), has_ends=False).communication_s(load)
        slowest = self._combined(parts, np.maximum)
        return (slowest + together - self.step_s) / self.num_layers

    def _rank_room(self, rank: int, tokens: int, ends: Ends) -> list[Array]:
        spec, numbers = self.spec, self.numbers
        samples = self.problem.goal.max_concurrency
        nothing = Range(self.num_layers, self.num_layers)
        tables = shards(self.split, nothing, has_embedding=ends[0], has_head=ends[1])[rank]
        taken = weight_bytes(spec, tables, numbers)
        taken += activation_bytes(spec, tables, numbers, num_tokens=0, num_sampled=samples)

        def most(shard: Shard) -> float:
            rows = activation_bytes(spec, shard, numbers, num_tokens=_STEP_TOKENS, num_sampled=0)
            each = weight_bytes(spec, shard, numbers) / self.num_layers
            each += tokens * kv_token_bytes(spec, shard, numbers) / self.num_layers
            free = self.devices[rank].memory_bytes - taken - rows
            if free < 0:
                return 0.0
            return float(free // each) if each else float(self.num_layers)

        return self._looked_up(rank, most)

    def _looked_up(self, rank: int, value_of: Callable[[Shard], float]) -> list[Array]:
        """Of a rank: for each composition of heads, values by sixteenths of columns."""
        known: dict[Range, Array] = {}
        found = []
        for heads in self.heads:
            own = stacked(heads)[rank]
            if own not in known:
                sizes = range(int(self.columns.max()) + 1)
                known[own] = np.array([value_of(self._shard(own, n, rank)) for n in sizes])
            found.append(known[own])
        return found

    def _combined(self, parts: Sequence[Sequence[Array]], ufunc: np.ufunc) -> Array:
        """Of all entries: the most, or the least, of all ranks."""
        found = []
        for number in range(len(self.heads)):
            each = parts[0][number][self.columns[:, 0]]
            for rank in range(1, len(parts)):
                each = ufunc(each, parts[rank][number][self.columns[:, rank]])
            found.append(each)
        return np.concatenate(found)

    def _shard(self, heads: Range, columns: int, rank: int) -> Shard:
        return Shard(
            layers=Range(0, self.num_layers),
            heads=heads,
            ffn=Range(0, columns * self.unit),
            vocab=Range(0, 0),
            has_embedding=False,
            has_head=False,
            is_first=rank == 0,
            rank=rank,
            num_ranks=len(self.devices),
            streams=tuple(range(len(self.devices))),
        )

    def _cost(self, layers: Range, *, has_ends: bool) -> InstanceCost:
        found = shards(self.split, layers, has_embedding=has_ends, has_head=has_ends)
        problem = self.problem
        return InstanceCost(
            self.spec, found, self.devices, problem.cluster, self.numbers, engine=problem.engine
        )


def _met(goal: Goal, batch: int, sharing: float) -> tuple[float, float]:
    """Prompts in a step; and in its way, where so many steps are under way."""
    prompts = batch / goal.output_tokens
    # A chunk of up to 512 tokens in any of the steps under way is in the way of all.
    chunk = 1 - math.exp(-_CHUNK / goal.input_tokens)
    return prompts, max(prompts, chunk * (1 - max(1 - prompts, 0.0) ** sharing))


def compositions(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    """All ways to share out a number, parts of nothing among them."""
    for edges in itertools.combinations_with_replacement(range(total + 1), parts - 1):
        yield tuple(b - a for a, b in itertools.pairwise((0, *edges, total)))


def _rate(device: Device) -> float:
    return device.bandwidth_bytes_per_s * device.speed
