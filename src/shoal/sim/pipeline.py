"""The instances of a replica: each runs one Step after another, and sends it on.

    submit ─► queue ─► instance of hop 0 ─► link ─► queue ─► instance of hop 1 ─► ... ─► result
                          ▲                                                     │
                          └──── a Step whose tokens are not sampled yet waits ──┘

Instances may be on several routes; each takes Steps as they come. Knows nothing of engines.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from shoal.core.plan import Route
from shoal.core.step import Step
from shoal.policy.cost_model.loads import StepLoad
from shoal.sim.cost import StepCost, load_of, load_of_rows


@dataclass(slots=True)
class Work:
    """A Step on its way: at `hop` of its route, the last of them is `last_hop`."""

    step: Step
    load: StepLoad
    last_hop: int
    hop: int = 0
    compute_s: float = 0.0


@dataclass(slots=True)
class Station:
    """An instance.

    Attributes:
        current: what runs; it ends at `ends_s`.
        speed: it runs at this share of itself.
        busy_s: of all Steps that ended here.
    """

    queue: deque[Work] = field(default_factory=deque)
    current: Work | None = None
    seconds: float = 0.0
    speed: float = 1.0
    busy_s: float = 0.0


class Pipeline:
    """
    Args:
        routes: of the replica, over `num_instances` instances.
    """

    def __init__(self, routes: Sequence[Route], num_instances: int, cost: StepCost) -> None:
        self._instances = [[hop.instance for hop in route] for route in routes]
        self._cost = cost
        self.stations = [Station() for _ in range(num_instances)]
        # (when, number, what, its instance): what ends there, or comes there.
        self._events: list[tuple[float, int, str, Work, int]] = []
        self._num_events = 0
        # Steps whose tokens the first stage does not have yet.
        self._unsampled: set[int] = set()

    @property
    def next_s(self) -> float | None:
        """When something happens next."""
        return self._events[0][0] if self._events else None

    def submit(self, step: Step, now: float) -> None:
        instances = self._instances[step.route]
        last_hop = (step.num_hops or len(instances)) - 1
        work = Work(step, load_of(step, self._cost.windows), last_hop)
        self._unsampled.add(step.step_id)
        self._arrive(work, instances[0], now)

    def step(self) -> tuple[float, Work | None]:
        """The next thing happens; (when, a Step whose result it is)."""
        now, _, what, work, instance = heapq.heappop(self._events)
        if what == "ends":
            return now, self._end(work, instance, now)
        if what == "comes":
            self._arrive(work, instance, now)
            return now, None
        self._unsampled.discard(work.step.step_id)
        self._start_next(self._instances[work.step.route][0], now)
        return now, work

    def clear(self) -> None:
        """Everything in flight is lost."""
        for station in self.stations:
            station.queue.clear()
            station.current = None
        self._events.clear()
        self._unsampled.clear()

    def delay(self, seconds: float) -> None:
        """All that is under way takes so much longer."""
        self._events = [
            (when + seconds, number, what, work, instance)
            for when, number, what, work, instance in self._events
        ]
        heapq.heapify(self._events)

    def _push(self, when: float, what: str, work: Work, instance: int) -> None:
        self._num_events += 1
        heapq.heappush(self._events, (when, self._num_events, what, work, instance))

    def _arrive(self, work: Work, instance: int, now: float) -> None:
        self.stations[instance].queue.append(work)
        self._start_next(instance, now)

    def _start_next(self, instance: int, now: float) -> None:
        station = self.stations[instance]
        if station.current is not None or not station.queue:
            return
        if self._lacks_tokens(station.queue[0]):
            return
        work = station.current = station.queue.popleft()
        station.seconds = self.seconds(work.load, work.step.route, work.hop)
        self._push(now + station.seconds, "ends", work, instance)

    def seconds(self, load: StepLoad, route: int, hop: int) -> float:
        """That an instance takes for a Step, at its speed."""
        station = self.stations[self._instances[route][hop]]
        return self._cost.compute_s(load, route, hop) / station.speed

    def decodes(self, lengths: Sequence[int], count: int) -> list[float]:
        """The same of so many Steps of the only instance, each with a token of each sequence."""
        (station,) = self.stations
        found = self._cost.decodes_s(lengths, count, 0, 0)
        return found if station.speed == 1 else [each / station.speed for each in found]

    def mixed(self, lengths: Sequence[int], start: int, num_tokens: int) -> float:
        """The same of one that also holds so many tokens of a prompt, which do not end it.

        Args:
            lengths: positions that each sequence attends to.
        """
        rows = [(length - 1, 1, True) for length in lengths]
        if num_tokens:
            rows.append((start, num_tokens, False))
        return self.seconds(load_of_rows(rows, self._cost.windows), 0, 0)

    def _lacks_tokens(self, work: Work) -> bool:
        """Whether it follows tokens that the last stage has not sampled yet."""
        if work.hop or len(self._instances[work.step.route]) == 1:
            return False
        rows = work.step.rows
        return any(row.token_ref and row.token_ref.step_id in self._unsampled for row in rows)

    def _end(self, work: Work, instance: int, now: float) -> Work | None:
        station = self.stations[instance]
        station.current = None
        station.busy_s += station.seconds
        work.compute_s += station.seconds
        route, hop = work.step.route, work.hop
        is_alone = len(self._instances[route]) == 1
        if not is_alone:
            delay_s = self._cost.transfer_s(work.load.num_tokens, route, hop)
            if hop < work.last_hop:
                work.hop += 1
                self._push(now + delay_s, "comes", work, self._instances[route][work.hop])
            else:
                self._push(now + delay_s, "returns", work, instance)
        else:
            self._unsampled.discard(work.step.step_id)
        self._start_next(instance, now)
        return work if is_alone else None
