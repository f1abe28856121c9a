"""A tensor-parallel group that could hold layers: times and room, in each way to share it out.

    Group      devices of one instance
    Variant    a split of every layer over them, and a precision of weights

A layer is the mean of the model's layers; what stands beside layers (embedding, head) counts where
it is. The rates are those of `policy/cost_model`, so that a plan and its cost agree. Knows nothing
of pipelines.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace

from shoal.core.cluster import Cluster, Device, Precision
from shoal.core.model_spec import ModelSpec
from shoal.core.split import Range, Shard, Split, shards, split_by_weights
from shoal.core.step import BLOCK_SIZE
from shoal.planner.fill import StageTimes
from shoal.planner.formats import numbers_for
from shoal.planner.goal import Goal
from shoal.planner.quality import loss_of
from shoal.planner.splits import GRANULE, Load, Prompt, RankRates, quick_splits
from shoal.policy.cost_model.constants import constants_for
from shoal.policy.cost_model.loads import StepLoad, windows_of
from shoal.policy.cost_model.memory import activation_bytes, kv_token_bytes, weight_bytes
from shoal.policy.cost_model.numbers import Numbers
from shoal.policy.cost_model.times import InstanceCost, Rates, StepTime

_BATCHES = (1, 2, 4, 6, 8, 16, 64)
"""At which ranks are balanced: from bound by memory to bound by arithmetic."""
_PROMPTS = (0.3, 1.0, 3.0)
"""Where prompts count less or more than by their number: for TTFT, and while a queue waits."""
_LAYER_SHARES = (0.0, 1.0, 0.75, 0.5, 0.35, 0.25)
"""Of the model's layers, for which ranks must have room; 0: room does not count."""
_COMPARED = (1, 2, 4, 8, 16, 64)
"""Batches at which a split may be better than another, beside the most there may be."""
_STEP_TOKENS = 2048
"""Of the largest Step, for which activations need room."""


