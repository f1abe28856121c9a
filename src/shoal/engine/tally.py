"""Counts what the Steps that came back have computed. Knows nothing of requests."""

from __future__ import annotations

from collections.abc import Iterable

from shoal.core.stats import Computed


class Tally:
    """
    Attributes:
        busy_s: seconds that Steps took.
    """

    def __init__(self) -> None:
        self.busy_s = 0.0
        self._steps = self._prompt_tokens = 0
        self._prompt_pairs = 0.0

    @property
    def computed(self) -> Computed:
        return Computed(self._steps, self._prompt_tokens, self._prompt_pairs)

    def note(self, prompts: Iterable[tuple[int, float]], seconds: Iterable[float]) -> None:
        """Steps came back.

        Args:
            prompts: tokens and pairs of prompts, of those that may hold some, in order.
            seconds: that each of them took, in order.
        """
        for tokens, pairs in prompts:
            self._prompt_tokens += tokens
            self._prompt_pairs += pairs
        for each in seconds:
            self._steps += 1
            self.busy_s += each
