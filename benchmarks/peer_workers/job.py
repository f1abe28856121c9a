"""What every worker process of `peers.py` does: one job in, events out.

    stdin   one line of JSON, the job; then nothing until it is closed
    stdout  events, a line of JSON each:
        {"event": "first_token"}                 the model is loaded and has answered
        {"event": "task", "name", "runs"}        how long each repeat of a task took
        {"event": "done", "versions"}            all tasks are over; the process waits, so that
                                                 its memory can be read, until stdin is closed

Standard library only: each engine lives in an environment of its own. Knows no engine.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What to load and what to time.

    Attributes:
        model: a .gguf file or a folder with safetensors.
        options: of the engine, for its worker to read.
        first_prompt: answered with one token right after loading.
        kv_tokens: how many tokens of KV the tasks need at most, over all sequences.
        max_len: of one sequence.
        tasks: {"name", "num_tokens", "warm_up": prompts, "repeats": [prompts, ...]}; `warm_up`
            runs first, untimed, with few tokens.
    """

    model: str
    options: dict[str, Any]
    num_threads: int
    first_prompt: list[int]
    max_batch: int
    max_len: int
    kv_tokens: int
    tasks: list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Generated:
    """Output ids of each prompt; seconds from the call to the first and to the last token."""

    ids: list[list[int]]
    first_s: float | None
    last_s: float


class Engine(Protocol):
    def generate(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> Generated:
        """Greedy, `num_tokens` for each prompt whatever they are, nothing cached from before."""
        ...


_WARM_UP_TOKENS = 8
_IDS_KEPT = 16


def run_worker(load: Callable[[Job], Engine], *packages: str) -> None:
    """Read the job, load the engine, time the tasks; `packages` are those whose versions count."""
    # Libraries print: from here on their stdout is stderr, and ours is out of their reach.
    events = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def say(event: str, **fields: Any) -> None:
        events.write(json.dumps({"event": event, **fields}) + "\n")

    job = Job(**json.loads(sys.stdin.readline()))
    _use_cores(job.num_threads)
    engine = load(job)
    _timed(engine, [job.first_prompt], 1)
    say("first_token")
    for task in job.tasks:
        if task["warm_up"]:
            _timed(engine, task["warm_up"], min(_WARM_UP_TOKENS, task["num_tokens"]))
        runs = [_timed(engine, prompts, task["num_tokens"]) for prompts in task["repeats"]]
        say("task", name=task["name"], runs=runs)
    say("done", versions={name: importlib.metadata.version(name) for name in packages})
    sys.stdin.read()
    events.flush()
    # Nothing is left to save, and some engines take long to say good-bye.
    os._exit(0)


def now() -> float:
    return time.perf_counter()


def _use_cores(num_threads: int) -> None:
    """As many cores as threads, so that no engine takes more than its share."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:num_threads])


def _timed(engine: Engine, prompts: Sequence[Sequence[int]], num_tokens: int) -> dict[str, Any]:
    generated = engine.generate(prompts, num_tokens)
    counts = sorted({len(ids) for ids in generated.ids})
    if len(generated.ids) != len(prompts) or counts != [num_tokens]:
        raise RuntimeError(
            f"{len(generated.ids)} sequences of {counts} tokens came back; "
            f"needed {len(prompts)} of {num_tokens}"
        )
    return {
        "first_s": generated.first_s,
        "last_s": generated.last_s,
        "num_prompts": len(prompts),
        "num_tokens": num_tokens,
        "ids": generated.ids[0][:_IDS_KEPT],
    }
