"""A text through one or two workers, window by window: perplexity, and how far they part.

Windows and what is scored follow llama.cpp's `perplexity`, so that numbers can be compared:

    window    [ BOS | context tokens                    ]      the next begins `stride` later
    scored              [ second half, less one token   ]      each given all before it

A window is `context` tokens; where the tokenizer begins texts with BOS, that takes the place of
the window's first token. The logits of positions context/2 to context-2 are scored against the
tokens that follow them. Tokens behind the last whole window are left out.

Runs Steps over paged KV, as serving does, both workers on the same window before the next, so
that no more than a few rows of logits are ever held. Knows nothing of files or tokenizers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.core.errors import ConfigError
from shoal.core.step import BLOCK_SIZE, Step, StepRow
from shoal.model.quality import Comparison, Divergence, Perplexity, TextScore
from shoal.worker.runner import Worker

STEP_TOKENS = 512
_LOGIT_ROWS = 64
_SHORTEST_CONTEXT = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """Where windows lie in a text of `num_tokens`.

    Raises:
        ConfigError: no window fits, or some tokens would be scored twice or never.
    """

    num_tokens: int
    context: int = 512
    stride: int | None = None

    def __post_init__(self) -> None:
        if self.context < _SHORTEST_CONTEXT:
            raise ConfigError(
                f"--context is {self.context}; it must be at least {_SHORTEST_CONTEXT}"
            )
        shortest = self.context - self.context // 2
        if not shortest <= self.step <= self.context:
            raise ConfigError(
                f"--stride is {self.step}; with a context of {self.context} it must be "
                f"{shortest} to {self.context}, so that no token is skipped or scored twice"
            )
        if self.num_tokens < self.context:
            raise ConfigError(
                f"the text has {self.num_tokens} tokens, and a window takes {self.context}; give "
                f"a longer text, or lower --context"
            )

    @property
    def step(self) -> int:
        return self.context if self.stride is None else self.stride

    @property
    def starts(self) -> range:
        return range(0, self.num_tokens - self.context + 1, self.step)

    @property
    def first_scored(self) -> int:
        """Position in a window whose logits are the first to count."""
        return self.context // 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """One perplexity for each worker; the divergence of the first from the second, if two."""

    perplexities: tuple[Perplexity, ...]
    divergence: Divergence | None


def evaluate(
    workers: Sequence[Worker],
    token_ids: Sequence[int],
    windows: Windows,
    *,
    bos_token_id: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Score a text.

    Args:
        workers: one, or one and the reference it is compared with.
        bos_token_id: what every window begins with; None: the text's own token.
        progress: called with (windows done, windows in all).
    """
    scores, comparison = [TextScore() for _ in workers], Comparison()
    for done, start in enumerate(windows.starts, 1):
        window = list(token_ids[start : start + windows.context])
        targets = torch.tensor(window[windows.first_scored + 1 :])
        if bos_token_id is not None:
            window[0] = bos_token_id
        hidden = [_hidden_states(each, window, windows.first_scored) for each in workers]
        for rows in _chunks(len(targets)):
            logprobs_NV = [
                score.add(worker.logits(states_ND[rows]), targets[rows].to(states_ND.device))
                for worker, score, states_ND in zip(workers, scores, hidden, strict=True)
            ]
            if len(workers) > 1:
                comparison.add(*logprobs_NV)
        progress(done, len(windows.starts))
    return Evaluation(
        perplexities=tuple(score.result() for score in scores),
        divergence=comparison.result(*scores) if len(workers) > 1 else None,
    )


def _hidden_states(worker: Worker, window: Sequence[int], first_scored: int) -> Tensor:
    """Of positions [first_scored, end - 1), through Steps as an engine would cut them."""
    parts = []
    for step_id, start in enumerate(range(0, len(window), STEP_TOKENS)):
        stop = min(start + STEP_TOKENS, len(window))
        row = StepRow(
            sequence_id=0,
            start=start,
            token_ids=tuple(window[start:stop]),
            block_ids=(tuple(range(-(-stop // BLOCK_SIZE))),),
        )
        states_TD = worker.hidden_states(Step(step_id=step_id, rows=(row,)))
        parts.append(states_TD[max(0, first_scored - start) :])
    return torch.cat(parts)[:-1]


def _chunks(num_rows: int) -> Iterator[slice]:
    for start in range(0, num_rows, _LOGIT_ROWS):
        yield slice(start, start + _LOGIT_ROWS)
