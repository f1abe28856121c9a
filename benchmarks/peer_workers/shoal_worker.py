"""shoal, through `LLM.generate`, as a user would call it."""

from __future__ import annotations

from collections.abc import Sequence

from job import Generated, Job, now, run_worker

from shoal import LLM, SamplingParams


class ShoalEngine:
    def __init__(self, job: Job) -> None:
        self._llm = LLM(job.model, device="cpu", num_threads=job.num_threads, **job.options)

    def generate(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> Generated:
        params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
        started_s = now()
        completions = self._llm.generate([list(prompt) for prompt in prompts], params)
        last_s = now() - started_s
        # Of many, the caller reads the first whole before it looks at the next.
        first_s = completions[0].choices[0].ttft_s if len(prompts) == 1 else None
        return Generated([list(each.token_ids) for each in completions], first_s, last_s)


if __name__ == "__main__":
    run_worker(ShoalEngine, "shoal", "torch")