@dataclass(frozen=True, slots=True)
class Problem:
    """What all groups share.

    `engine` names whose constants count.
    """

    spec: ModelSpec
    cluster: Cluster
    goal: Goal
    engine: str = "shoal"

    @property
    def sequence_tokens(self) -> int:
        """Of KV that a sequence takes, on average, in whole blocks."""
        return -(-round(self.goal.context_tokens) // BLOCK_SIZE) * BLOCK_SIZE

    def kept_tokens(self, num_sequences: int) -> int:
        """Of KV: that of so many sequences, and at least of the longest one there may be."""
        return max(num_sequences * self.sequence_tokens, self.goal.longest_tokens)

    def decode(self, batch: int) -> StepLoad:
        context = max(round(self.goal.context_tokens), 1)
        return StepLoad.decode(batch, context, windows_of(self.spec))

    def prompt(self) -> StepLoad:
        return StepLoad.prefill(round(self.goal.input_tokens), 0, windows_of(self.spec))


class Variant:
    """A split and precision of a group.

    Args:
        devices: in the order of ranks.
        alike: another one with the same split of the vocabulary.
    """

    def __init__(
        self,
        problem: Problem,
        devices: Sequence[Device],
        split: Split,
        numbers: Numbers,
        alike: Variant | None = None,
    ) -> None:
        spec, cluster = problem.spec, problem.cluster
        self.problem, self.split, self.numbers = problem, split, numbers
        self._num_layers = spec.num_layers
        body = shards(split, Range(0, spec.num_layers), has_embedding=False, has_head=False)
        nothing = Range(spec.num_layers, spec.num_layers)
        self._ends = {
            ends: shards(split, nothing, has_embedding=ends[0], has_head=ends[1])
            for ends in ((False, False), (True, False), (False, True), (True, True))
        }
        engine = problem.engine
        self.cost = InstanceCost(spec, body, devices, cluster, numbers, engine=engine)
        self._end = InstanceCost(
            spec, self._ends[True, True], devices, cluster, numbers, engine=engine
        )
        self._rooms = [self._rank_room(device, rank) for rank, device in enumerate(devices)]
        rooms = self._rooms
        self._unlike = [each for n, each in enumerate(rooms) if each not in rooms[:n]]
        self.log_loss = loss_of(spec, self.precision).log_ratio
        self.step_s = self.cost.step_s
        prompt = self.cost.time(problem.prompt())
        self.prompt_layer_s = (prompt.total_s - self.step_s) / self._num_layers
        self._layer_s: dict[int, float] = {}
        self._most_layers: dict[tuple[int, bool, bool], int] = {}
        self._end_s: dict[int, float] = alike._end_s if alike else {}

    @property
    def precision(self) -> Precision:
        return self.numbers.precision

    def layer_s(self, batch: int) -> float:
        """Of a decode step, for each layer."""
        if batch not in self._layer_s:
            total_s = self.cost.time(self.problem.decode(batch)).total_s
            self._layer_s[batch] = (total_s - self.step_s) / self._num_layers
        return self._layer_s[batch]

    def layer_time(self, batch: int) -> StepTime:
        """The same, by what it is spent on."""
        time = self.cost.time(self.problem.decode(batch))
        time = replace(time, overhead_s=time.overhead_s - self.step_s)
        return time.times(1 / self._num_layers)

    def end_s(self, batch: int) -> float:
        """Of embedding and head, and of any Step."""
        if batch not in self._end_s:
            self._end_s[batch] = self.end_time(batch).total_s
        return self._end_s[batch]

    def end_time(self, batch: int) -> StepTime:
        return self._end.time(self.problem.decode(batch))

    def most_layers(self, num_sequences: int, is_first: bool, is_last: bool) -> int:
        """That fit beside the KV of so many sequences, and of the longest one there may be."""
        place = num_sequences, is_first, is_last
        if place not in self._most_layers:
            tokens = self.problem.kept_tokens(num_sequences)
            rooms = (each.most_layers(tokens, is_first, is_last) for each in self._unlike)
            self._most_layers[place] = max(min(rooms), 0)
        return self._most_layers[place]

    def qualities(self) -> tuple[float, ...]:
        """What should be little: times of a layer, and what it takes of the room there is."""
        most = self.problem.goal.max_concurrency
        times = [self.layer_s(batch) for batch in (*(n for n in _COMPARED if n < most), most)]
        rooms = [
            -self.most_layers(count, end, end) for count in (1, 16, most) for end in (False, True)
        ]
        return (*times, self.prompt_layer_s, *rooms)

    def kv_budgets(self, num_layers: int, is_first: bool, is_last: bool) -> tuple[int, ...]:
        """Bytes that weights and activations of so many layers leave, on each rank."""
        return tuple(
            max(int(each.free[is_first, is_last] - num_layers * each.layer_bytes), 0)
            for each in self._rooms
        )

    def weight_budgets(self, num_layers: int, is_first: bool, is_last: bool) -> tuple[int, ...]:
        """Bytes of the weights of so many layers, embedding and head, on each rank."""
        return tuple(
            int(each.tables[is_first, is_last] + num_layers * each.layer_bytes)
            for each in self._rooms
        )

    @property
    def has_even_kv(self) -> bool:
        """Whether each rank keeps as much KV of a token."""
        return len({each.kv_layer_bytes for each in self._rooms}) == 1

    def _rank_room(self, device: Device, rank: int) -> _Room:
        spec, numbers, body = self.problem.spec, self.numbers, self.cost.shards[rank]
        samples = self.problem.goal.max_concurrency
        rows = activation_bytes(spec, body, numbers, num_tokens=_STEP_TOKENS, num_sampled=0)
        free, tables = {}, {}
        for ends, found in self._ends.items():
            tables[ends] = weight_bytes(spec, found[rank], numbers)
            logits = activation_bytes(spec, found[rank], numbers, num_tokens=0, num_sampled=samples)
            free[ends] = device.memory_bytes - tables[ends] - rows - logits
        return _Room(
            free=free,
            tables=tables,
            layer_bytes=_mean_layer_bytes(spec, body, numbers),
            kv_layer_bytes=kv_token_bytes(spec, body, numbers) / self._num_layers,
            all_layers=self._num_layers,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Room:
    """A rank's memory, by whether its stage has embedding and head, and what layers take.

    `tables`: of these; `free`: what is left beside them and activations.
    """

    free: dict[tuple[bool, bool], int]
    tables: dict[tuple[bool, bool], int]
    layer_bytes: float
    kv_layer_bytes: float
    all_layers: int

    def most_layers(self, tokens: int, is_first: bool, is_last: bool) -> int:
        size = self.layer_bytes + tokens * self.kv_layer_bytes
        free = self.free[is_first, is_last]
        if free < 0:
            return 0
        return self.all_layers if size * self.all_layers <= free else int(free / size)


class Group:
    """Devices of one instance, in the order of ranks, and the ways to use them."""

    def __init__(
        self,
        problem: Problem,
        devices: Sequence[Device],
        alike: Group | None = None,
    ) -> None:
        self.problem = problem
        self.devices = tuple(sorted(devices, key=_strength))
        self.variants: tuple[Variant, ...] = (
            alike.variants if alike else tuple(_variants(problem, self.devices))
        )
        # What pipelines work out of the variants, by batch and place; the same for all alike.
        self.stage_times: dict[Hashable, StageTimes] = alike.stage_times if alike else {}
        self.losses = tuple(each.log_loss for each in self.variants)

    def on(self, devices: Sequence[Device]) -> Group:
        """The same on other devices that are alike."""
        return Group(self.problem, devices, self)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(each.name for each in self.devices)

    @property
    def kinds(self) -> str:
        """For people: "4x H100-SXM"."""
        counts: dict[str, int] = {}
        for each in self.devices:
            counts[each.kind] = counts.get(each.kind, 0) + 1
        return " + ".join(f"{n}x {kind}" if n > 1 else kind for kind, n in counts.items())


def _variants(problem: Problem, devices: Sequence[Device]) -> Iterator[Variant]:
    for precision in problem.goal.precisions:
        numbers = numbers_for(devices, precision, problem.goal.kv_precision)
        if numbers is None:
            continue
        every: list[Variant] = []
        for split in _splits(problem, devices, numbers):
            alike = every[0] if every and every[0].split.vocab == split.vocab else None
            every.append(Variant(problem, devices, split, numbers, alike))
        yield from _undominated(every)


def _undominated(variants: Sequence[Variant]) -> Iterator[Variant]:
    """Those that are the best at something: at a batch, at prompts, or in room."""
    found = [(each, each.qualities()) for each in variants]
    for index, (each, own) in enumerate(found):
        others = ((other, n) for n, (_, other) in enumerate(found) if n != index)
        if not any(
            all(a <= b for a, b in zip(other, own, strict=True)) and (other != own or n < index)
            for other, n in others
        ):
            yield each


def _splits(problem: Problem, devices: Sequence[Device], numbers: Numbers) -> Iterator[Split]:
    spec = problem.spec
    if len(devices) == 1:
        yield split_by_weights(spec, [1.0])
        return
    engine = problem.engine
    rates = [
        Rates.of(each, constants_for(problem.cluster, each, engine, numbers.precision), numbers)
        for each in devices
    ]
    ranks = [
        RankRates(
            bytes_per_s=each.bytes_per_s,
            flops_per_s=each.flops_per_s,
            attention_flops_per_s=each.attention_flops_per_s,
            layer_s=each.layer_s,
            exposed=each.exposed,
        )
        for each in rates
    ]
    weight_bytes = _layer_bytes(spec, numbers) / _layer_weights(spec)
    tokens = problem.goal.input_tokens
    prompt = Prompt(
        num_tokens=tokens,
        kv_read_bytes=_head_bytes(spec, numbers) * tokens,
        head_flops=_pair_flops(spec) * tokens * tokens / 2,
    )
    alike = len({(rate, each.memory_bytes) for rate, each in zip(rates, devices, strict=True)}) == 1
    if alike:
        (free, *_) = _loads(problem, devices, numbers)
        found = quick_splits(spec, ranks, weight_bytes, prompt, [free])
        if found and _is_even(found[0]):
            yield found[0]
            return
    loads = _loads(problem, devices, numbers)
    yield from quick_splits(spec, ranks, weight_bytes, prompt, loads)


def _loads(problem: Problem, devices: Sequence[Device], numbers: Numbers) -> list[Load]:
    """From those bound by memory to those bound by arithmetic, with shares of the model's layers
    for which there must be room."""
    spec, goal = problem.spec, problem.goal
    head_bytes = _head_bytes(spec, numbers)
    step_bytes = 3.0 * _STEP_TOKENS * numbers.activation_bytes
    rooms, found = list(_free_bytes(problem, devices, numbers)), []
    for batch in (each for each in _BATCHES if each <= goal.max_concurrency):
        prompts = batch / goal.output_tokens
        for share in _LAYER_SHARES:
            num_layers = share * spec.num_layers
            for room in rooms if share else [[math.inf] * len(devices)]:
                load = Load(
                    num_tokens=batch,
                    kv_read_bytes=head_bytes * goal.context_tokens * batch,
                    kv_kept_bytes=head_bytes * problem.kept_tokens(batch),
                    head_flops=_pair_flops(spec) * goal.context_tokens * batch,
                    column_bytes=step_bytes / num_layers if share else 0.0,
                    most_bytes=tuple(each / (num_layers or 1.0) for each in room),
                    prompts=(*(n * prompts for n in _PROMPTS), prompts + 1 / goal.output_tokens),
                )
                found.append(load)
    return found


def _is_even(split: Split) -> bool:
    """Whether each rank has as many heads and columns as any other."""
    return len({len(each) for each in split.heads}) == len({len(each) for each in split.ffn}) == 1


def _free_bytes(
    problem: Problem, devices: Sequence[Device], numbers: Numbers
) -> Iterator[list[float]]:
    """About what each rank has for layers, beside what a Step takes: as a stage between others, and
    as the only one, with embedding and head."""
    spec = problem.spec
    num_samples = problem.goal.max_concurrency
    weights = [each.bandwidth_bytes_per_s * each.speed for each in devices]
    split = split_by_weights(spec, weights, granule=GRANULE)
    for has_tables in (False, True):
        free = []
        found = shards(split, Range(0, 1), has_embedding=has_tables, has_head=has_tables)
        for device, shard in zip(devices, found, strict=True):
            bare = replace(shard, ffn=Range(0, 0))  # what columns take is counted with them
            taken = activation_bytes(
                spec, bare, numbers, num_tokens=_STEP_TOKENS, num_sampled=num_samples
            )
            if has_tables:
                nothing = replace(shard, layers=Range(0, 0), experts=(), dealings=())
                taken += weight_bytes(spec, nothing, numbers)
            free.append(float(max(device.memory_bytes - taken, 1)))
        yield free


def _head_bytes(spec: ModelSpec, numbers: Numbers) -> float:
    """Of a token's KV, in a layer, of one KV head."""
    return 2.0 * spec.head_dim * numbers.kv_bytes


def _pair_flops(spec: ModelSpec) -> float:
    """Of attention, for a query head and a position."""
    return 2.0 * (spec.head_dim + spec.value_dim)


def _layer_bytes(spec: ModelSpec, numbers: Numbers) -> float:
    """Of a whole layer."""
    whole = split_by_weights(spec, [1.0])
    layers = Range(0, spec.num_layers)
    (shard,) = shards(whole, layers, has_embedding=False, has_head=False)
    return _mean_layer_bytes(spec, shard, numbers)


def _mean_layer_bytes(spec: ModelSpec, shard: Shard, numbers: Numbers) -> float:
    """Of a rank; layers differ only where some have experts."""
    if spec.experts is None:
        return float(weight_bytes(spec, replace(shard, layers=Range(0, 1)), numbers))
    return weight_bytes(spec, shard, numbers) / spec.num_layers


def _layer_weights(spec: ModelSpec) -> float:
    """Of a dense layer: weights of attention and MLP."""
    attention = 2 * (spec.num_heads + spec.num_kv_heads) * spec.head_dim
    return float(spec.hidden_size * (attention + 3 * spec.ffn_size))


def _strength(device: Device) -> tuple[float, int, str]:
    return -device.bandwidth_bytes_per_s * device.speed, -device.memory_bytes, device.name
