"""What a pipeline of groups gives: tokens per second, TPOT and TTFT, from its stages' times.

    b sequences in each of M micro-batches; of I input and O output tokens each

    a step in a stage   t_s = decode of b tokens + its share of prompts, (b / O) of one prompt
    in its way          1 - (1 - b / O)^m chunks of a prompt, or its own if those are more, where m
                        steps share the instance: none overtakes, so that a chunk in one of them
                        delays all; chunks of a prompt follow each other and delay them once. The
                        first one of up to C tokens has 1 - exp(-C / I) of a prompt, on average of
                        lengths that are spread exponentially
    TPOT                max(sum of t_s with what is in the way + hops,  M max of t_s / instances)
    rate                M b / (O TPOT)                                    (Little's law)
                        of what is carried, not of M b but of as many as these are seats enough for
                        (`bunches.py`), so that TPOT holds while bunches of arrivals are there
    TTFT                wait + prompt through all stages + half a step that was under way
    wait                rho P / 2 (1 - rho), P: a prompt on the slowest stage, rho = rate P (M/D/1);
                        within a SLO, not the mean counts but what 95 % wait less than

With one stage the first is TPOT = decode + B x prefill / O, as in `policy/cost_model/serving.py`.
Prompts go through stages in chunks, so that only one chunk passes them one by one. Knows nothing of
how groups are found.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace

from shoal.core.cluster import Cluster, Link
from shoal.core.latency import Slo
from shoal.core.plan import Role
from shoal.planner.bits import Limit, within
from shoal.planner.bunches import late_wait_s, mean_of
from shoal.planner.fill import Option, StageTimes, periods
from shoal.planner.goal import Goal
from shoal.planner.profiles import Group, Problem
from shoal.planner.quality import log_limit
from shoal.policy.cost_model.transport import message_s

Fixed = tuple[tuple[int, ...], tuple[int, ...]] | None
"""Layers and variants of each stage; None: the best for each batch."""

CHUNK_TOKENS = 512
"""Of a prompt that are computed in one Step."""
_MOST_TRIED = 6


@dataclass(frozen=True, slots=True)
class Segment:
    """A stage: groups that are alike and stand in for each other."""

    groups: tuple[Group, ...]

    @property
    def group(self) -> Group:
        return self.groups[0]

    @property
    def num_instances(self) -> int:
        return len(self.groups)


@dataclass(frozen=True, slots=True)
class Hops:
    """The slowest link from each stage to the next, and bytes of a token's hidden state."""

    links: tuple[Link, ...]
    row_bytes: int

    def step_s(self, batch: float) -> float:
        return sum(message_s(link, batch * self.row_bytes) for link in self.links)


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """A pipeline at work.

    Attributes:
        layers, variants: of each stage, and which of its group's variants it is.
        num_micro_batches, batch: sequences are decoded in so many batches of that size.
        tpot_s, ttft_s: means.
        late_ttft_s: what 95 % of requests get their first token before.
        rate_per_s: requests.
    """

    layers: tuple[int, ...]
    variants: tuple[int, ...]
    num_micro_batches: int
    batch: int
    tpot_s: float
    ttft_s: float
    late_ttft_s: float
    rate_per_s: float

    @property
    def num_sequences(self) -> int:
        return self.num_micro_batches * self.batch

    @property
    def held(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Layers and variants of each stage."""
        return self.layers, self.variants

    def latency_s(self, output_tokens: float) -> float:
        """Of a whole request."""
        return self.ttft_s + (output_tokens - 1) * self.tpot_s


class Chain:
    """Segments in order; layers and batches are still free.

    Args:
        thorough: all counts of micro-batches are tried, not only one for each stage and, where that
            is too many, one.
    """

    def __init__(
        self, problem: Problem, segments: Sequence[Segment], *, thorough: bool = True
    ) -> None:
        self.segments = tuple(segments)
        self.thorough = thorough
        self.role: Role = "any"
        self.moved_s = 0.0
        self.goal: Goal = problem.goal
        self.spec = problem.spec
        self.hops = _hops(problem, self.segments)
        last = len(self.segments) - 1
        self.ends = tuple((index == 0, index == last) for index in range(len(self.segments)))
        self.num_chunks = max(1.0, self.goal.input_tokens / CHUNK_TOKENS)
        most = self.goal.max_quality_loss
        self.limit = Limit(self.losses, math.inf if most is None else log_limit(most))
        self._hops_s: dict[int, float] = {}
        self._stages: dict[tuple[int, int], list[StageTimes]] = {}

    @property
    def losses(self) -> tuple[tuple[float, ...], ...]:
        """Of quality, in each stage, with each of its variants (`Limit`)."""
        return tuple(each.group.losses for each in self.segments)

    def acting(self, role: Role, moved_s: float = 0.0) -> Chain:
        """The same for a part of every request.

        Args:
            moved_s: until a request's KV is here.
        """
        other = copy(self)
        other.role, other.moved_s = role, moved_s
        other._stages = {}
        return other

    def without_slo(self) -> Chain:
        """The same where nothing is asked of its latency."""
        other = copy(self)
        other.goal = replace(self.goal, slo=Slo())
        return other

    def micro_batch_counts(self) -> Iterator[int]:
        """How many micro-batches are worth trying, the most first: up to one for each instance."""
        most = sum(each.num_instances for each in self.segments)
        tried = range(1, min(most, _MOST_TRIED) + 1) if self.thorough else (1,)
        return iter(sorted({*tried, len(self.segments), most}, reverse=True))

    def fastest(
        self, num_micro_batches: int, batch: int, arrivals_per_s: float | None = None
    ) -> Operation | None:
        """The layers with which tokens come fastest; None: there is no room for that.

        Args:
            arrivals_per_s: for which requests wait; None: as many as are carried.
        """
        stages = self.stages(num_micro_batches, batch)
        hops_s = self.hops_s(batch)
        found = within(stages, self.spec.num_layers, num_micro_batches, hops_s, self.limit)
        if found is None:
            return None
        if self.limit.most < math.inf:
            stages = _held(stages, found[1])
        return self._operation(stages, *found, (num_micro_batches, batch), arrivals_per_s)

    def at(
        self,
        layers: tuple[int, ...],
        variants: tuple[int, ...],
        num_micro_batches: int,
        batch: int,
        arrivals_per_s: float | None = None,
    ) -> Operation | None:
        """The same with layers and variants that are given."""
        stages = self.holding(variants, num_micro_batches, batch)
        if any(n > each.most_layers for n, each in zip(layers, stages, strict=True)):
            return None
        if not self.limit.allows((layers, variants)):
            return None
        batches = (num_micro_batches, batch)
        return self._operation(stages, layers, variants, batches, arrivals_per_s)

    def stages(self, num_micro_batches: int, batch: int) -> list[StageTimes]:
        """Times and room of each, with so many sequences."""
        found = self._stages.get((num_micro_batches, batch))
        if found is None:
            found = [
                self._stage(segment, ends, num_micro_batches, batch)
                for segment, ends in zip(self.segments, self.ends, strict=True)
            ]
            self._stages[num_micro_batches, batch] = found
        return found

    def holding(
        self, variants: Sequence[int], num_micro_batches: int, batch: int
    ) -> list[StageTimes]:
        """The same with one variant in each."""
        found = []
        for segment, ends, variant in zip(self.segments, self.ends, variants, strict=True):
            place = ends, num_micro_batches, batch, segment.num_instances, self.role
            known = segment.group.stage_times.get((*place, variant))
            if known is None:
                every = segment.group.stage_times.get(place)
                option = (
                    every.options[variant]
                    if every is not None
                    else self._option(segment, variant, ends, (num_micro_batches, batch))
                )
                known = StageTimes((option,), segment.num_instances)
                segment.group.stage_times[*place, variant] = known
            found.append(known)
        return found

    def has_room(
        self, layers: Sequence[int], variants: Sequence[int], num_micro_batches: int, batch: int
    ) -> bool:
        """For the KV of so many sequences beside these layers."""
        for number, segment in enumerate(self.segments):
            held = -(-num_micro_batches * batch // segment.num_instances)
            variant = segment.group.variants[variants[number]]
            if layers[number] > variant.most_layers(held, *self.ends[number]):
                return False
        return True

    def hops_s(self, batch: int) -> float:
        """Of a step's messages from stage to stage."""
        found = self._hops_s.get(batch)
        if found is None:
            found = self._hops_s[batch] = self.hops.step_s(batch)
        return found

    def _stage(
        self, segment: Segment, ends: tuple[bool, bool], num_micro_batches: int, batch: int
    ) -> StageTimes:
        place = ends, num_micro_batches, batch, segment.num_instances, self.role
        known = segment.group.stage_times.get(place)
        if known is None:
            known = self._times(segment, ends, num_micro_batches, batch)
            segment.group.stage_times[place] = known
        return known

    def _times(
        self, segment: Segment, ends: tuple[bool, bool], num_micro_batches: int, batch: int
    ) -> StageTimes:
        batches = num_micro_batches, batch
        variants = range(len(segment.group.variants))
        options = tuple(self._option(segment, each, ends, batches) for each in variants)
        return StageTimes(options, segment.num_instances)

    def _option(
        self, segment: Segment, variant: int, ends: tuple[bool, bool], batches: tuple[int, int]
    ) -> Option:
        num_micro_batches, batch = batches
        prompts = batch / self.goal.output_tokens if self.role == "any" else 0.0
        sharing = max(num_micro_batches / segment.num_instances, 1.0)
        late = in_the_way(prompts, self.goal.input_tokens, sharing) - prompts
        num_sequences = -(-num_micro_batches * batch // segment.num_instances)
        own = segment.group.variants[variant]
        return Option(
            layer_s=own.layer_s(batch) + prompts * own.prompt_layer_s,
            fixed_s=own.end_s(batch) if ends[1] else own.step_s,
            most_layers=own.most_layers(num_sequences, *ends),
            late_s=late * own.prompt_layer_s,
        )

    def _operation(
        self,
        stages: Sequence[StageTimes],
        layers: tuple[int, ...],
        variants: tuple[int, ...],
        batches: tuple[int, int],
        arrivals_per_s: float | None,
    ) -> Operation | None:
        num_micro_batches, batch = batches
        hops_s = self.hops_s(batch)
        path_s, slowest_s = periods(stages, layers, num_micro_batches, hops_s)
        output_tokens = self.goal.output_tokens
        tpot_s = max(path_s, slowest_s) + self.moved_s / max(output_tokens - 1, 1.0)
        seats = num_micro_batches * batch
        rate = (mean_of(seats) if arrivals_per_s is None else seats) / (output_tokens * tpot_s)
        if self.moved_s:
            rate = min(rate, 1 / self.moved_s)
        arrivals = rate if arrivals_per_s is None else min(rate, arrivals_per_s)
        ttfts_s: tuple[float, float] | None = (0.0, 0.0)
        if self.role == "any":
            ttfts_s = self.ttft_s(layers, variants, arrivals, path_s - hops_s)
        if ttfts_s is None:
            return None
        return Operation(
            layers=layers,
            variants=variants,
            num_micro_batches=num_micro_batches,
            batch=batch,
            tpot_s=tpot_s,
            ttft_s=ttfts_s[0],
            late_ttft_s=ttfts_s[1],
            rate_per_s=rate,
        )

    def ttft_s(
        self, layers: tuple[int, ...], variants: tuple[int, ...], rate: float, step_s: float
    ) -> tuple[float, float] | None:
        """Mean, and late (`Operation`), with steps of that length in the way; None: prompts alone
        are more than the slowest stage can do."""
        found = [
            segment.group.variants[variant]
            for segment, variant in zip(self.segments, variants, strict=True)
        ]
        prompts = [n * each.prompt_layer_s for n, each in zip(layers, found, strict=True)]
        shared = [t / each.num_instances for t, each in zip(prompts, self.segments, strict=True)]
        # Prompts follow each other through a pipeline that has nothing but them (`prompts.py`).
        slowest_s = sum(shared) if self.role == "prefill" else max(shared)
        busy = rate * slowest_s
        if busy >= 1.0:
            return None
        through_s = sum(prompts) / self.num_chunks + max(prompts) * (1 - 1 / self.num_chunks)
        wait_s = busy * slowest_s / (2 * (1 - busy))
        chunk = min(self.goal.input_tokens, CHUNK_TOKENS)
        alone_s = through_s + found[-1].end_s(1) + self.hops.step_s(chunk) + step_s / 2
        return alone_s + wait_s, alone_s + late_wait_s(busy, slowest_s)


def _held(stages: Sequence[StageTimes], variants: Sequence[int]) -> list[StageTimes]:
    parts = zip(stages, variants, strict=True)
    return [StageTimes((each.options[v],), each.num_instances) for each, v in parts]


def in_the_way(prompts: float, input_tokens: float, num_sharing: float) -> float:
    """Prompts whose computing a step waits for in each stage, its own among them.

    Args:
        prompts: that begin in a step, on average.
        num_sharing: steps under way that share its instances.
    """
    some: float = 1.0 - (1.0 - min(prompts, 1.0)) ** num_sharing
    return max(prompts, some * (1.0 - math.exp(-CHUNK_TOKENS / input_tokens)))


def _hops(problem: Problem, segments: Sequence[Segment]) -> Hops:
    links = tuple(_slowest_link(problem.cluster, a, b) for a, b in itertools.pairwise(segments))
    variants = segments[0].group.variants
    row = problem.spec.hidden_size * (variants[0].numbers.activation_bytes if variants else 2)
    return Hops(links, row)


def _slowest_link(cluster: Cluster, sender: Segment, receiver: Segment) -> Link:
    """Of all that devices of the one have to devices of the other."""
    links = {
        cluster.link(first, second)
        for a in sender.groups
        for b in receiver.groups
        for first in a.names
        for second in b.names
    }
    return max(links, key=lambda link: (1 / link.bytes_per_s, link.latency_s))
