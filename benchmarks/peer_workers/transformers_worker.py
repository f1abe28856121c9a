"""transformers, its own `generate`, eager with SDPA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from job import Generated, Job, now, run_worker


class _Stopwatch:
    """A streamer that notes when the first token came; the first call brings the prompt."""

    def __init__(self) -> None:
        self._calls = 0
        self.first_s: float | None = None

    def put(self, _ids: Any) -> None:
        self._calls += 1
        if self._calls == 2:
            self.first_s = now()

    def end(self) -> None:
        pass


class TransformersEngine:
    def __init__(self, job: Job) -> None:
        torch.set_num_threads(job.num_threads)
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            job.model, dtype=getattr(torch, job.options["dtype"]), attn_implementation="sdpa"
        ).eval()  # type: ignore[no-untyped-call]

    def generate(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> Generated:
        ids = torch.tensor(prompts)
        stopwatch = _Stopwatch() if len(prompts) == 1 else None
        started_s = now()
        with torch.inference_mode():
            outputs = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=transformers.GenerationConfig(  # type: ignore[no-untyped-call]
                    do_sample=False,
                    max_new_tokens=num_tokens,
                    min_new_tokens=num_tokens,
                    pad_token_id=0,
                ),
                streamer=stopwatch,
            )
        last_s = now() - started_s
        first_s = None
        if stopwatch is not None and stopwatch.first_s is not None:
            first_s = stopwatch.first_s - started_s
        return Generated(outputs[:, ids.shape[1] :].tolist(), first_s, last_s)


if __name__ == "__main__":
    run_worker(TransformersEngine, "transformers", "torch")
