"""What requests are like: how long prompts are, how much comes out; and what that takes.

Outputs are told apart by the most tokens that were asked for, in classes four times as wide as the
one before: who asks for much gets more, but seldom all of it. Knows nothing of replicas' loads.
"""

from __future__ import annotations

from collections.abc import Sequence

from shoal.core.request import GenerateRequest
from shoal.policy.routing.standing import Standing

_FIRST_PROMPT, _FIRST_OUTPUT = 512.0, 256.0
_NEWEST_SHARE = 0.02
_TIMES_TTFT, _TIMES_TPOT = 3.0, 1.5
_CROWD = 16
"""Sequences that share a Step, where a replica's speed for many is asked."""
_UNLIMITED = 0


class Typical:
    def __init__(self) -> None:
        self.prompt = _FIRST_PROMPT
        self.output = _FIRST_OUTPUT
        self._num_prompts = 0
        # Of each class of limits: mean, and how many were seen.
        self._outputs: dict[int, tuple[float, int]] = {}

    def output_of(self, request: GenerateRequest) -> float:
        """Tokens that are expected of it."""
        limit = request.sampling.max_tokens
        mean, _ = self._outputs.get(_class_of(limit), (min(limit or _FIRST_OUTPUT, self.output), 0))
        return mean if limit is None else min(mean, float(limit))

    def note_output(self, request: GenerateRequest, num_tokens: int) -> None:
        """A request ended by itself."""
        self._num_prompts += 1
        share = max(_NEWEST_SHARE, 1 / (self._num_prompts + 1))
        self.prompt += share * (len(request.prompt_ids) - self.prompt)
        self.output += share * (num_tokens - self.output)
        limit = _class_of(request.sampling.max_tokens)
        mean, seen = self._outputs.get(limit, (float(num_tokens), 0))
        share = max(_NEWEST_SHARE, 1 / (seen + 1))
        self._outputs[limit] = mean + share * (num_tokens - mean), seen + 1

    def targets(self, standings: Sequence[Standing]) -> tuple[float, float]:
        """TTFT and TPOT that the slowest keeps with ease: some times what it takes when alone."""
        first = [each.alone_s(self.prompt) for each in standings]
        gaps = [each.alone_gap_s(self.prompt) for each in standings]
        return _TIMES_TTFT * max(first, default=1.0), _TIMES_TPOT * max(gaps, default=0.1)

    def request_s(self, standing: Standing) -> float:
        """Of a replica's time that one of many such requests takes, as it usually is."""
        speed = standing.speed
        each_s = speed.step_s / _CROWD + speed.row_s + speed.context_s * self.prompt
        return standing.correction.usually(speed.token_s * self.prompt, self.output * each_s)


def _class_of(limit: int | None) -> int:
    return _UNLIMITED if limit is None else 1 + limit.bit_length() // 2
