"""How many tokens of prompts a Step holds: `policy/batching.py`, told of sequences and Steps.

Knows nothing of blocks or of time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from shoal.engine.batch import Batch
from shoal.engine.config import EngineConfig
from shoal.engine.prompt_ahead import PromptAhead
from shoal.engine.sequence import Sequence as TokenSequence
from shoal.policy.batching import StepTimes


class Chunks:
    """Of one engine's routes."""

    def __init__(self, config: EngineConfig) -> None:
        self._tpot_s = config.tpot_target_s
        self._is_even = config.batching == "even"
        self._most = config.max_num_batched_tokens
        self._num_hops = [len(route) for route in config.routes]
        self._times: dict[int, StepTimes] = {}

    def room(self, batch: Batch, running: Sequence[TokenSequence], num_coming: int) -> int:
        """Tokens of prompts that a Step may still hold, once its rows that decode are in it.

        Args:
            running: on its route.
            num_coming: who may come to it.
        """
        if batch.prompt_room is None:
            room = self._wanted(batch, running, num_coming)
            batch.prompt_room = self._most if room is None else min(room, self._most)
        return min(batch.prompt_room, batch.budget)

    def take(
        self,
        batch: Batch,
        sequence: TokenSequence,
        running: Sequence[TokenSequence],
        num_coming: int,
    ) -> int:
        """Tokens of a prompt that go into a Step, taken off its room."""
        found = min(sequence.num_in_run, self.room(batch, running, num_coming))
        assert batch.prompt_room is not None, "it was asked for above"
        batch.prompt_room -= found
        batch.num_prompt_tokens += found
        batch.num_prompt_pairs += found * (sequence.num_scheduled + found / 2)
        return found

    def handed_out(self, batch: Batch, num_running: int) -> None:
        if self._is_even:
            self._of(batch.route).handed_out(num_running, batch.num_prompt_tokens)

    def took(self, batch: Batch, seconds: float) -> None:
        """A Step came back; one that stops at an earlier hop says nothing of whole ones."""
        if self._is_even and batch.num_hops == self._num_hops[batch.route]:
            self._of(batch.route).took(batch.num_prompt_tokens, seconds)

    def decoded(self, batches: Sequence[Batch], num_running: int, seconds: Sequence[float]) -> None:
        """Steps of the only route came back: these, then some that were handed out since, without
        prompts."""
        for batch, each in zip(batches, seconds, strict=False):
            self.took(batch, each)
        if self._is_even:
            self._of(0).decoded(num_running, seconds[len(batches) :])

    def computed(
        self,
        batches: Sequence[Batch],
        chunks: Sequence[int],
        num_running: int,
        seconds: Sequence[float],
    ) -> None:
        """The same, with so much of a prompt in each Step that was handed out as one came back."""
        times = self._of(0)
        came = (*(each.num_prompt_tokens for each in batches), *chunks)
        for tokens, each, chunk in zip(came, seconds, chunks, strict=False):
            times.took(tokens, each)
            times.handed_out(num_running, chunk)

    def ahead(
        self,
        prompt: TokenSequence,
        batches: Iterable[Batch],
        running: Sequence[TokenSequence],
        num_prompts: int,
    ) -> PromptAhead | None:
        """The first of some prompts beside those that decode, on the only route; None: nothing is
        known of how it is cut."""
        if not self._is_even:
            return None
        return PromptAhead(
            self._of(0).copy(),
            [each.num_prompt_tokens for each in batches],
            prompt.num_scheduled,
            prompt.total_len,
            most=self._most - (len(running) - num_prompts),
            num_running=len(running),
            num_prompts=num_prompts,
        )

    def _wanted(
        self, batch: Batch, running: Sequence[TokenSequence], num_coming: int
    ) -> int | None:
        num_prompts = sum(each.num_in_run > 1 for each in running)
        if not self._is_even or len(running) == num_prompts:
            return None
        times, decodes = self._of(batch.route), bool(batch.rows)
        return times.prompt_tokens(len(running), num_prompts + num_coming, decodes=decodes)

    def _of(self, route: int) -> StepTimes:
        times = self._times.get(route)
        if times is None:
            times = self._times[route] = StepTimes(self._tpot_s)
        return times
