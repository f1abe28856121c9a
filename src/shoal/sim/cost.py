"""What a Step costs on a replica's instances, by the cost model.

    seconds of a Step       from its load: tokens, KV that is read, pairs in attention
    seconds between hops    from a hop's instance to the next one's; what is sampled goes back

Knows nothing of queues or of time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from shoal.core.cluster import Cluster
from shoal.core.step import Step
from shoal.policy.cost_model.loads import StepLoad, Windows, windows_of
from shoal.policy.cost_model.times import ReplicaCost
from shoal.policy.cost_model.transport import message_s
from shoal.sim.instance_seconds import InstanceSeconds

_SAMPLED_BYTES = 64
"""What the first stage is told of a token, about."""


class StepCost(Protocol):
    """Of one replica.

    `windows` are those that loads must tell apart; `error` is how far off times may be, as a share.
    """

    @property
    def windows(self) -> Windows: ...

    @property
    def error(self) -> float: ...

    def compute_s(self, load: StepLoad, route: int, hop: int) -> float:
        """Seconds that the instance of a hop is busy with a Step."""
        ...

    def decodes_s(self, lengths: Sequence[int], count: int, route: int, hop: int) -> list[float]:
        """`compute_s` of so many Steps, each with a token of each sequence.

        Args:
            lengths: positions that each attends to in the first of them.
        """
        ...

    def transfer_s(self, num_tokens: int, route: int, hop: int) -> float:
        """Seconds from a hop's instance to the next one's; from the last one's, of what was
        sampled, to the first one's."""
        ...


def load_of(step: Step, windows: Windows) -> StepLoad:
    return load_of_rows([(row.start, row.num_tokens, row.samples) for row in step.rows], windows)


def load_of_rows(rows: Iterable[tuple[int, int, bool]], windows: Windows) -> StepLoad:
    """As `StepLoad.of`, for whoever asks a million times."""
    if windows != (None,):
        return StepLoad.of(rows, windows)
    tokens = sampled = ended = read = pairs = 0
    for start, count, samples in rows:
        tokens += count
        read += start + count
        pairs += count * start + count * (count + 1) // 2
        if samples:
            sampled += 1
            ended += count > 1
    return StepLoad(tokens, sampled, windows, (read,), (pairs,), ended)


class ModelledCost:
    """By the cost model (`policy/cost_model`)."""

    def __init__(self, model: ReplicaCost, cluster: Cluster) -> None:
        self.windows = windows_of(model.spec)
        self.error = model.error
        self._cluster = cluster
        self._routes = tuple(model.hops(route) for route in range(len(model.plan.routes)))
        self._seconds = tuple(
            tuple(InstanceSeconds(each, self.windows) for each in hops) for hops in self._routes
        )
        self._model = model
        self._transfers: dict[tuple[int, int], tuple[float, ...]] = {}

    def compute_s(self, load: StepLoad, route: int, hop: int) -> float:
        return self._seconds[route][hop](load)

    def decodes_s(self, lengths: Sequence[int], count: int, route: int, hop: int) -> list[float]:
        return self._seconds[route][hop].decodes(lengths, count)

    def transfer_s(self, num_tokens: int, route: int, hop: int) -> float:
        key = (num_tokens, route)
        if key not in self._transfers:
            self._transfers[key] = (
                *self._model.hop_times(num_tokens, route),
                self._return_s(num_tokens, route),
            )
        return self._transfers[key][hop]

    def _return_s(self, num_tokens: int, route: int) -> float:
        first, last = self._routes[route][0].devices[0], self._routes[route][-1].devices[0]
        return message_s(self._cluster.link(last.name, first.name), num_tokens * _SAMPLED_BYTES)
