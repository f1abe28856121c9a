"""How fast a replica takes its Steps, in a few numbers: what a router needs of a cost model.

    seconds of a Step  =  step_s                      of any Step
                       +  token_s · prompt tokens     that it computes
                       +  row_s · sequences           that get a token
                       +  context_s · tokens          of those sequences, which are read
                       +  pair_s · pairs              of prompt tokens and those before them

Of a pipeline, tokens and pairs of prompts take what they take where it takes longest, as its
stages compute them at the same time; the rest is what it takes all the way through. Knows nothing
of devices or of models.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from shoal.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Speed:
    """
    Raises:
        ConfigError: a number that is negative or not finite, or a token of a prompt that takes
            no time.
    """

    step_s: float
    token_s: float
    row_s: float
    context_s: float
    pair_s: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            is_fine = math.isfinite(value) and value >= 0
            if not is_fine or (field.name == "token_s" and value == 0):
                raise ConfigError(
                    f"a speed's {field.name} is {value}; give seconds, token_s more than 0, the "
                    "others at least 0"
                )

    def step(self, prompt_tokens: float, num_sequences: float, context_tokens: float) -> float:
        """Seconds of a Step that computes so many tokens of prompts, and one of each sequence."""
        return (
            self.step_s
            + self.token_s * prompt_tokens
            + self.row_s * num_sequences
            + self.context_s * context_tokens
        )

    def at(self, share: float) -> Speed:
        """Of who runs at so much of this speed."""
        return Speed(*(getattr(self, field.name) / share for field in fields(self)))
