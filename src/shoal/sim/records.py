"""What became of every request, and how the replicas stood in the meantime.

Gaps between tokens are counted in bins half a percent wide, as there are too many to keep. Knows
nothing of who serves.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from shoal.core.request import Output
from shoal.core.stats import Lag

_BIN_RATIO = 1.005
_SMALLEST_S = 1e-9
_WITHIN = 0.499
"""Half of a bin, less what logarithms are off: so near its edge, nobody knows without."""


@dataclass(slots=True)
class RequestRecord:
    """Times in seconds since the start; None: not yet, or never.

    Attributes:
        started_s: its first Step was handed out.
        error: why it ended without all of its tokens.
    """

    arrival_s: float
    prompt_tokens: int
    started_s: float | None = None
    first_s: float | None = None
    last_s: float | None = None
    num_output: int = 0
    num_cached: int = 0
    is_finished: bool = False
    error: str | None = None

    @property
    def queue_s(self) -> float | None:
        return None if self.started_s is None else self.started_s - self.arrival_s

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_s is None else self.first_s - self.arrival_s

    @property
    def tpot_s(self) -> float | None:
        if self.first_s is None or self.last_s is None or self.num_output < 2:
            return None
        return (self.last_s - self.first_s) / (self.num_output - 1)

    @property
    def e2e_s(self) -> float | None:
        return None if self.last_s is None else self.last_s - self.arrival_s

    @property
    def is_good(self) -> bool:
        return self.is_finished and self.error is None


class Gaps:
    """Times between two tokens that follow each other."""

    def __init__(self) -> None:
        self.counts: Counter[int] = Counter()
        self.longest_s = 0.0

        # Of the latest bin: most gaps are nearly as long as the one before.
        self._bin = 0
        self._from_s = self._to_s = 0.0

    def add(self, seconds: float, times: int = 1) -> None:
        if not self._from_s <= seconds < self._to_s:
            self._choose_bin(seconds)
        self.counts[self._bin] += times
        if seconds > self.longest_s:
            self.longest_s = seconds

    def add_run(self, num_requests: int, times: Sequence[float]) -> None:
        """So many requests got a token at each of these times."""
        gaps = [later - earlier for earlier, later in pairwise(times)]
        shortest, longest = min(gaps), max(gaps)
        self.add(shortest, num_requests)
        if longest < self._to_s:
            self.add(longest, num_requests * (len(gaps) - 1))
            return
        gaps.remove(shortest)
        for seconds in gaps:
            self.add(seconds, num_requests)

    def _choose_bin(self, seconds: float) -> None:
        self._bin = round(math.log(max(seconds, _SMALLEST_S)) / _LOG_RATIO)
        self._from_s = _BIN_RATIO ** (self._bin - _WITHIN)
        self._to_s = _BIN_RATIO ** (self._bin + _WITHIN)

    def percentile(self, percent: float) -> float:
        """To half a percent."""
        wanted = percent / 100 * self.counts.total()
        for bin_number, count in sorted(self.counts.items()):
            wanted -= count
            if wanted <= 0:
                return min(float(_BIN_RATIO**bin_number), self.longest_s)
        return self.longest_s


_LOG_RATIO = math.log(_BIN_RATIO)


@dataclass(frozen=True, slots=True)
class ReplicaSample:
    """How a replica stood at a time.

    Attributes:
        running, waiting: requests.
        kv_share: of its KV blocks in use.
        queued: Steps that wait, at each instance.
        output_tokens, busy_s: since the start; the latter of each instance.
    """

    running: int
    waiting: int
    kv_share: float
    queued: tuple[int, ...]
    output_tokens: int
    busy_s: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Sample:
    """All of them, in the order of the setups."""

    at_s: float
    replicas: tuple[ReplicaSample, ...]


@dataclass(frozen=True, slots=True)
class Replan:
    """A replica had been slow for long then."""

    at_s: float
    replica: str
    lag: Lag


@dataclass(slots=True)
class Records:
    """
    Attributes:
        requests: by their number.
        end_s: when the last of them ended.
    """

    requests: list[RequestRecord]
    end_s: float = 0.0
    gaps: Gaps = field(default_factory=Gaps)
    samples: list[Sample] = field(default_factory=list)
    replans: list[Replan] = field(default_factory=list)

    def note_started(self, number: int, now: float) -> None:
        record = self.requests[number]
        if record.started_s is None:
            record.started_s = now

    def note(self, number: int, output: Output, times: Sequence[float]) -> None:
        """
        Args:
            times: when its tokens came; gaps between them are counted by `Gaps.add_run`.
        """
        record = self.requests[number]
        if output.num_cached_tokens is not None:
            record.num_cached = output.num_cached_tokens
        if output.token_ids:
            if record.first_s is None:
                record.first_s = times[0]
            elif record.last_s is not None:
                self.gaps.add(times[0] - record.last_s)
            record.num_output += len(output.token_ids)
            record.last_s = times[-1]
        if output.finish is not None:
            record.is_finished = True
            if output.error is not None:
                record.error = output.error.code
            elif output.finish not in ("stop", "length"):
                record.error = output.finish
