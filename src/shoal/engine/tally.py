"""Counts what the Steps that came back have computed. Knows nothing of requests."""

from __future__ import annotations

from collections.abc import Iterable

from shoal.core.stats import Computed
from shoal.engine.batch import Batch


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

    def note(self, batches: Iterable[Batch], seconds: Iterable[float]) -> None:
        """Steps came back.

        Args:
            batches: of those that may hold prompts.
            seconds: that each of them took, in order.
        """
        for batch in batches:
            self._prompt_tokens += batch.num_prompt_tokens
            self._prompt_pairs += batch.num_prompt_pairs
        for each in seconds:
            self._steps += 1
            self.busy_s += each
