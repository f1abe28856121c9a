"""A whole engine over a plan, its workers in threads, and requests of every kind of sampling."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from checkpoints import VOCAB_SIZE

from shoal.assembly import load_engine
from shoal.core.options import EngineOptions
from shoal.core.plan import ReplicaPlan
from shoal.core.request import GenerateRequest, Output, SamplingParams
from shoal.core.stats import EngineStats
from shoal.engine.events import Submit
from shoal.engine.loop import EngineLoop

NUM_REQUESTS = 6


class Client:
    def __init__(self) -> None:
        self.tokens: dict[str, list[int]] = {}
        self.ends: dict[str, str | None] = {}
        self.changed = threading.Condition()

    def report(self, outputs: list[Output], _stats: EngineStats) -> None:
        with self.changed:
            for output in outputs:
                self.tokens.setdefault(output.request_id, []).extend(output.token_ids)
                if output.finish is not None:
                    self.ends[output.request_id] = output.finish
            self.changed.notify_all()

    def wait(self, count: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.ends) >= count, 60), "no end in 60 s"


@contextmanager
def engine(
    checkpoint: Path, replica: ReplicaPlan | None, kernels: str, *, in_threads: bool = True
) -> Iterator[tuple[EngineLoop, Client, Any]]:
    client = Client()
    options = EngineOptions(
        model_path=str(checkpoint),
        dtype="float32",
        kernels=kernels,  # type: ignore[arg-type]
        num_threads=1,
        max_num_seqs=4,
        max_num_batched_tokens=16,
        kv_cache_memory_bytes=1 << 20,
    )
    loaded = load_engine(
        options,
        client.report,
        say=lambda line: None,
        progress=lambda done, total: None,
        replica=replica,
        in_threads=in_threads,
    )
    thread = threading.Thread(target=loaded.loop.run)
    thread.start()
    try:
        yield loaded.loop, client, loaded.executor
    finally:
        loaded.loop.stop()
        thread.join()
        loaded.executor.close()


def requests(prefix: str) -> list[GenerateRequest]:
    rng = random.Random(7)
    ways: Sequence[dict[str, Any]] = (
        {"temperature": 0.0},
        {"temperature": 0.9, "seed": 1},
        {"temperature": 0.8, "seed": 2, "top_k": 12, "top_p": 0.9},
        {"temperature": 0.0, "repetition_penalty": 1.3, "frequency_penalty": 0.2},
    )
    return [
        GenerateRequest(
            request_id=f"{prefix}{i}",
            prompt_ids=tuple(rng.randrange(3, VOCAB_SIZE) for _ in range(rng.randint(1, 40))),
            sampling=SamplingParams(max_tokens=12, ignore_eos=True, **ways[i % len(ways)]),
        )
        for i in range(NUM_REQUESTS)
    ]


def tokens_of(loop: EngineLoop, client: Client, prefix: str) -> list[list[int]]:
    sent = requests(prefix)
    before = len(client.ends)
    for request in sent:
        loop.post(Submit(request))
    client.wait(before + len(sent))
    assert {client.ends[request.request_id] for request in sent} == {"length"}
    return [client.tokens[request.request_id] for request in sent]
