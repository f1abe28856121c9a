"""A prompt that is computed beside sequences that decode, chunk by chunk, foreseen.

    Steps that come back   seconds ─► what Steps take lately (`policy/batching.py`, a copy)
    the next Step          ◄─ as much of the prompt as that allows, until its last chunk is due

The copy is told what the engine itself will be told when the run is taken, so it says the same.
Knows nothing of blocks or of time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from shoal.policy.batching import StepTimes


class PromptAhead:
    """
    Args:
        times: of the route's Steps so far; this one's from now on.
        in_flight: tokens of prompts in each Step in flight, the oldest first.
        start, stop: what of its tokens is to be computed still.
        most: of it that a Step may hold, whatever Steps take.
        num_running, num_prompts: on the route; with this one.

    Attributes:
        start: where the next chunk begins.
    """

    def __init__(
        self,
        times: StepTimes,
        in_flight: Iterable[int],
        start: int,
        stop: int,
        *,
        most: int,
        num_running: int,
        num_prompts: int,
    ) -> None:
        self._times, self._in_flight = times, deque(in_flight)
        self.start, self._stop, self._most = start, stop, most
        self._num_running, self._num_prompts = num_running, num_prompts

    def next_chunk(self, seconds: float) -> int | None:
        """Tokens of it in the Step that is handed out when the oldest one in flight has come back.

        Args:
            seconds: that one took.

        Returns:
            None: the rest of it, after which a run is over.
        """
        self._times.took(self._in_flight.popleft(), seconds)
        rest = self._stop - self.start
        room = self._times.prompt_tokens(self._num_running, self._num_prompts, decodes=True)
        chunk = self._most if room is None else min(room, self._most)
        # One token alone goes with those that decode.
        if chunk >= rest or rest == 1:
            return None
        self._times.handed_out(self._num_running, chunk)
        self._in_flight.append(chunk)
        self.start += chunk
        return chunk
