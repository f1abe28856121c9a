"""A Step while it is filled. Knows nothing of who goes into it."""

from __future__ import annotations

from dataclasses import dataclass, field

from shoal.core.step import StepRow
from shoal.engine.sequence import Sequence

Rows = list[tuple[Sequence, StepRow]]


@dataclass(slots=True)
class Batch:
    """Rows of one Step, all of them through the first `num_hops` hops of a route.

    Attributes:
        budget: tokens that it may still hold.
        prompt_room: of prompts; None: not asked yet.
        num_prompt_tokens, num_prompt_pairs: that it holds; pairs with those before, of a sequence.
    """

    route: int
    step_id: int
    turn: int
    budget: int
    num_hops: int
    rows: Rows = field(default_factory=list)
    prompt_room: int | None = None
    num_prompt_tokens: int = 0
    num_prompt_pairs: float = 0.0

    @property
    def prompts(self) -> tuple[int, float]:
        """Tokens of them, and pairs."""
        return self.num_prompt_tokens, self.num_prompt_pairs
