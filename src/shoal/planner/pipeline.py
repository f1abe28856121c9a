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
    TTFT                wait + prompt through all stages + half a step that was under way
    wait                rho P / 2 (1 - rho), P: a prompt on the slowest stage, rho = rate P (M/D/1)

With one stage the first is TPOT = decode + B x prefill / O, as in `policy/cost_model/serving.py`.
Prompts go through stages in chunks, so that only one chunk passes them one by one. Knows nothing of
how groups are found.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass

from shoal.core.cluster import Cluster, Link
from shoal.core.plan import Role
from shoal.planner.fill import Option, StageTimes, fill, periods
from shoal.planner.goal import Goal
from shoal.planner.profiles import Group, Problem
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
        rate_per_s: requests.
    """

    layers: tuple[int, ...]
    variants: tuple[int, ...]
    num_micro_batches: int
    batch: int
    tpot_s: float
    ttft_s: float
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

    def acting(self, role: Role, moved_s: float = 0.0) -> Chain:
        """The same for a part of every request.

        Args:
            moved_s: until a request's KV is here.
        """
        other = copy(self)
        other.role, other.moved_s = role, moved_s
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
        hops_s = self.hops.step_s(batch)
        layers = fill(stages, self.spec.num_layers, num_micro_batches, hops_s)
        if layers is None:
            return None
        chosen = [each.choose(n) for n, each in zip(layers, stages, strict=True)]
        variants = tuple(index for index in chosen if index is not None)
        batches = (num_micro_batches, batch)
        return self._operation(stages, layers, variants, batches, arrivals_per_s)

    def at(
        self,
        layers: tuple[int, ...],
        variants: tuple[int, ...],
        num_micro_batches: int,
        batch: int,
        arrivals_per_s: float | None = None,
    ) -> Operation | None:
        """The same with layers and variants that are given."""
        stages = [
            StageTimes((stage.options[variant],), stage.num_instances)
            for stage, variant in zip(self.stages(num_micro_batches, batch), variants, strict=True)
        ]
        if any(n > each.most_layers for n, each in zip(layers, stages, strict=True)):
            return None
        batches = (num_micro_batches, batch)
        return self._operation(stages, layers, variants, batches, arrivals_per_s)

    def stages(self, num_micro_batches: int, batch: int) -> list[StageTimes]:
        """Times and room of each, with so many sequences."""
        return [
            self._stage(segment, ends, num_micro_batches, batch)
            for segment, ends in zip(self.segments, self.ends, strict=True)
        ]

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
        num_sequences = -(-num_micro_batches * batch // segment.num_instances)
        prompts = batch / self.goal.output_tokens if self.role == "any" else 0.0
        sharing = max(num_micro_batches / segment.num_instances, 1.0)
        late = in_the_way(prompts, self.goal.input_tokens, sharing) - prompts
        options = tuple(
            Option(
                layer_s=each.layer_s(batch) + prompts * each.prompt_layer_s,
                fixed_s=each.end_s(batch) if ends[1] else each.step_s,
                most_layers=each.most_layers(num_sequences, *ends),
                late_s=late * each.prompt_layer_s,
            )
            for each in segment.group.variants
        )
        return StageTimes(options, segment.num_instances)

    def _operation(
        self,
        stages: Sequence[StageTimes],
        layers: tuple[int, ...],
        variants: tuple[int, ...],
        batches: tuple[int, int],
        arrivals_per_s: float | None,
    ) -> Operation | None:
        num_micro_batches, batch = batches
        hops_s = self.hops.step_s(batch)
        path_s, slowest_s = periods(stages, layers, num_micro_batches, hops_s)
        output_tokens = self.goal.output_tokens
        tpot_s = max(path_s, slowest_s) + self.moved_s / max(output_tokens - 1, 1.0)
        rate = num_micro_batches * batch / (output_tokens * tpot_s)
        if self.moved_s:
            rate = min(rate, 1 / self.moved_s)
        arrivals = rate if arrivals_per_s is None else min(rate, arrivals_per_s)
        ttft_s: float | None = 0.0
        if self.role == "any":
            ttft_s = self.ttft_s(layers, variants, arrivals, path_s - hops_s)
        if ttft_s is None:
            return None
        return Operation(
            layers=layers,
            variants=variants,
            num_micro_batches=num_micro_batches,
            batch=batch,
            tpot_s=tpot_s,
            ttft_s=ttft_s,
            rate_per_s=rate,
        )

    def ttft_s(
        self, layers: tuple[int, ...], variants: tuple[int, ...], rate: float, step_s: float
    ) -> float | None:
        """With steps of that length in the way; None: prompts alone are more than the slowest stage
        can do."""
        found = [
            segment.group.variants[variant]
            for segment, variant in zip(self.segments, variants, strict=True)
        ]
        prompts = [n * each.prompt_layer_s for n, each in zip(layers, found, strict=True)]
        slowest_s = max(
            t / each.num_instances for t, each in zip(prompts, self.segments, strict=True)
        )
        busy = rate * slowest_s
        if busy >= 1.0:
            return None
        through_s = sum(prompts) / self.num_chunks + max(prompts) * (1 - 1 / self.num_chunks)
        wait_s = busy * slowest_s / (2 * (1 - busy))
        chunk = min(self.goal.input_tokens, CHUNK_TOKENS)
        return wait_s + through_s + found[-1].end_s(1) + self.hops.step_s(chunk) + step_s / 2


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
