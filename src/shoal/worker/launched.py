"""A Step that was launched on a device, and what it gives once it is done.

Shapes: T tokens, E hidden size. Knows nothing of how a Step is computed.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from shoal.core.request import TokenLogprobs
from shoal.core.step import RowResult, Step, StepResult
from shoal.model.sampling import SampledBatch


class LaunchedStep:
    """A Step the device works on.

    Attributes:
        hidden_TE: what the next hop goes on with; None: this was the last one.
    """

    def __init__(
        self,
        step: Step,
        sampled: SampledBatch | None,
        prompt_logprobs_of: dict[int, tuple[TokenLogprobs, ...]],
        started_s: float,
        device: torch.device,
        hidden_TE: Tensor | None = None,
    ) -> None:
        self.hidden_TE = hidden_TE
        self._step = step
        self._sampled = sampled
        self._prompt_logprobs_of = prompt_logprobs_of
        self._started_s = started_s
        self._finished: torch.cuda.Event | None = None
        if device.type == "cuda" and sampled is None:
            # Without it a long prompt's chunks would all count as done and queue up.
            self._finished = torch.cuda.current_stream(device).record_event()

    @property
    def done(self) -> bool:
        if self._finished is not None:
            return bool(self._finished.query())  # type: ignore[no-untyped-call]
        return self._sampled is None or self._sampled.host_copy.done

    def token_ids(self) -> tuple[int, ...]:
        """What each row sampled, -1 where it did not; waits for the device."""
        sampled = iter([] if self._sampled is None else self._sampled.host_copy.wait()[0].tolist())
        return tuple(next(sampled) if row.samples else -1 for row in self._step.rows)

    def wait(self) -> StepResult:
        if self._finished is not None:
            self._finished.synchronize()
        tokens = iter([] if self._sampled is None else self._sampled.to_rows())
        rows = []
        for i, row in enumerate(self._step.rows):
            token_id, logprobs = next(tokens) if row.samples else (None, None)
            rows.append(RowResult(token_id, logprobs, self._prompt_logprobs_of.get(i, ())))
        return StepResult(
            step_id=self._step.step_id,
            incarnation=self._step.incarnation,
            rows=tuple(rows),
            compute_s=time.perf_counter() - self._started_s,
        )
