"""Whose turn it is: the sequences that may go into a route's next Step, in order.

In a pipeline of S stages a Step decodes for one S-th of those that run there, and for nobody who is
in one of the S - 1 Steps before it: a single token that is still to be sampled there would hold up
the first stage for all others in the Step. So those that decode fall into S groups that follow each
other; what a group has more than its share goes with the next one. Rows that rebuild KV on the
first hops alone go into Steps of their own, in turns with the others.

Knows nothing of blocks or of tokens.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence

from shoal.engine.batch import Batch
from shoal.engine.config import EngineConfig
from shoal.engine.sequence import Sequence as TokenSequence


class Turns:
    """
    Attributes:
        next: number of the next Step's turn, over all routes.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._stages = [len(route) for route in config.routes]
        self._has_one_hop = self._stages == [1]
        self._max_pending = config.max_steps_in_flight if config.num_stages == 1 else 1
        # Of each route: turns of its latest Steps; Steps ever; the last one of a number of hops.
        self._latest = [deque[int](maxlen=stages - 1) for stages in self._stages]
        self._num_steps: Counter[int] = Counter()
        self._last: Counter[tuple[int, int]] = Counter()
        self.next = 1

    def handed_out(self, batch: Batch) -> None:
        """A Step with rows."""
        self._last[batch.route, batch.num_hops] = batch.turn
        self._latest[batch.route].append(batch.turn)
        self._num_steps[batch.route] += 1
        self.next = batch.turn + 1

    def can_run(self, sequence: TokenSequence) -> bool:
        """Whether a row of it could go into some Step now, blocks permitting."""
        return sequence.can_schedule(self._max_pending)

    def of(
        self, running: Sequence[TokenSequence], route: int, *, ahead: bool
    ) -> Iterable[tuple[int, Sequence[TokenSequence]]]:
        """The hops they run, and who, in order.

        A Step takes those of one number of hops; whose turn was longest ago is first.

        Args:
            running: on the route.
            ahead: those, too, that have to wait for a token of the Steps just before.
        """
        ready = [sequence for sequence in running if self.can_run(sequence)]
        if self._has_one_hop:
            # Those that decode, then prompts.
            ready.sort(key=lambda sequence: sequence.num_in_run > 1)
            yield 1, ready
            return
        counts = {sequence.num_hops_in_run for sequence in ready}
        for num_hops in sorted(counts, key=lambda count: (self._last[route, count], count)):
            prompts, decoding = list[TokenSequence](), list[TokenSequence]()
            for sequence in ready:
                if len(counts) == 1 or sequence.num_hops_in_run == num_hops:
                    (prompts if sequence.num_in_run > 1 else decoding).append(sequence)
            if self._stages[route] > 1:
                if not ahead:
                    decoding = [each for each in decoding if not self._follows(each, route)]
                decoding.sort(key=lambda sequence: (sequence.last_turn, sequence.rank))
                decoding = decoding[: self._share(running, route)]
            yield num_hops, [*decoding, *prompts]

    def _follows(self, sequence: TokenSequence, route: int) -> bool:
        """Whether its next token comes after one that those Steps have not sampled yet."""
        latest = self._latest[route]
        return bool(sequence.num_pending and latest and sequence.last_turn >= latest[0])

    def _share(self, running: Sequence[TokenSequence], route: int) -> int:
        """Rows that decode in a route's next Step: n of them in S Steps, as even as can be."""
        num = sum(1 for sequence in running if sequence.num_in_run <= 1)
        stages = self._stages[route]
        turn = self._num_steps[route] % stages
        return max(1, num * (turn + 1) // stages - num * turn // stages)
