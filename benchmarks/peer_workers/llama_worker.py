"""llama.cpp, through llama-cpp-python's low-level API: all sequences in one llama_decode.

The high-level API and the server of llama-cpp-python run one sequence at a time.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import llama_cpp
import numpy as np
from job import Generated, Job, now, run_worker

_MAX_BATCH_TOKENS = 2048
_KV_GRANULE = 256


class LlamaEngine:
    def __init__(self, job: Job) -> None:
        self._job = job
        self._silence = llama_cpp.llama_log_callback(_ignore)
        llama_cpp.llama_log_set(self._silence, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        model_params = llama_cpp.llama_model_default_params()
        model_params.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(job.model.encode(), model_params)
        if not self._model:
            raise RuntimeError(f"llama.cpp does not load {job.model}")
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(
            llama_cpp.llama_model_get_vocab(self._model)
        )
        self._batch = llama_cpp.llama_batch_init(_MAX_BATCH_TOKENS, 0, 1)
        self._context: Any = None
        self._sequences = self._length = 0

    def generate(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> Generated:
        self._make_room(len(prompts), max(map(len, prompts)) + num_tokens)
        started_s = now()
        ids = [[token] for token in self._prefill(prompts)]
        first_s = now() - started_s
        for step in range(num_tokens - 1):
            rows = [
                (ids[each][-1], len(prompt) + step, each, True)
                for each, prompt in enumerate(prompts)
            ]
            for each, token in enumerate(self._decode(rows)):
                ids[each].append(token)
        return Generated(ids, first_s, now() - started_s)

    def _make_room(self, sequences: int, length: int) -> None:
        """A context of the right shape, empty: its own KV for each sequence is fastest."""
        length = -(-length // _KV_GRANULE) * _KV_GRANULE
        if sequences == self._sequences and length <= self._length:
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), False)
            return
        if self._context is not None:
            llama_cpp.llama_free(self._context)
        self._sequences = sequences
        self._length = self._job.max_len if sequences == 1 else length
        params = _context_params(self._job, self._sequences, self._length)
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp makes no context of {sequences} x {self._length}")

    def _prefill(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        """The first token of each prompt; as many whole prompts at once as a batch takes."""
        firsts: list[int] = []
        rows: list[tuple[int, int, int, bool]] = []
        for each, prompt in enumerate(prompts):
            if rows and len(rows) + len(prompt) > _MAX_BATCH_TOKENS:
                firsts += self._decode(rows)
                rows = []
            rows += [
                (token, place, each, place == len(prompt) - 1) for place, token in enumerate(prompt)
            ]
            while len(rows) > _MAX_BATCH_TOKENS:
                self._decode(rows[:_MAX_BATCH_TOKENS])
                rows = rows[_MAX_BATCH_TOKENS:]
        return firsts + self._decode(rows)

    def _decode(self, rows: Sequence[tuple[int, int, int, bool]]) -> list[int]:
        """One llama_decode of (token, position, sequence, wants logits); the best ids."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for row, (token, position, sequence, wants_logits) in enumerate(rows):
            batch.token[row] = token
            batch.pos[row] = position
            batch.n_seq_id[row] = 1
            batch.seq_id[row][0] = sequence
            batch.logits[row] = wants_logits
        status = llama_cpp.llama_decode(self._context, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode of {len(rows)} tokens gave {status}")
        return [self._best(row) for row, (*_, wants_logits) in enumerate(rows) if wants_logits]

    def _best(self, row: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(self._context, row)
        return int(np.ctypeslib.as_array(logits, shape=(self._vocab_size,)).argmax())


def _context_params(job: Job, sequences: int, length: int) -> Any:
    params = llama_cpp.llama_context_default_params()
    params.n_seq_max = sequences
    params.n_ctx = sequences * length
    params.kv_unified = False
    params.n_batch = _MAX_BATCH_TOKENS
    params.n_ubatch = job.options.get("n_ubatch", 512)
    params.n_threads = params.n_threads_batch = job.num_threads
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
    params.no_perf = True
    return params


def _ignore(_level: int, _text: bytes, _data: Any) -> None:
    """Log lines of llama.cpp go nowhere: its errors come back as status codes too."""


if __name__ == "__main__":
    run_worker(LlamaEngine, "llama-cpp-python")
