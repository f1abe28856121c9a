"""What a replica says, and when that is told: nobody waits for the middle of a stream.

    first token, last one, error     told at once, after what was kept
    tokens between                   kept with their times, while Step after Step has some of the
                                     same requests; told before anything else, or when asked for

Between the first and the last token a router learns nothing but that its replica is not silent, and
before it doubts a replica, that is asked. A sequence says one token again and again
(`sim/replica.py`). Knows nothing of engines or routers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from shoal.core.request import Output
from shoal.core.stats import Computed

Report = Callable[[Sequence[Output], Sequence[float], Computed], None]
"""Told of outputs, and when each of their tokens came."""


class Voice:
    """Of one replica.

    Args:
        keeps: otherwise all is told at once.
    """

    def __init__(self, report: Report, *, keeps: bool) -> None:
        self._report, self._keeps = report, keeps
        self._kept: Sequence[Output] = ()  # of the first time
        self._ids: list[str] = []
        self._times: list[float] = []
        self._computed = Computed()

    def say(
        self,
        outputs: Sequence[Output],
        times: Sequence[float],
        computed: Computed,
        *,
        at_once: bool,
    ) -> None:
        """
        Args:
            times: when the tokens came, of each output as many.
            at_once: whatever it is.
        """
        if at_once or not self._keeps or not all(map(_is_between, outputs)):
            self.tell()
            self._report(outputs, times, computed)
            return
        ids = [each.request_id for each in outputs]
        if ids != self._ids:
            self.tell()
            self._kept, self._ids = outputs, ids
        self._times += times
        self._computed = computed

    def tell(self) -> None:
        """What was kept."""
        if not self._ids:
            return
        times, kept = self._times, self._kept
        outputs = [
            Output(request_id=each.request_id, token_ids=each.token_ids[:1] * len(times))
            for each in kept
        ]
        self._kept, self._ids, self._times = (), [], []
        self._report(outputs, times, self._computed)


def _is_between(output: Output) -> bool:
    """Whether it is neither the first nor the last of its request."""
    return output.finish is None and output.num_cached_tokens is None
