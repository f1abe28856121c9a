"""Requests of a workload as token ids that no device reads.

    block_hashes  7 9       prompt  B7 B7 ... B7  B9 ... B9  n n n        n: the request's number
                                    └ 512 tokens ┘           └ its own ┘

Only which prompts begin alike counts. Knows nothing of text.
"""

from __future__ import annotations

from shoal.core.errors import ConfigError
from shoal.core.request import GenerateRequest, SamplingParams
from shoal.core.workload import HASH_BLOCK_TOKENS, Arrival, Workload


class Prompts:
    """Of one workload.

    Args:
        most_tokens: of a prompt; those that are longer, which every replica refuses, end there.

    Raises:
        ConfigError: a prompt whose length the trace doesn't say.
    """

    def __init__(self, workload: Workload, most_tokens: int) -> None:
        self._most_tokens = most_tokens
        for number, arrival in enumerate(workload.arrivals, start=1):
            if arrival.prompt_tokens < 1:
                raise ConfigError(
                    f"{workload.name}, request {number}: a prompt given as text has no length that "
                    "could be simulated; add prompt_tokens"
                )
        self._arrivals = workload.arrivals
        names = dict.fromkeys(name for each in workload.arrivals for name in each.block_hashes)
        self._ids = {name: len(workload.arrivals) + i for i, name in enumerate(names)}

    @property
    def vocab_size(self) -> int:
        """Token ids lie below."""
        return len(self._arrivals) + len(self._ids) + 1

    def num_tokens(self, number: int) -> int:
        """Of an arrival's prompt and output."""
        return self._arrivals[number].prompt_tokens + self._arrivals[number].output_tokens

    def request(self, number: int) -> GenerateRequest:
        """The workload's arrival of that number; its seed says the same number."""
        arrival = self._arrivals[number]
        return GenerateRequest(
            request_id=str(number),
            prompt_ids=self._prompt(number, arrival),
            sampling=SamplingParams(
                temperature=0.0, max_tokens=arrival.output_tokens, ignore_eos=True, seed=number
            ),
        )

    def _prompt(self, number: int, arrival: Arrival) -> tuple[int, ...]:
        wanted, ids = min(arrival.prompt_tokens, self._most_tokens), list[int]()
        for name in arrival.block_hashes[: -(-wanted // HASH_BLOCK_TOKENS)]:
            ids += [self._ids[name]] * HASH_BLOCK_TOKENS
        return (*ids[:wanted], *[number] * (wanted - len(ids)))
