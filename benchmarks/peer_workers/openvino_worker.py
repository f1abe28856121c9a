"""openvino-genai, which reads GGUF; its own continuous batching for many requests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import openvino
import openvino_genai
from job import Generated, Job, now, run_worker


class _Stopwatch(openvino_genai.StreamerBase):  # type: ignore[misc]
    """Notes when the first token came."""

    def __init__(self) -> None:
        super().__init__()
        self.first_s: float | None = None

    def write(self, _tokens: Any) -> Any:
        if self.first_s is None:
            self.first_s = now()
        return openvino_genai.StreamingStatus.RUNNING

    def end(self) -> None:
        pass


class OpenVinoEngine:
    def __init__(self, job: Job) -> None:
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.max_num_seqs = job.max_batch
        scheduler.num_kv_blocks = 0
        scheduler.cache_size = 1  # GiB, the least; pages are taken as they are used
        scheduler.enable_prefix_caching = False
        scheduler.dynamic_split_fuse = job.options.get("dynamic_split_fuse", True)
        scheduler.max_num_batched_tokens = job.options.get("max_num_batched_tokens", 2048)
        self._pipeline = openvino_genai.LLMPipeline(
            job.model,
            "CPU",
            scheduler_config=scheduler,
            INFERENCE_NUM_THREADS=job.num_threads,
            **job.options.get("properties", {}),
        )

    def generate(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> Generated:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = num_tokens
        config.do_sample = False
        config.ignore_eos = True
        config.apply_chat_template = False
        ids = np.array(prompts, dtype=np.int64)
        inputs = openvino_genai.TokenizedInputs(
            openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids))
        )
        stopwatch = _Stopwatch() if len(prompts) == 1 else None
        started_s = now()
        results = (
            self._pipeline.generate(inputs, config)
            if stopwatch is None
            else self._pipeline.generate(inputs, config, stopwatch)
        )
        last_s = now() - started_s
        first_s = None
        if stopwatch is not None and stopwatch.first_s is not None:
            first_s = stopwatch.first_s - started_s
        return Generated([list(map(int, ids)) for ids in results.tokens], first_s, last_s)


if __name__ == "__main__":
    run_worker(OpenVinoEngine, "openvino-genai", "openvino")
