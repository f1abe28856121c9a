"""A replica of a plan: its pipeline, and how it works.

Knows nothing of how replicas are found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shoal.core.plan import Role
from shoal.planner.chains import Bench, Names
from shoal.planner.pipeline import Chain, Operation, Segment
from shoal.policy.cost_model.numbers import Numbers


@dataclass(frozen=True, slots=True)
class Choice:
    """
    Attributes:
        operation: of its pipeline, when it carries the most it may.
        share: of all requests; None: as much as it carries of what all carry.
    """

    chain: Chain
    operation: Operation
    share: float | None = None

    @property
    def names(self) -> Names:
        groups = [group for segment in self.chain.segments for group in segment.groups]
        return tuple(name for group in groups for name in group.names)

    @property
    def rate_per_s(self) -> float:
        return self.operation.rate_per_s

    @property
    def keeps(self) -> set[Numbers]:
        """How its stages keep weights and KV."""
        parts = zip(self.chain.segments, self.operation.variants, strict=True)
        return {segment.group.variants[number].numbers for segment, number in parts}

    @property
    def log_loss(self) -> float:
        """Of quality: ln(perplexity / perplexity in 16 bits)."""
        return self.chain.limit.loss(self.operation.held)


def carried(choices: Sequence[Choice]) -> float:
    """Requests per second: those that are started must also be gone on with."""
    rates = _by_role(choices)
    return rates["any"] + min(rates["prefill"], rates["decode"])


def share_of(choice: Choice, choices: Sequence[Choice]) -> float:
    """Of all requests, those that it has a part in."""
    if choice.share is not None:
        return choice.share
    rates, total = _by_role(choices), carried(choices)
    role = choice.chain.role
    own = rates["any"] if role == "any" else total - rates["any"]
    return own / total * choice.rate_per_s / rates[role]


def moved(bench: Bench, chain: Chain, names: Names) -> Chain:
    """The same pipeline on other devices, which are alike one by one."""
    spare = list(names)

    def swapped(own: Names) -> list[str]:
        found = []
        for each in own:
            other = next(name for name in spare if bench.key([name]) == bench.key([each]))
            spare.remove(other)
            found.append(other)
        return found

    segments = [
        Segment(tuple(bench.group(swapped(group.names)) for group in segment.groups))
        for segment in chain.segments
    ]
    return Chain(bench.problem, segments).acting(chain.role, chain.moved_s)


def _by_role(choices: Sequence[Choice]) -> dict[Role, float]:
    rates: dict[Role, float] = {"any": 0.0, "prefill": 0.0, "decode": 0.0}
    for each in choices:
        rates[each.chain.role] += each.rate_per_s
    return rates
